"""CSV to rows with their line numbers; base-dir, default prompts; every problem at once.

Everything is text and stays as it was written. Files are looked for, never opened; nothing is fetched.
"""

import csv
import difflib
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from mdl_toolkit.errors import InputError, RowProblem, RowsError
from mdl_toolkit.language import Text

AUDIO, SYSTEM, USER, PREDICTION = "audio", "system_prompt", "user_prompt", "prediction"
NUL_MARK = "\udc00"  # stands for NUL while the CSV is read, as Python 3.10's csv refuses NUL itself
BAD_BYTE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8
LONGEST_CELL = 2**31 - 1  # the most csv.field_size_limit takes where a C long has 32 bits; default 131,072
OTHER_ENCODINGS = ("gb18030", "cp1252")  # what spreadsheets write when they do not write UTF-8
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

EMPTY_PREDICTION = Text(
    "empty; fill it in, or accept empty ones with --allow-empty-prediction",
    "为空；请填写，或使用 --allow-empty-prediction 接受空值",
)
NUL_BYTE = Text("holds a NUL byte; remove it", "含有 NUL 字节；请删除")


@dataclass(frozen=True)
class Row:
    """One row of a CSV.

    Attributes:
        line: line of the file where the row starts, counted from 1; the header is on line 1.
        audio: a URL as written, or a path that is absolute or starts from the current directory.
        audio_text: the cell `audio` as written.
        system_prompt: the row's own, else the option's, else None.
        user_prompt: likewise.
        prediction: the cell as written; None if the CSV has no such column.
        cells: the text of every cell, as many as there are columns.
    """

    line: int
    audio: str
    audio_text: str
    system_prompt: str | None
    user_prompt: str | None
    prediction: str | None
    cells: tuple[str, ...]

    @property
    def shown(self) -> str:
        """The cell `audio` as messages may show it: an address without its password."""
        return without_credentials(self.audio_text)


@dataclass(frozen=True)
class Manifest:
    """A CSV that has been read.

    Attributes:
        path: the file.
        columns: its columns, in order.
        rows: its usable rows, in order.
        problems: what is wrong with the others. Who looks into the recordings adds to these, so that all
            bad rows are reported together.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    problems: tuple[RowProblem, ...] = ()

    def checked(self) -> "Manifest":
        """The manifest itself, if nothing is wrong with any row.

        Raises:
            RowsError: all rows that cannot be used.
        """
        if self.problems:
            raise RowsError(str(self.path), self.problems)
        return self


@dataclass(frozen=True)
class Defaults:
    """What the options say for rows that do not say it themselves."""

    base_dir: str | Path | None
    system_prompt: str | None
    user_prompt: str | None


class _Line(NamedTuple):
    number: int
    cells: list[str]


def read_manifest(
    path: str | Path,
    *,
    base_dir: str | Path | None,
    system_prompt: str | None,
    user_prompt: str | None,
    needs_prediction: bool,
    allow_empty_prediction: bool = False,
    allow_empty: bool = False,
) -> Manifest:
    """Read and check a CSV (rules 8 to 13).

    A row with fewer cells than the header is filled up with empty ones; blank lines are skipped.

    Args:
        path: the CSV file.
        base_dir: where relative audio paths start; None is the current directory.
        system_prompt: for rows whose own is empty or the word `null`.
        user_prompt: likewise.
        needs_prediction: the column `prediction` must be there and filled in (training).
        allow_empty_prediction: an empty prediction is a prediction.
        allow_empty: no rows at all are accepted (inference).

    Returns:
        The usable rows, and the problems of the others: too many cells, a NUL byte, an empty cell, an audio
        path that is not a file with something in it, an address that is not http or https.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or no CSV; a column is missing or there twice;
            there is no row.
    """
    path = Path(path)
    lines = _lines(path, _text(path))
    header = next(lines, None)
    if header is None:
        raise _bad(
            path,
            "the file is empty; a CSV starts with a line of column names",
            "文件为空；CSV 的首行应为列名",
        )
    columns = tuple(header.cells)
    _check_columns(path, columns, (AUDIO, PREDICTION) if needs_prediction else (AUDIO,))
    fill_in = needs_prediction and not allow_empty_prediction
    reader = _Reader(columns, Defaults(base_dir, system_prompt, user_prompt), fill_in)
    rows = tuple(row for line in lines if (row := reader.read(line)))
    if not rows and not reader.problems and not allow_empty:
        raise _bad(
            path, "there is no row below the column names; add one", "列名之下没有任何数据行；请添加数据"
        )
    return Manifest(path, columns, rows, tuple(reader.problems))


def is_url(audio: str) -> bool:
    """Tell whether `Row.audio` is an address to fetch, rather than a path."""
    return audio.lower().startswith(("http://", "https://"))


def without_credentials(text: str) -> str:
    """The address or path as messages may show it: without the `user:password@` of an address."""
    return re.sub(r"(?i)^(https?://)[^/?#]*@", r"\1", text)


def _bad(path: Path, en: str, zh: str) -> InputError:
    return InputError(f"{path}: {en}.", f"{path}：{zh}。")


def _text(path: Path) -> str:
    """The file's text, with bytes that are not UTF-8 as lone surrogates and NUL as `NUL_MARK`."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _bad(path, "there is no such file; correct the path", "文件不存在；请更正路径") from None
    except IsADirectoryError:
        raise _bad(path, "this is a folder; give a CSV file", "这是目录；请指定 CSV 文件") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise _bad(path, f"cannot be read ({reason})", f"无法读取（{reason}）") from problem
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _bad(path, "this is UTF-16; save it as UTF-8", "文件编码为 UTF-16；请另存为 UTF-8")
    text = content.decode("utf-8-sig", "surrogateescape").replace("\0", NUL_MARK)
    return text if text.isascii() or not BAD_BYTE.search(text) else _refuse_bytes(path, content, text)


def _refuse_bytes(path: Path, content: bytes, text: str) -> str:
    """Raise the error for text that is not UTF-8, naming the first place and the likely encoding."""
    line, column = _place_of_bad_byte(path, text)
    guess = next((name for name in OTHER_ENCODINGS if _decodes(content, name)), None)
    en = f"line {line}{f', column {column}' if column else ''}: not UTF-8 text"
    zh = f"第 {line} 行{f' {column} 列' if column else ''}：不是 UTF-8 文本"
    raise _bad(
        path,
        f"{en}{f' (it may be {guess})' if guess else ''}; save the file as UTF-8",
        f"{zh}{f'（可能是 {guess}）' if guess else ''}；请将文件另存为 UTF-8",
    )


def _place_of_bad_byte(path: Path, text: str) -> tuple[int, str]:
    """Line where the first bad row starts, and its column's name as far as it is known."""
    columns: list[str] = []
    for number, cells in _lines(path, text):
        columns = columns or cells
        for index, cell in enumerate(cells):
            if BAD_BYTE.search(cell):
                known = index < len(columns) and number > 1 and not BAD_BYTE.search(columns[index])
                return number, columns[index] if known else ""
    raise AssertionError("the caller has found a bad byte")


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _lines(path: Path, text: str) -> Iterator[_Line]:
    r"""The rows that are not blank, each with the line it starts on.

    Lines end with \n or \r\n, or all with \r as old spreadsheets wrote them; a \r elsewhere must be quoted.
    """
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline="\n" if "\n" in text else "\r"), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            en = f"the row that starts on line {number} is no valid CSV ({problem}); check its quotes"
            zh = f"从第 {number} 行开始的一行不是有效的 CSV（{problem}）；请检查引号是否成对"
            raise _bad(path, en, zh) from problem
        if cells is None:
            return
        if cells:
            yield _Line(number, cells)


def _check_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raise InputError if a needed column is missing, or any column is there twice."""
    complaints = [_missing(name, columns) for name in needed if name not in columns]
    complaints += [
        Text(
            f"there are {count} columns {name!r}; rename or remove one",
            f"有 {count} 列名为 {name!r}；请改名或删除",
        )
        for name, count in Counter(columns).items()
        if count > 1
    ]
    if any(NUL_MARK in name for name in columns):
        complaints.append(Text("line 1 holds a NUL byte; remove it", "第 1 行含有 NUL 字节；请删除"))
    if complaints:
        raise _bad(path, "; ".join(text.en for text in complaints), "；".join(text.zh for text in complaints))


def _missing(name: str, columns: Sequence[str]) -> Text:
    tidy = {column.strip().lower().replace("-", "_").replace(" ", "_"): column for column in columns}
    alike = difflib.get_close_matches(name, tidy, 1, 0.8)
    listed = ", ".join(repr(column) for column in columns)
    if alike:
        hint = Text(f"rename {tidy[alike[0]]!r}", f"请将 {tidy[alike[0]]!r} 改名")
    elif len(columns) == 1 and re.search("[;\t|]", columns[0]):
        hint = Text("separate cells by commas", "请用逗号分隔单元格")
    else:
        hint = Text("add it", "请添加该列")
    return Text(
        f"the column {name!r} is missing, the columns are {listed}; {hint.en}",
        f"缺少 {name!r} 列，现有的列为 {listed}；{hint.zh}",
    )


class _Reader:
    """Lines to rows; what is wrong with them gathers in `problems`."""

    def __init__(self, columns: tuple[str, ...], defaults: Defaults, fill_in_prediction: bool) -> None:
        self.columns = columns
        self.defaults = defaults
        self.fill_in_prediction = fill_in_prediction
        self.problems: list[RowProblem] = []

    def read(self, line: _Line) -> Row | None:
        """The row, or None if it has a problem."""
        before = len(self.problems)
        cells = line.cells + [""] * (len(self.columns) - len(line.cells))
        row = self._row(line.number, dict(zip(self.columns, cells, strict=False)), cells)
        self._check_shape(line)
        if reason := _audio_problem(row):
            self._add(line, AUDIO, row.shown, reason)
        if self.fill_in_prediction and not row.prediction:
            self._add(line, PREDICTION, "", EMPTY_PREDICTION)
        return row if len(self.problems) == before else None

    def _row(self, number: int, named: dict[str, str], cells: list[str]) -> Row:
        defaults = self.defaults
        return Row(
            line=number,
            audio=_resolve(named[AUDIO], defaults.base_dir),
            audio_text=named[AUDIO],
            system_prompt=_prompt(named.get(SYSTEM), defaults.system_prompt),
            user_prompt=_prompt(named.get(USER), defaults.user_prompt),
            prediction=named.get(PREDICTION),
            cells=tuple(cells),
        )

    def _check_shape(self, line: _Line) -> None:
        width = len(self.columns)
        if len(line.cells) > width:
            self._add(line, str(width + 1), line.cells[width], _too_many(len(line.cells), width))
        for name, cell in zip(self.columns, line.cells, strict=False):
            if NUL_MARK in cell:
                self._add(line, name, cell.replace(NUL_MARK, "\0"), NUL_BYTE)

    def _add(self, line: _Line, column: str, value: str, reason: Text) -> None:
        self.problems.append(RowProblem(line.number, column, value, reason))


def _too_many(cells: int, columns: int) -> Text:
    return Text(
        f"the row has {cells} cells, the header {columns}; put text that holds a comma in double quotes",
        f"该行有 {cells} 个单元格，而表头只有 {columns} 列；含逗号的文本请加双引号",
    )


def _prompt(cell: str | None, default: str | None) -> str | None:
    """The cell, unless it says nothing: empty, or the word `null` (rule 10)."""
    return default if cell in (None, "", "null") else cell


def _resolve(audio: str, base_dir: str | Path | None) -> str:
    """The cell as an address, or as a path that starts at the root or the current directory (rule 11)."""
    if not audio or _SCHEME.match(audio):
        return audio
    return os.path.join(os.path.expanduser(base_dir or ""), os.path.expanduser(audio))  # noqa: PTH111, PTH118


def _audio_problem(row: Row) -> Text | None:
    """What is wrong with the cell `audio`, as far as can be told without opening or fetching it."""
    if not row.audio_text:
        return Text("empty; give a path or an http(s) address", "为空；请填写路径或 http(s) 地址")
    if _SCHEME.match(row.audio):
        return _address_problem(row.audio)
    try:
        status = os.stat(row.audio)  # noqa: PTH116
    except ValueError:
        return None  # a NUL byte, which has its own message
    except (FileNotFoundError, NotADirectoryError):
        return Text(
            f"not found (looked for {row.audio}); correct the path or --base-dir",
            f"文件不存在（已查找 {row.audio}）；请更正路径或 --base-dir",
        )
    except OSError as problem:
        return Text(
            f"cannot be used ({problem.strerror}); correct it", f"无法使用（{problem.strerror}）；请更正"
        )
    return _file_problem(status)


def _file_problem(status: os.stat_result) -> Text | None:
    if stat.S_ISDIR(status.st_mode):
        return Text("this is a folder; give a file", "这是目录；请指定文件")
    if not stat.S_ISREG(status.st_mode):
        return Text("this is a device or pipe; give a file", "这是设备或管道；请指定文件")
    if not status.st_size:
        return Text("the file is empty (0 bytes); get it again", "文件为空（0 字节）；请重新获取")
    return None


def _address_problem(url: str) -> Text | None:
    if not is_url(url):
        return Text(
            "this kind of address cannot be fetched; give a path or an http(s) address",
            "不支持此类地址；请填写路径或 http(s) 地址",
        )
    try:
        parts = urlsplit(url)
        fine = parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    return None if fine else Text("this is no valid address; correct it", "地址无效；请更正")
