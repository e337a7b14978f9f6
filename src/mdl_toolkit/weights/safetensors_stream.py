"""Read and write safetensors files as streams, tensor by tensor in the order of their bytes.

Nothing is memory-mapped, and tensors are read in blocks, so that memory does not grow with the file.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.files import parse_json
from mdl_toolkit.utils.schema import TEXT, Rule, integer, list_of, mapping_of, object_of, required

SUFFIX = ".safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes computed or copied at once. A block and its result stay in a core's cache.
BLOCK = 1 << 20
# Bytes before the header that hold its length.
_LENGTH = 8
# What stands in place of a file's content where git-lfs has not fetched it.
_POINTER = b"version https://git-lfs"
# The most bytes of a header, as in the safetensors library.
_LONGEST_HEADER = 100 << 20
# Bytes of a number; some rarer types have fractions of one.
WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_OFFSET = integer(0, 2**62)
_OFFSETS = Rule(
    Localized("a list of two"), lambda value: isinstance(value, list) and len(value) == 2, item=_OFFSET
)
_HEADER = mapping_of(
    object_of(
        {"dtype": required(TEXT), "shape": required(list_of(integer())), "data_offsets": required(_OFFSETS)}
    )
)


@dataclass(frozen=True)
class TensorEntry:
    """Describe a tensor of a file: an entry of the header.

    Attributes:
        name: the tensor's name.
        dtype: as the format spells it, `BF16` for example.
        shape: the tensor's shape.
        start: offset of its first byte from the end of the header.
        stop: offset of the byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one index of the first dimension; 1 in an empty tensor."""
        size = self.stop - self.start
        return size // (self.shape[0] if self.shape else 1) if size else 1


def parse_header(text: bytes) -> tuple[Any, tuple[TensorEntry, ...]]:
    """Parse the header of a safetensors file.

    Returns:
        Its metadata, and the tensors in the order of their bytes.

    Raises:
        ValueError: it is no header, or the tensors' bytes do not follow each other as their shapes want it.
    """
    header = parse_json(text)
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if fault := _HEADER.fault("header", header):
        raise ValueError(fault.en)
    entries = [
        TensorEntry(name, each["dtype"], tuple(each["shape"]), *each["data_offsets"])
        for name, each in header.items()
    ]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    stop = 0
    for entry in entries:
        size = WIDTHS.get(entry.dtype, 0) * math.prod(entry.shape)
        if entry.start != stop or (entry.dtype in WIDTHS and entry.stop != stop + size):
            raise ValueError(f"the bytes of {entry.name} are not where they should be")
        stop = entry.stop
    return metadata, tuple(entries)


@dataclass(frozen=True)
class WeightFile:
    """Hold the header of a safetensors file.

    Attributes:
        path: the file.
        head: the length of the header and the header itself, byte for byte.
        metadata: the header's; None where it has none.
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
            ModelError: it is no safetensors file, or it is not complete.
        """
        try:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise ModelError(
                        "{path}: a git-lfs pointer, not the weights; run `git lfs pull` in {folder}",
                        path=path,
                        folder=path.parent,
                    )
                file.seek(0)
                length = file.read(_LENGTH)
                size = int.from_bytes(length, "little")
                if len(length) < _LENGTH or size > _LONGEST_HEADER:
                    raise ValueError("no header")
                text = file.read(size)
            metadata, entries = parse_header(text)
            actual = path.stat().st_size - _LENGTH - size
            promised = entries[-1].stop if entries else 0
            if promised != actual:
                raise ValueError(f"{actual} bytes of tensors, {promised} promised")
        except (OSError, ValueError) as problem:
            raise ModelError(
                "{path}: no whole safetensors file ({reason}); fetch it again", path=path, reason=problem
            ) from problem
        return WeightFile(path, length + text, metadata, entries)

    def read(self, entry: TensorEntry) -> Tensor:
        """Read a whole floating-point tensor."""
        blocks = self.rows(entry, max(1, entry.stop - entry.start))
        return next(blocks, torch.empty(entry.shape, dtype=FLOATS[entry.dtype])).reshape(entry.shape)

    def rows(self, entry: TensorEntry, size: int = BLOCK) -> Iterator[Tensor]:
        """Yield a floating-point tensor in blocks of rows, `[rows, ...]`, of about so many bytes each."""
        step = max(1, size // entry.row_bytes) * entry.row_bytes
        for block in self.blocks(entry, step):
            yield torch.from_numpy(block).view(FLOATS[entry.dtype]).reshape(-1, *entry.shape[1:])

    def blocks(self, entry: TensorEntry, size: int = BLOCK) -> Iterator[NDArray[np.uint8]]:
        """Yield a tensor's bytes in blocks of so many."""
        for start in range(entry.start, entry.stop, size):
            yield self._bytes(start, min(size, entry.stop - start))

    def sample(self, entry: TensorEntry, size: int) -> bytes:
        """Read the first, middle and last bytes of a tensor, so many each."""
        last = max(entry.start, entry.stop - size)
        starts = (entry.start, (entry.start + last) // 2, last)
        return b"".join(self._bytes(start, min(size, entry.stop - entry.start)).tobytes() for start in starts)

    def _bytes(self, start: int, count: int) -> NDArray[np.uint8]:
        """Read so many bytes of the tensors."""
        block = np.fromfile(self.path, np.uint8, count, offset=len(self.head) + start)
        if len(block) < count:
            raise OSError(f"{self.path} ends too early")
        return block

    def recast(self, dtypes: Mapping[str, str]) -> bytes:
        """Encode the header, its length included, with tensors in other dtypes; without any, as it is.

        Args:
            dtypes: the new ones by name of the tensor, as the format spells them.
        """
        if not dtypes:
            return self.head
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        offset = 0
        for entry in self.entries:
            start, dtype = offset, dtypes.get(entry.name, entry.dtype)
            offset += entry.stop - entry.start
            if dtype != entry.dtype:
                offset = start + math.prod(entry.shape) * FLOATS[dtype].itemsize
            header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, offset]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH)
        return len(text).to_bytes(_LENGTH, "little") + text


def weight_files(folder: Path) -> list[WeightFile]:
    """Open the weights of a model folder, in the order of the files' names.

    Raises:
        ModelError: a file is damaged.
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


# A function that gives a tensor's new content in blocks, or None to keep its bytes as they are.
Blocks = Callable[[TensorEntry], "Iterator[Tensor] | None"]


def rewrite(source: WeightFile, target: Path, dtypes: dict[str, str], changed: Blocks) -> None:
    """Copy a file tensor by tensor, with new content for some.

    Args:
        source: the file that names, order, shapes and metadata are taken from.
        target: the file to write.
        dtypes: new dtypes by name of the tensor; without any, the header stays byte for byte.
        changed: gives the blocks of a tensor, in its new dtype.

    Raises:
        OSError: the file cannot be written.
    """
    with target.open("wb") as file:
        file.write(source.recast(dtypes))
        for entry in source.entries:
            blocks = changed(entry)
            if blocks is None:
                file.writelines(block.data for block in source.blocks(entry))
            else:
                file.writelines(
                    block.contiguous().reshape(-1).view(torch.uint8).numpy().data for block in blocks
                )
