"""Keep a run's output folder: check it, tidy it, set aside an earlier run, bring the best checkpoint."""

import re
import shutil
from pathlib import Path

from mdl_toolkit.config.options import spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import weighted_paths
from mdl_toolkit.config.yaml import SETTINGS_FILE, to_yaml
from mdl_toolkit.errors import InputError
from mdl_toolkit.training.checkpoints import (
    Checkpoint,
    checkpoint_of,
    checkpoints,
    is_checkpoint,
    save_state,
    step_of,
)
from mdl_toolkit.utils.console import say, warn
from mdl_toolkit.utils.files import (
    check_apart,
    recover_outputs,
    refuse_devices,
    replace_file,
    report_write_errors,
)
from mdl_toolkit.utils.ownership import maker, refuse, unused, visible
from mdl_toolkit.utils.run_folder import LOG, PLOT, REPORT
from mdl_toolkit.weights.provenance import PROVENANCE_FILE, Provenance
from mdl_toolkit.weights.resolve import FINAL
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG, MODEL_CONFIG

OUTPUT_FILES = (FINAL, SETTINGS_FILE, PROVENANCE_FILE, LOG, PLOT, REPORT)
# Names of what was moved away, and the folder of TensorBoard.
_MOVED = re.compile(r"(.+\.)?previous-\d+|runs")


# The folder that transformers gives TensorBoard.
RUNS = "runs"


def check_run_folder(output: Path, options: TrainOptions) -> None:
    """Refuse an output folder that holds a model or what the run reads, and data that are not there.

    Raises:
        InputError: naming the option.
    """
    if output.is_file():
        raise InputError("--output {output}: a file is there", output=output)
    refuse_devices(output, InputError)
    if any((output / name).exists() for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        raise InputError(
            "--output {output}: a checkpoint or a model is there; give the folder of a run, or a new one",
            output=output,
        )
    shown = visible(output) if output.is_dir() else []
    others = [path for path in shown if path.name not in OUTPUT_FILES and not _MOVED.fullmatch(path.name)]
    others = [path for path in others if not is_checkpoint(path)]
    # What else lies in the folder of a run that goes on stays where it is.
    # Checkpoints tell by their own checksums what they are, also where they were moved to.
    goes_on = bool(options.resume_from_checkpoint) and any(map(is_checkpoint, shown))
    if shown and maker(output) != options.COMMAND and not goes_on:
        refuse(output, [*others, *shown][0], options.COMMAND)
    if others and not options.resume_from_checkpoint:
        refuse(output, others[0], options.COMMAND)
    for folder in map(Path, filter(None, (options.model_name, options.adapter))):
        if folder.is_dir():
            check_apart(output, folder)
    for option in ("train_dataset", "eval_dataset"):
        for path in map(Path, weighted_paths(getattr(options, option))):
            if not path.exists():
                name = spelling(option)
                raise InputError("{name} {value}: no such file or folder", name=name, value=path)
            data = path.resolve()
            if data == output.resolve() or data in output.resolve().parents:
                check_apart(output, path)


def tidy_output(output: Path) -> None:
    """Remove what a killed run left half-written, and put back what it had moved away to replace it."""
    recover_outputs(output, FINAL, LOG, PLOT, REPORT, "checkpoint-*", kind="train")


def prepare_output(
    options: TrainOptions, origin: Provenance, resumed: Checkpoint | None, best: int | None
) -> None:
    """Set aside what is not resumed; write the settings, and the origin of the checkpoints to come.

    A checkpoint of another folder is copied into this one, and with `--keep-best` the best one beside it too.

    Args:
        options: the run's.
        origin: of its checkpoints.
        resumed: the checkpoint that it goes on from.
        best: step of the best evaluation so far.

    Raises:
        InputError: the folder cannot be written.
    """
    output = Path(options.output)
    if options.resume_from_checkpoint is True and resumed is None:
        warn("no complete checkpoint in {output}: starting afresh", output=output)
    with report_write_errors(f"--output {output}", InputError):
        if previous := set_aside(output, resumed):
            say("what an earlier run left is now in {place}", place=previous)
        if resumed is not None and not is_own(resumed, output):
            steps = {resumed.step, best} if options.keep_best else {resumed.step}
            for step in steps - {None}:
                folder = (
                    resumed.folder
                    if step == resumed.step
                    else checkpoint_of(resumed.folder.resolve().parent, step)
                )
                save_state(output, Checkpoint.at(folder), {})
        for name, text in ((SETTINGS_FILE, to_yaml(options)), (PROVENANCE_FILE, origin.to_json())):
            with replace_file(output / name, options.COMMAND) as work:
                work.write_text(text, encoding="utf-8")


def is_own(checkpoint: Checkpoint, output: Path) -> bool:
    """Tell whether a checkpoint lies where a run with this output would have saved it."""
    return checkpoint.folder.resolve() == checkpoint_of(output, checkpoint.step).resolve()


def set_aside(output: Path, resumed: Checkpoint | None = None) -> Path | None:
    """Move what an earlier run left into `previous-N/`, whole.

    Of the run that is resumed, only checkpoints after the one resumed from are moved.

    Returns:
        The new folder; None when there is nothing to move.
    """
    if resumed is not None and is_own(resumed, output):
        paths = [path for path in checkpoints(output) if step_of(path) > resumed.step]
    else:
        paths = [path for path in output.glob("*") if path.name in OUTPUT_FILES or is_checkpoint(path)]
        # TensorBoard's.
        paths += [output / RUNS] if any((output / RUNS).glob("*/events.out.tfevents.*")) else []
    if {path.name for path in paths} <= {SETTINGS_FILE, PROVENANCE_FILE}:
        return None
    previous = unused(output / "previous")
    previous.mkdir()
    for path in paths:
        path.rename(previous / path.name)
    # The resumed run keeps the lines of the steps before; here all of them stay.
    if resumed is not None and not (previous / LOG).exists() and (output / LOG).is_file():
        shutil.copyfile(output / LOG, previous / LOG)
    return previous
