"""Folders that tests read: the repository, golden numbers and checkpoints, the shipped phrases."""

from pathlib import Path

import mdl_toolkit

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
GOLDEN = ROOT / "tests/golden"
CHECKPOINTS = GOLDEN / "checkpoints"
MODEL = CHECKPOINTS / "A-small"
PACKAGE = Path(mdl_toolkit.__file__).parent
PHRASES = PACKAGE / "phrases"
