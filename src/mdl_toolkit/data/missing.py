"""Say why a recording is not found where a CSV names it: where, or how spelt, it is there."""

import re
import unicodedata
from pathlib import Path

from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import is_there

ARCHIVE = re.compile(r"\.ark:\d+$")


def explain_missing(path: str, cell: str, folder: Path) -> Localized:
    """Return what is wrong with a path where nothing is, and what to do.

    Args:
        path: where it was looked for.
        cell: it as the CSV has it.
        folder: where the CSV is.
    """
    # As Kaldi and lhotse have them.
    if cell.rstrip().endswith("|"):
        return Localized("a command, which is never run; write its sound to a file, and name that")
    if ARCHIVE.search(cell):
        return Localized("a part of an archive; write each recording to a file of its own (wav-copy)")
    for form in ("NFC", "NFD"):
        if is_there(Path(unicodedata.normalize(form, path))):
            return Localized(
                "not found, but {audio} is there with its accents in another form of Unicode, {form}; write "
                "the column `audio` in it, in Python: unicodedata.normalize({form!r}, text)",
                audio=path,
                form=form,
            )
    if "\\" in path and is_there(Path(path.replace("\\", "/"))):
        return Localized(
            "not found, but {audio} is there; write / in place of \\ in paths", audio=path.replace("\\", "/")
        )
    for spelt in dict.fromkeys((cell, cell.replace("\\", "/"))):
        if not Path(spelt).is_absolute() and is_there(folder / spelt):
            return Localized(
                "not found (looked for {audio}), but it lies beside the CSV; add: --base-dir {folder}",
                audio=path,
                folder=folder,
            )
    return Localized("not found (looked for {audio}); correct the path or --base-dir", audio=path)
