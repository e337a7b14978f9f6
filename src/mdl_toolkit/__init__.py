"""Fine-tune MiDashengLM on your own recordings: convert, train, merge, predict.

Importing this package imports nothing heavy; each name below brings its module along when first used.
"""

import logging
from importlib import import_module

__version__ = "0.2.0.dev0"

_MODULE_OF = {
    "ConvertOptions": "config.data",
    "CheckOptions": "config.data",
    "SplitOptions": "config.data",
    "TrainOptions": "config.train",
    "InferenceOptions": "config.inference",
    "MergeOptions": "config.train",
    "EvaluateOptions": "config.evaluation",
    "ReportOptions": "config.evaluation",
    "convert_dataset": "data.convert.run",
    "split_dataset": "data.split",
    "train": "training.run",
    "infer": "inference.run",
    "merge_adapter": "training.merge",
    "check": "api",
    "evaluate": "api",
    "report": "reporting.report",
    "ToolkitError": "errors",
}

__all__ = ["__version__", *_MODULE_OF]

# bitsandbytes says on import that it did not find kernels of the hub; it works without them. It comes along
# with transformers' Trainer, so this must be said before anything else is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
