"""Fine-tune MiDashengLM on your own recordings: convert, train, merge, predict.

Importing this package imports nothing heavy; each name below brings its room along when first used.
"""

import logging
from importlib import import_module

__version__ = "0.2.0.dev0"

_ROOM_OF = {
    "ConvertOptions": "options",
    "TrainOptions": "training_options",
    "InferenceOptions": "result_options",
    "MergeOptions": "result_options",
    "EvaluateOptions": "result_options",
    "ReportOptions": "result_options",
    "convert_dataset": "conversion",
    "train": "training",
    "infer": "inference",
    "merge_adapter": "merging",
    "evaluate": "evaluation",
    "report": "report",
    "ToolkitError": "errors",
}

__all__ = ["__version__", *_ROOM_OF]

# bitsandbytes says on import that it did not find kernels of the hub; it works without them. It comes along
# with transformers' Trainer, so this must be said before anything else is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
