"""A server with a tiny model and an adapter of it, for all tests here."""

from pathlib import Path

import pytest

from mdl_toolkit import demo
from mdl_toolkit.weights.provenance import Base, Prompts, Provenance
from tests.support.adapters import make_adapter
from tests.support.serving import Served

PROMPTS = Prompts("Listen well.", demo.PROMPT)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with recordings, a base that knows nothing, and an adapter that knows its prompts."""
    folder = tmp_path_factory.mktemp("serving")
    demo.lay_out_phrases(folder / "phrases", folder)
    demo.make_tiny_model(folder / "model", folder / "phrases", seed=1)
    make_adapter(folder / "model", folder / "adapter")
    base = Base.of(folder / "model", str(folder / "model"))
    Provenance(base, PROMPTS).write(folder / "adapter")
    return folder


@pytest.fixture(scope="session")
def served(place):
    """The server; it is stopped by Ctrl-C at the end, and takes that well."""
    server = Served(
        str(place / "model"), "--adapter", f"tuned={place / 'adapter'}", "--max-new-tokens", "200",
        "--batch-size", "6", "--max-request-mb", "2", "--max-audio-seconds", "20",
    )  # fmt: skip
    yield server
    assert server.close() == 130
