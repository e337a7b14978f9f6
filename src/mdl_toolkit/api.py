"""Join packages that know nothing of each other: `check` with a forecast, `evaluate` with a page."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdl_toolkit.config.data import CheckOptions
    from mdl_toolkit.config.evaluation import EvaluateOptions
    from mdl_toolkit.data.check.findings import Figures
    from mdl_toolkit.evaluation.results import Evaluation


def check(options: "CheckOptions") -> "Figures":
    """Look at all rows of all files, forecast the training on them, and report on standard output.

    Returns:
        What was found, as the JSON has it.

    Raises:
        InputError: something would stop a training; or a CSV or a file to write cannot be used.
        ModelError: the model's folder is here, and broken.

    Example:
        ```python
        from mdl_toolkit import CheckOptions, check

        found = check(CheckOptions(input="train.csv", model_name="midashenglm-7b", base_dir="recordings"))
        print(found["files"][0]["rows"])
        ```
    """
    from mdl_toolkit.data.check.run import check

    if options.for_inference:
        return check(options)
    from mdl_toolkit.training.memory.forecast import forecast_training

    return check(options, forecast_training)


def evaluate(options: "EvaluateOptions") -> "Evaluation":
    """Compare predictions with references, and write what `--output` and `--report` name.

    Raises:
        UsageError: `map` without `--label-separator`.
        InputError: files that cannot be read, joined or written; a column that is not there.

    Example:
        ```python
        from mdl_toolkit import EvaluateOptions, evaluate

        evaluation = evaluate(
            EvaluateOptions(input="predictions.csv", reference="test.csv", output=("evaluation.json",))
        )
        for figure in evaluation.metrics:
            print(figure.metric, figure.value, figure.low, figure.high)
        ```
    """
    from mdl_toolkit.evaluation.evaluate import evaluate

    evaluation = evaluate(options)
    if options.report is not None:
        from mdl_toolkit.reporting.report import report_evaluation

        report_evaluation(evaluation, options)
    return evaluation
