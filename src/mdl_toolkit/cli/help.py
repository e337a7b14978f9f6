"""The page of `--help`: usage, summary, and entries under headings, in lines that fit the terminal."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass
from typing import Any

from mdl_toolkit.config.options import Options, shown_name, spec_of
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import width_of

HELP_NAMES = ("-h", "--help")
OTHERS = Localized("Other options")
# Columns before an explanation.
INDENT = 6

# One Chinese character or a run of other letters, with the punctuation that stays next to it.
_UNBREAKABLE = re.compile(
    r"(\s*)([（]*(?:[\u3400-\u9fff]|[^\s\u3000-\u9fff\uff00-\uffef]+)[、。），：；！？]*|\S)"
)


@dataclass(frozen=True)
class HelpEntry:
    """Explain one thing: its label, a note after the label, and the explanation below."""

    label: str
    note: str
    text: str

    @staticmethod
    def of(field: "Field[Any]") -> "HelpEntry":
        """Explain an option, with its default as the note."""
        spec, default = spec_of(field), field.default
        if default is MISSING:
            note = Localized("(required)")
        else:
            shown = f"{default:g}" if isinstance(default, float) else default
            shown = shown if isinstance(shown, str) else json.dumps(shown)
            note = Localized("(default: {value})", value=spec.dynamic or shown)
        return HelpEntry(f"{shown_name(field)} {spec.type.metavar}", str(note), str(spec.help))


def help_entry() -> HelpEntry:
    """Return the entry of `--help` itself."""
    return HelpEntry(", ".join(HELP_NAMES), "", str(Localized("Show this page.")))


def options_page(command: str, options: type[Options], fields: Sequence["Field[Any]"], width: int) -> str:
    """Lay out the help of a command.

    Args:
        command: program and command.
        options: the command's options class.
        fields: its fields and those that all commands share.
        width: columns of the terminal.
    """
    usage = [command]
    for field in fields:
        name, spec = shown_name(field), spec_of(field)
        if field.default is not MISSING:
            continue
        if not spec.positional:
            usage.append(f"{name} {spec.type.metavar}")
        else:
            usage.append(f"{name}..." if spec.type.is_repeated else name)
    usage.append(str(Localized("[OPTIONS]")))
    sections = [
        (str(group), [HelpEntry.of(field) for field in fields if spec_of(field).group == group])
        for group in (*options.GROUPS, OTHERS)
    ]
    sections[-1][1].append(help_entry())
    return help_page(" ".join(usage), str(options.SUMMARY), sections, width)


def help_page(
    usage: str, summary: str, sections: Iterable[tuple[str, Sequence[HelpEntry]]], width: int
) -> str:
    """Lay out a page of help in lines of at most `width` columns, where the words allow it."""

    def indented(text: str, columns: int) -> list[str]:
        return [" " * columns + line for line in wrap(text, width - columns)]

    lines = [*wrap(str(Localized("Usage: {command}", command=usage)), width), "", *indented(summary, 2)]
    for heading, entries in sections:
        lines += ["", str(Localized("{heading}:", heading=heading))]
        for entry in entries:
            head = f"  {entry.label}  {entry.note}".rstrip()
            is_short = width_of(head) <= width
            lines += [head] if is_short else [f"  {entry.label}", *indented(entry.note, INDENT)]
            lines += indented(entry.text, INDENT)
    return "\n".join(lines) + "\n"


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` columns, at blanks and between Chinese characters."""
    lines = [""]
    for blank, piece in _UNBREAKABLE.findall(text):
        longer = lines[-1] + (" " if blank and lines[-1] else "") + piece
        if lines[-1] and width_of(longer) > width:
            lines.append(piece)
        else:
            lines[-1] = longer
    return lines
