"""Model folders and adapters, spoilt: configurations, tokenizers, templates, weights, kinds of files."""

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np

from tests.stress.fuzz.cases import STRANGE, Case, spoil_bytes, spoil_json
from tests.support.adapters import adapted
from tests.support.paths import MODEL

TEMPLATES = (
    "", "{{", "{% for m in messages %}", "{{ raise_exception('no') }}", "{{ messages[99].content }}",
    "x" * 100_000,
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ ''.__class__.__mro__ }}",
    "{{ 1/0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages }}", "<|im_start|>", "\x00\x1b[2J",
    "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "{{ cycler.__init__.__globals__ }}", "{{ range(10**12) | list }}", "{{ '%99999999999d' % 1 }}",
    "no audio at all",
)  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1035104\n"


def make_shared(folder: Path) -> None:
    """Make an adapter and one row to answer, once for all cases."""
    adapted(MODEL, folder / "adapter", target_modules=["q_proj", "down_proj", "qkv"])


def make(folder: Path, shared: Path, random: np.random.Generator) -> Case:
    """Return a case of a command that reads a spoilt model folder or adapter."""
    (folder / "rows.csv").write_text(f"audio\n{shared / 'good-0.wav'}\n")
    has_adapter = random.integers(4) == 0
    source = shared / "adapter" if has_adapter else MODEL
    model = folder / "model"
    shutil.copytree(source, model, copy_function=os.link)
    if has_adapter:
        _edit_json(
            model / "adapter_config.json", lambda config: config.update(base_model_name_or_path=str(MODEL))
        )
    spoilt = spoil_file(model, random)
    inference = [
        "inference",
        "rows.csv",
        "--output",
        "out.csv",
        "--model-name",
        "model",
        "--max-length",
        "60",
    ]
    inference += ["--user-prompt", "What?", "--num-workers", "1"]
    merge = [
        "merge",
        "model",
        "--output",
        "merged",
        *(["--model-name", str(MODEL)] if random.integers(2) else []),
    ]
    check = ["check", "rows.csv", "--for-inference", "--model-name", "model", "--num-workers", "1"]

    def notices(status: int, said: str) -> str:
        """Weights that are not numbers must be noticed by who multiplies with them."""
        return "" if status or not any(word in spoilt for word in ("NaN", "of type I")) else "not noticed"

    if random.integers(8) == 0:
        return Case(folder, check, spoilt)
    return Case(folder, merge if has_adapter and random.integers(2) else inference, spoilt, check=notices)


def spoil_file(model: Path, random: np.random.Generator) -> str:
    """Spoil one file of a folder, which is another file afterwards (the others may be links), and say how."""
    files = sorted(path for path in model.rglob("*") if path.is_file())
    weighted = [
        path for path in files for _ in range(6 if path.name in {"config.json", "adapter_config.json"} else 2)
    ]
    path = weighted[random.integers(len(weighted))]
    content = path.read_bytes()
    path.unlink()
    kind = random.integers(12)
    if kind == 0:
        return f"{path.name} is missing"
    if kind == 1:
        return f"{path.name} is {_put_in_place(path, random)}"
    if path.suffix == ".jinja":
        template = TEMPLATES[random.integers(len(TEMPLATES))]
        path.write_text(template)
        return f"{path.name}: {template[:40]!r}"
    if path.suffix == ".json" and kind < 9:
        value = json.loads(content)
        how = [spoil_json(value, random) for _ in range(random.integers(1, 3))]
        path.write_text(json.dumps(value))
        return f"{path.name}: {' and '.join(how)}"
    if path.suffix == ".safetensors" and kind < 9:
        spoilt, how = _spoil_weights(content, random)
    else:
        spoilt, how = spoil_bytes(content, random)
    path.write_bytes(spoilt)
    # Zeros may have come where there were zeros.
    return f"{path.name}: {how}" if spoilt != content else "nothing"


def _put_in_place(path: Path, random: np.random.Generator) -> str:
    match random.integers(6):
        case 0:
            path.mkdir()
            return "a folder"
        case 1:
            os.mkfifo(path)
            return "a FIFO"
        case 2:
            path.symlink_to("/dev/zero")
            return "a link to a device"
        case 3:
            path.symlink_to(path.name)
            return "a link to itself"
        case 4:
            path.write_bytes(POINTER)
            return "a git-lfs pointer"
        case _:
            depth = 100_000
            path.write_text("[" * depth + "]" * depth)
            return "deep JSON"


def _spoil_weights(content: bytes, random: np.random.Generator) -> tuple[bytes, str]:
    """Spoil the header of a safetensors file, or put numbers into a tensor that are none."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    # Neither the metadata nor a count of batches.
    names = [name for name, entry in header.items() if entry.get("dtype", "I64") != "I64"]
    name = names[random.integers(len(names))]
    entry = header[name]
    begin, end = entry["data_offsets"]
    match random.integers(7):
        case 0:
            width = 4 if entry["dtype"] == "F32" else 2
            wrong = b"\xff" * width if random.integers(2) else (b"\x00\x00\x80\x7f", b"\x80\x7f")[width == 2]
            data[begin : begin + len(wrong)] = wrong
            how = f"{name} holds NaN or Inf"
        case 1:
            entry["dtype"] = {"F32": "I32", "BF16": "I16", "F16": "I16"}.get(entry["dtype"], "F64")
            how = f"{name} is of type {entry['dtype']}"
        case 2:
            entry["shape"] = [*entry["shape"][::-1], 1]
            how = f"{name} has another shape"
        case 3:
            entry["data_offsets"] = [begin, int(random.choice([0, end * 2, 2**60]))]
            how = f"{name} has other offsets"
        case 4:
            header[f"{name}.extra"] = header.pop(name)
            how = f"{name} has another name"
        case 5:
            del header[name]
            how = f"{name} is not in the header"
        case _:
            entry[str(random.choice(["dtype", "shape", "data_offsets"]))] = STRANGE[
                random.integers(len(STRANGE))
            ]
            how = f"{name}: a strange entry"
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + bytes(data), how


def _edit_json(path: Path, edit) -> None:
    """Change a JSON file that may be a link to one that others read."""
    value = json.loads(path.read_text())
    edit(value)
    path.unlink()
    path.write_text(json.dumps(value))
