"""The Chinese catalogue, kept in step with the templates in the code.

`make messages` extracts the templates, writes them into the .po with the translations that are there, and
compiles the .mo; `test_messages.py` fails while a template has no translation.
"""

import sys
from io import BytesIO

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from tests.support.paths import PACKAGE

SOURCE = PACKAGE
PO = SOURCE / "locale/zh/LC_MESSAGES/mdl_toolkit.po"
MO = PO.with_suffix(".mo")
ERRORS = (
    "ToolkitError", "UsageError", "InputError", "AudioError", "TooLongError", "CutOffError",
    "UnavailableError", "DatasetError", "ModelError", "NotFoundError", "RefusedRowError", "NotMergeableError",
    "RequestError", "UnauthorizedError", "UnknownModelError", "TooLargeError", "UnanswerableError",
    "FailedError", "BusyError", "ForbiddenError", "GoneError",
)  # fmt: skip
# What takes a template, and as which of its arguments.
TAKES = {
    "Localized": 1,
    "say": 1,
    "warn": 1,
    "refuse": 1,
    "_refuse": 2,
    "progress": 2,
    "option": 4,
    "join_messages": 2,
    # Of the classes of errors that say one thing.
    "__init__": 1,
    **dict.fromkeys(ERRORS, 1),
}
HEADER = """\
# Chinese messages of mdl-toolkit; README.md in the folder `locale` says how to translate.
msgid ""
msgstr ""
"Language: zh\\n"
"MIME-Version: 1.0\\n"
"Content-Type: text/plain; charset=UTF-8\\n"
"Content-Transfer-Encoding: 8bit\\n"

"""


def extracted() -> Catalog:
    """Every template in the code, with the files it stands in."""
    catalog = Catalog(locale="zh")
    keywords = {name: (position,) for name, position in TAKES.items()}
    for file, line, message, _, _ in extract_from_dir(SOURCE, [("**.py", "python")], keywords=keywords):
        if message:
            catalog.add(message, locations=[(file, line)])
    return catalog


def translated() -> Catalog:
    """The catalogue as it is in the tree."""
    with PO.open("rb") as file:
        return read_po(file, locale="zh")


def written(known: Catalog) -> str:
    """The .po of the code's templates with the known translations; what is not known has none."""
    catalog = extracted()
    for message in catalog:
        if message.id and message.id in known:
            message.string = known[message.id].string
    lines = BytesIO()
    write_po(lines, catalog, width=110, omit_header=True, sort_by_file=True, include_lineno=False)
    return HEADER + lines.getvalue().decode()


def main() -> None:
    """Bring both files up to date, and say what is to be translated."""
    PO.write_text(written(translated()), encoding="utf-8")
    catalog = translated()
    with MO.open("wb") as file:
        write_mo(file, catalog)
    for message in catalog:
        if message.id and not message.string:
            sys.stdout.write(f"no translation: {message.id!r}\n")


if __name__ == "__main__":
    main()
