"""What a terminal shows of how far a piece of work has come."""

import io
import re

import pytest

from mdl_toolkit.utils.console import progress

NOTE = "loss 0.1234, lr 0.0001, 12 samples/s, 321x"


class Terminal(io.StringIO):
    """A terminal that keeps all it was sent."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("width", "shown"), [(60, "loss"), (80, "loss 0.1234, lr 0.0001"), (120, NOTE)])
def test_in_a_narrow_terminal_only_the_note_is_cut(monkeypatch, width, shown):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress(12_000, "training") as bar:
        bar.advance(1000, NOTE)
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue()).rstrip().splitlines()[-1]
    assert re.search(r"^training .*1000/12000 .* 0:00:\d\d +(-|\d+):", last)
    assert shown in last
    assert len(last) <= width
