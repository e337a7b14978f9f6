"""A safetensors file as a stream: its header as it is, its tensors in the order in which they lie there.

Nothing is mapped and no tensor is held whole unless asked for, so memory does not grow with the file.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mdl_toolkit.errors import ModelError

SUFFIX = ".safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes computed or copied at once. A block and what is made of it stay in a core's cache.
BLOCK = 1 << 20
_LENGTH = 8  # bytes, before the header: how long that is
_MOST = 100 << 20  # bytes of a header, as the library has it


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: of the tensor.
        dtype: as the format spells it, `BF16` for example.
        shape: of the tensor.
        start: of its bytes, from the end of the header.
        stop: the byte after the last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of everything at one place of the first dimension."""
        return (
            (self.stop - self.start) // (self.shape[0] if self.shape else 1) if self.stop > self.start else 1
        )

    def cast(self, dtype: str, start: int) -> "TensorEntry":
        """The same tensor in another dtype, at another place."""
        count = (self.stop - self.start) // FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 0
        size = count * FLOATS[dtype].itemsize if dtype != self.dtype else self.stop - self.start
        return replace(self, dtype=dtype, start=start, stop=start + size)


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file.

    Attributes:
        path: where it is.
        head: the length of the header and the header itself, byte for byte.
        metadata: of the header; None where it has none.
        entries: the tensors, in the order of their bytes.
    """

    path: Path
    head: bytes
    metadata: Any
    entries: tuple[TensorEntry, ...]

    @staticmethod
    def open(path: Path) -> "WeightFile":
        """Read a file's header.

        Raises:
            ModelError: it is no safetensors file, or not all of it is there.
        """
        try:
            with path.open("rb") as file:
                return _parsed(path, file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ModelError(
                "{path}: no whole safetensors file ({reason}); fetch it again", path=path, reason=problem
            ) from problem

    def __getitem__(self, name: str) -> TensorEntry:
        return next(entry for entry in self.entries if entry.name == name)

    def read(self, entry: TensorEntry) -> Tensor:
        """A whole tensor."""
        parts = [part.reshape(-1) for part in self.rows(entry, max(1, entry.stop - entry.start))]
        return torch.cat(parts).reshape(entry.shape)

    def rows(self, entry: TensorEntry, size: int = BLOCK) -> Iterator[Tensor]:
        """A tensor of a floating dtype in blocks of rows, `[rows, ...]`, of about so many bytes."""
        dtype, step = FLOATS[entry.dtype], max(1, size // entry.row_bytes) * entry.row_bytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(len(self.head) + entry.start)
            for start in range(entry.start, entry.stop, step):
                part = _read(file, min(step, entry.stop - start)).view(dtype)
                yield part.reshape(-1, *entry.shape[1:])

    def pieces(self, entry: TensorEntry) -> Iterator[memoryview]:
        """A tensor's bytes, some at a time; each piece is valid until the next one."""
        buffer = memoryview(bytearray(min(BLOCK, entry.stop - entry.start)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(len(self.head) + entry.start)
            left = entry.stop - entry.start
            while left:
                count = file.readinto(buffer[:left])
                if not count:
                    raise OSError(f"{self.path} ends too early")
                yield buffer[:count]
                left -= count

    def sample(self, entry: TensorEntry, size: int) -> bytes:
        """The first, middle and last bytes of a tensor, so many each."""
        last = max(entry.start, entry.stop - size)
        with self.path.open("rb") as file:
            found = []
            for place in (entry.start, (entry.start + last) // 2, last):
                file.seek(len(self.head) + place)
                found.append(file.read(min(size, entry.stop - entry.start)))
        return b"".join(found)


def weight_files(folder: Path) -> list[WeightFile]:
    """The weights of a model folder, in the order of the files' names.

    Raises:
        ModelError: one of them is damaged.
    """
    return [WeightFile.open(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of most of a model's numbers, or float32 where that is float64.

    Raises:
        ModelError: a file of weights is damaged.
    """
    sizes: Counter[str] = Counter()
    for file in weight_files(folder):
        for entry in file.entries:
            if entry.dtype in FLOATS:
                sizes[entry.dtype] += entry.stop - entry.start
    [(dtype, _)] = sizes.most_common(1)
    return torch.float32 if dtype == "F64" else FLOATS[dtype]


def _parsed(path: Path, file: IO[bytes]) -> WeightFile:
    length = file.read(_LENGTH)
    size = int.from_bytes(length, "little")
    if len(length) < _LENGTH or size > _MOST:
        raise ValueError("no header")
    text = file.read(size)
    header = json.loads(text)
    metadata = header.pop("__metadata__", None)
    entries = [
        TensorEntry(name, each["dtype"], tuple(each["shape"]), *each["data_offsets"])
        for name, each in header.items()
    ]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    there = path.stat().st_size - _LENGTH - size
    promised = entries[-1].stop if entries else 0
    if promised != there:
        raise ValueError(f"{there} bytes of tensors, {promised} promised")
    return WeightFile(path, length + text, metadata, tuple(entries))


def _read(file: IO[bytes], count: int) -> Tensor:
    """So many bytes, `[count]` uint8."""
    buffer = torch.empty(count, dtype=torch.uint8)
    view, done = buffer.numpy().data, 0
    while done < count:
        got = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise OSError(f"{file.name} ends too early")
        done += got
    return buffer


# --- writing ---------------------------------------------------------------------------------------------

Blocks = Callable[
    [TensorEntry], "Iterator[Tensor] | None"
]  # a tensor's new content, or None: its bytes as they are


def rewrite(source: WeightFile, target: Path, dtypes: dict[str, str], changed: Blocks) -> None:
    """Write a file with the tensors of another one, one after the other.

    Args:
        source: the file that names, order, shapes and metadata are taken from.
        target: the file to write.
        dtypes: the new dtype of those tensors that get one; without any, the header stays byte for byte.
        changed: gives the blocks of a tensor, in its new dtype.

    Raises:
        OSError: the disk does not take it.
    """
    with target.open("wb") as file:
        file.write(_head(source, dtypes) if dtypes else source.head)
        for entry in source.entries:
            blocks = changed(entry)
            if blocks is None:
                for piece in source.pieces(entry):
                    file.write(piece)
            else:
                for block in blocks:
                    file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _head(source: WeightFile, dtypes: dict[str, str]) -> bytes:
    header: dict[str, Any] = {} if source.metadata is None else {"__metadata__": source.metadata}
    place = 0
    for entry in source.entries:
        new = entry.cast(dtypes.get(entry.name, entry.dtype), place)
        header[new.name] = {
            "dtype": new.dtype, "shape": list(new.shape), "data_offsets": [new.start, new.stop],
        }  # fmt: skip
        place = new.stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text
