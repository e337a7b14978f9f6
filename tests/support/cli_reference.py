"""The options in `docs/cli.zh.md` and `docs/cli.en.md`, made from the option tables.

The pages' prose is written by hand; what stands between `<!-- options: COMMAND -->` and `<!-- end -->` is
made here. `python -m tests.support.cli_reference` writes it; `test_docs.py` fails while a page has anything
else.
"""

import json
import re
from dataclasses import MISSING, Field
from typing import Any

from mdl_toolkit.cli.click_options import OptionsCommand
from mdl_toolkit.cli.help import OTHERS
from mdl_toolkit.cli.main import toolkit
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.options import fields_in_order, shown_name, spec_of
from tests.support.paths import DOCS

PAGES = {language: DOCS / f"cli.{language}.md" for language in ("zh", "en")}
REGION = re.compile(r"(<!-- options: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIRST_GROUP = {field.name: spec_of(field).group for field in fields_in_order(ConvertOptions)}


def refreshed(page: str, language: str) -> str:
    """A page with the options of every command as the tables have them now."""
    commands = toolkit().commands

    def options(match: "re.Match[str]") -> str:
        command = commands[match[2]]
        assert isinstance(command, OptionsCommand)
        return f"{match[1]}\n{_options(command, language)}\n{match[3]}"

    return REGION.sub(options, page)


def _options(command: OptionsCommand, language: str) -> str:
    groups = []
    for group in (*command.options.GROUPS, OTHERS):
        fields = [field for field in command.fields if spec_of(field).group == group]
        is_known = all(FIRST_GROUP.get(field.name) == group for field in fields)
        show = _names if is_known and command.options is not ConvertOptions else _explanations
        groups.append(show(_said(language, group.en, group.zh), fields, language))
    return "\n".join(groups)


def _names(heading: str, fields: list["Field[Any]"], language: str) -> str:
    """Options that are explained under `convert-dataset`."""
    names = _said(language, ", ", "、").join(f"`{shown_name(field)}`" for field in fields)
    same = _said(language, ", as for `convert-dataset`: ", "（与 `convert-dataset` 相同）：")
    return f"**{heading}**{same}{names}\n"


def _explanations(heading: str, fields: list["Field[Any]"], language: str) -> str:
    return "\n".join([f"**{heading}**\n", *(_option(field, language) for field in fields)]) + "\n"


def _option(field: "Field[Any]", language: str) -> str:
    spec = spec_of(field)
    name = f"`{shown_name(field)} {spec.type.metavar}`"
    notes = [_default(field, language)]
    if spec.nullable and (field.default is not None or spec.dynamic):
        notes.append(_said(language, "(may be `null`)", "（可为 `null`）"))
    help_text = _said(language, spec.help.en, spec.help.zh)
    return f"* {name}{_said(language, ': ', '：')}{' '.join([*notes, help_text])}"


def _default(field: "Field[Any]", language: str) -> str:
    spec = spec_of(field)
    if field.default is MISSING:
        place = _said(language, ", positional", "，位置参数") if spec.positional else ""
        return f"**{_said(language, 'required', '必需')}{place}**"
    value = f"`{_shown(field.default)}`"
    if spec.dynamic is not None:
        value = _said(language, spec.dynamic.en, spec.dynamic.zh)
    return f"**{_said(language, 'default: ', '默认值：')}{value}**"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _said(language: str, en: Any, zh: Any) -> Any:
    """One of two, by the language of the page and not of whoever runs this."""
    return zh if language == "zh" else en


if __name__ == "__main__":
    for each, path in PAGES.items():
        path.write_text(refreshed(path.read_text(encoding="utf-8"), each), encoding="utf-8")
