"""Fine-tune MiDashengLM on your own recordings: convert, train, merge, predict.

Importing this package imports nothing heavy; each name below brings its module along when first used.
"""

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


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
