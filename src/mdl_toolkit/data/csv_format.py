"""What a file of rows is, before it is read: its encoding, what separates its cells, how its lines end.

A CSV is UTF-8 with commas. What spreadsheets write besides is read too where it can be told for sure: by a
byte order mark, by a column name that must be there, by the statistics of charset-normalizer on enough text.
JSON is told by how it begins, Kaldi's lists by their names. What is no table at all is refused with what to
do about it.
"""

import codecs
import csv
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mdl_toolkit.data.listing import SEGMENTS, SUFFIXES, WAV_SCP
from mdl_toolkit.errors import InputError
from mdl_toolkit.i18n import Localized, join_messages

# Bytes read at once.
BLOCK_BYTES = 1 << 20
# What `surrogateescape` makes of bytes that are not of the encoding, or JSON writes that is no character.
BAD_BYTE = re.compile("[\ud800-\udfff]")
ASCII = bytes(range(128))
WORKBOOK = "xlsx"
# How rows are written that name their cells: Kaldi's lists, and others by what they begin with.
LINES, ARRAY, KALDI, PARQUET = "{", "[", "kaldi", "PAR1"
RECORD_NAMES = {
    LINES: Localized("JSON Lines, an object on each"),
    ARRAY: Localized("a JSON array, whose objects are counted as lines"),
    KALDI: Localized("a list of Kaldi's, with those beside it"),
    PARQUET: Localized("Parquet, whose rows are counted as lines"),
}
# Encodings that spreadsheets write, as Python and people call them; they are told apart by the bytes outside
# ASCII of a sample. Of fewer than 32 such bytes one guess in twenty was wrong, of more none in three hundred.
ENCODINGS = {
    "gb18030": "GB18030", "cp932": "Shift-JIS", "big5": "Big5", "cp949": "CP949", "cp1252": "Windows-1252",
    "cp1251": "Windows-1251", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16",
}  # fmt: skip
# Nearly all Japanese text is CP949 too, but none is of its part that Korean is written in.
GUESSED = ("gb18030", "cp932", "big5", "euc_kr", "cp1252", "cp1251")
# As what Big5 looks if it is read as Shift-JIS, which is hardly ever written so.
HALF_WIDTH = re.compile("[\uff61-\uff9f]")
MOST_HALF_WIDTH = 0.2
LEAST_BYTES = 32
SAMPLE_BYTES = 1 << 16
# Column names are looked for in so many bytes.
HEADER_BYTES = 1 << 12
# Text is not UTF-8 if more of its bytes outside ASCII do not fit; with fewer, single rows are damaged.
MOST_BAD = 0.4
DELIMITERS = (",", ";", "\t", "|")
DELIMITER_NAMES = {
    ";": Localized("semicolons"),
    "\t": Localized("tabs"),
    "|": Localized("vertical bars"),
}
# Excel's first line that says what separates cells.
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
# What files begin with that are no text.
SIGNATURES = (
    (
        b"\xd0\xcf\x11\xe0",
        Localized("this is an Excel workbook that is old or has a password; save it as CSV UTF-8"),
    ),
    (b"\x1f\x8b", Localized("this is compressed with gzip; unpack it first")),
    (b"PK\x03\x04", Localized("this is a zip archive; unpack it first")),
)
LIST_LINE = re.compile(r"\S+\s+\S.*")


@dataclass(frozen=True)
class CsvFormat:
    r"""Say how a file of rows is written.

    Attributes:
        encoding: Python's name of it, or `WORKBOOK`.
        has_bom: a byte order mark comes first.
        delimiter: what separates cells.
        line_end: how the first line ends.
        is_named: the first line says what separates cells.
        records: `LINES`, `ARRAY`, `KALDI` or `PARQUET` if its rows name their cells.
    """

    encoding: str = "utf-8"
    has_bom: bool = False
    delimiter: str = ","
    line_end: str = "\r\n"
    is_named: bool = False
    records: str = ""

    @property
    def is_csv(self) -> bool:
        """Tell whether it is a CSV, not a workbook, JSON or a list."""
        return self.encoding != WORKBOOK and not self.records

    @property
    def is_usual(self) -> bool:
        """Tell whether it is UTF-8 with commas."""
        return self.encoding == "utf-8" and self.delimiter == "," and self.is_csv

    @property
    def newline(self) -> str:
        r"""Return what ends a line for a reader: `\n`, or `\r` as old spreadsheets wrote."""
        return self.line_end[-1:]

    def describe(self) -> Localized:
        """Describe what it was taken for."""
        parts = [Localized("a workbook, its active sheet")] if self.encoding == WORKBOOK else []
        if self.records:
            parts.append(RECORD_NAMES[self.records])
        if self.encoding in ENCODINGS:
            parts.append(Localized("{encoding} text", encoding=ENCODINGS[self.encoding]))
        if self.delimiter != ",":
            name = DELIMITER_NAMES.get(self.delimiter, repr(self.delimiter))
            parts.append(Localized("cells separated by {delimiter}", delimiter=name))
        return join_messages(parts, "{left}, {right}")

    def text(self, file: BinaryIO) -> io.TextIOWrapper:
        """Return the text of a file behind its byte order mark; bytes that do not fit are surrogates."""
        file.seek(0)
        text = io.TextIOWrapper(file, self.encoding, "surrogateescape", newline=self.newline)
        if text.read(1) != "\ufeff":
            text.seek(0)
        return text


def csv_error(path: Path, message: Localized) -> InputError:
    """Return an error that names the file."""
    return InputError("{path}: {message}.", path=path, message=message)


def detect_format(path: Path, file: BinaryIO, wanted: Sequence[str]) -> CsvFormat:
    """Find out how an open file is written.

    Args:
        path: its name, for messages.
        file: is read from its start.
        wanted: column names, one of which tells what separates cells.

    Raises:
        InputError: it is no file of rows.
    """
    head = file.read(BLOCK_BYTES)
    with suppress(zipfile.BadZipFile):
        if zipfile.is_zipfile(file) and "xl/workbook.xml" in zipfile.ZipFile(file).namelist():
            return CsvFormat(WORKBOOK, has_bom=True)
    if head.startswith(PARQUET.encode()):
        return CsvFormat(records=PARQUET)
    reason = next((reason for mark, reason in SIGNATURES if head.startswith(mark)), None)
    if path.suffix.lower() in SUFFIXES:
        reason = Localized("this is a recording; give a CSV with the column `audio` that names it")
    if reason is not None:
        raise csv_error(path, reason)
    encoding = detect_encoding(head, file, wanted)
    # Every kind of line end is recognised, and left as it is.
    text = CsvFormat(encoding, line_end="").text(file)
    first = text.readline()
    ending = first[len(first.rstrip("\r\n")) :] or "\r\n"
    named = SEPARATOR_LINE.fullmatch(first)
    header = "" if named else first
    while not header.strip() and (line := text.readline()):
        header = line
    text.detach()
    delimiter = named[1] if named else detect_delimiter(header, wanted)
    has_names = {*map(fold_name, header.split(delimiter))} & {*wanted}
    records = ""
    if not has_names:
        is_kaldi = path.name in (WAV_SCP, SEGMENTS) and path.with_name(WAV_SCP).is_file()
        records = KALDI if is_kaldi else next(filter(header.lstrip().startswith, (LINES, ARRAY)), "")
    # A list of Kaldi's has an identifier and a path, which may be of a pipe, and no column names.
    is_list = not has_names and not records and delimiter == "," and "," not in header
    if is_list and LIST_LINE.fullmatch(header.strip()):
        name = header.strip().rstrip("|").split()[-1]
        if Path(name).suffix.lower() in SUFFIXES or path.suffix == ".scp":
            reason = Localized(
                "this is a list such as Kaldi's; call it wav.scp, with `text` beside it, or write a CSV with "
                "the column `audio`"
            )
            raise csv_error(path, reason)
    has_bom = encoding != "utf-8" or head.startswith(codecs.BOM_UTF8)
    return CsvFormat(encoding, has_bom, delimiter, ending, is_named=named is not None, records=records)


def detect_encoding(head: bytes, file: BinaryIO, wanted: Sequence[str]) -> str:
    """Return the encoding of a file that begins with `head`: UTF-8 unless it is another for sure.

    Args:
        head: its first bytes.
        file: all of it.
        wanted: column names, one of which is there.
    """
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):  # fmt: skip
        if head.startswith(mark):
            return name
    # Without a mark, the header tells, which has one of these names.
    for name in ("utf-16-le", "utf-16-be"):
        start = head[:HEADER_BYTES].decode(name, "ignore").casefold()
        if any(word in start for word in wanted):
            return name
    decoder, bad, high, sample = codecs.getincrementaldecoder("utf-8")("surrogateescape"), 0, 0, b""
    for block in _blocks(file):
        text = decoder.decode(block)
        if not block.isascii():
            high += len(block.translate(None, ASCII))
            bad += len(BAD_BYTE.findall(text))
            if len(sample) < SAMPLE_BYTES:
                lines = (line for line in block.splitlines(keepends=True) if not line.isascii())
                sample = (sample + b"".join(lines))[:SAMPLE_BYTES]
    if high < LEAST_BYTES or bad <= MOST_BAD * high:
        return "utf-8"
    from charset_normalizer import from_bytes

    # A sample that ends in the middle of a character would fit no encoding.
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    for match in from_bytes(sample, cp_isolation=[*GUESSED]):
        letters = [character for character in str(match) if not character.isascii()]
        half_width = len(HALF_WIDTH.findall("".join(letters)))
        if match.encoding != "cp932" or half_width <= MOST_HALF_WIDTH * len(letters):
            encoding = {"euc_kr": "cp949"}.get(match.encoding, match.encoding)
            return encoding if _decodes(file, encoding) else "utf-8"
    return "utf-8"


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    return iter(lambda: file.read(BLOCK_BYTES), b"")


def _decodes(file: BinaryIO, encoding: str) -> bool:
    """Tell whether a whole file is text of an encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in _blocks(file):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def detect_delimiter(header: str, wanted: Sequence[str]) -> str:
    """Return what separates the cells of a header: a comma, unless only another one makes a wanted name."""
    for delimiter in DELIMITERS:
        try:
            cells = next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            continue
        if {*map(fold_name, cells)} & {*wanted}:
            return delimiter
    return ","


def fold_name(column: str) -> str:
    """Return a column name without regard to case, and to what stands around and between its words."""
    return re.sub(r"[\s_-]+", "_", column.strip("\ufeff").strip().casefold())
