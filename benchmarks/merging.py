"""Merging: time against copying the base's files, and peak memory against its largest shard.

A base of three shards of bfloat16 matrices, all of which an adapter of rank 32 changes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import Figure, timed
from mdl_toolkit.utils.files import fsync
from mdl_toolkit.weights.merge import merge

RUNS = 5
WIDTH, SHARDS, PER_SHARD, RANK = 3584, 3, 10, 32  # shards of 257 MB; the 7B's width

_PEAK = """
import sys
from pathlib import Path
from benchmarks.merging import peak_growth
print(peak_growth(*map(Path, sys.argv[1:])))
"""


def figures() -> list[Figure]:
    """Two lines of time, one of memory."""
    with tempfile.TemporaryDirectory() as place:
        base, adapter, output = _prepared(Path(place))

        def ours() -> None:
            merge(base, adapter, _emptied(output))

        def copying() -> None:
            shutil.copytree(base, _emptied(output), dirs_exist_ok=True)

        def lasting(work: Callable[[], None]) -> Callable[[], None]:
            return lambda: (work(), _to_disk(output))[0]

        what = f"merging {SHARDS} shards of bfloat16, rank {RANK}"
        cached = timed(f"{what}; other: copying the files, into the page cache", ours, copying, RUNS)
        stored = timed(
            f"{what}; other: copying the files, to the disk", lasting(ours), lasting(copying), RUNS
        )
        words = [sys.executable, "-c", _PEAK, str(base), str(adapter), str(_emptied(output))]
        here = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        shard = max(file.stat().st_size for file in base.glob("*.safetensors"))
        memory = Figure(
            f"{what}; other: the largest shard; memory beyond the libraries' (one run)",
            f"{here / 1e6:.0f} MB", f"{shard / 1e6:.0f} MB", shard / here,
        )  # fmt: skip
    return [cached, stored, memory]


def peak_growth(base: Path, adapter: Path, output: Path) -> int:
    """Bytes by which merging raises the most memory that this process ever had (VmHWM)."""
    torch.set_num_threads(1)
    torch.zeros(8, 8).addmm_(torch.zeros(8, 8), torch.zeros(8, 8))  # what is loaded at the first use
    before = _peak()
    merge(base, adapter, output)
    return _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _to_disk(folder: Path) -> None:
    for file in folder.iterdir():
        fsync(file)


def _prepared(place: Path) -> tuple[Path, Path, Path]:
    base, adapter = place / "base", place / "adapter"
    base.mkdir()
    adapter.mkdir()
    torch.manual_seed(0)
    names = [f"layers.{number}" for number in range(SHARDS * PER_SHARD)]
    for shard in range(SHARDS):
        part = {f"{name}.weight": torch.randn(WIDTH, WIDTH).bfloat16() for name in names[shard::SHARDS]}
        save_file(part, base / f"model-{shard}.safetensors")
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    state = {
        f"base_model.model.{name}.lora_{side}.weight": torch.randn(shape)
        for name in names
        for side, shape in shapes.items()
    }
    save_file(state, adapter / "adapter_model.safetensors")
    (base / "config.json").write_text("{}", encoding="utf-8")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return base, adapter, place / "out"


def _emptied(output: Path) -> Path:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    return output
