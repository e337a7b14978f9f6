"""The script for a real card works, as far as a CPU can tell."""

import json

from benchmarks import gpu
from benchmarks.__main__ import main


def test_every_section_says_what_it_found(capsys, tmp_path):
    out = tmp_path / "lines.jsonl"
    assert main(["gpu", "--device", "cpu", "--tiny", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["section"] for line in lines if line.get("ok")] == [*gpu.SECTIONS]
    assert all(line["is_good"] for line in lines if "is_good" in line)
    assert {"parity", "alone", "resume", "cache"} == {line["section"] for line in lines if "is_good" in line}
    names, figures = (line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[-2:])
    assert len(names) == len(figures) > 4
    assert "samples/s" in figures[names.index(" steps 8x1 ")]
