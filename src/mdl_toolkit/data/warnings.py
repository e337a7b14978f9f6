"""Warnings that save a day: what is most likely not meant, said before hours are spent on it.

None of them ends a run. Audio is not decoded for any of them, and lengths decide what is looked at.
"""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import IGNORE_INDEX
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.utils.console import warn
from mdl_toolkit.weights.config_files import read_json, value_at
from mdl_toolkit.weights.schemas import MODEL_CONFIG

# Examples that a message names.
MOST_LEAKS_NAMED = 10
# The loss is judged after so many steps at least, and after this share of all steps; the losses of so many
# steps are compared at least; less than this share of the loss is no fall.
FEWEST_STEPS = 50
SHARE_OF_STEPS = 0.2
FEWEST_LOSSES = 20
LEAST_FALL = 0.02
# Less than this share of the loss is no fall in a run that is too short to be judged so.
LEAST_FALL_OF_FEW_STEPS = 0.1


def advise(train_set: ConvertedDataset, eval_set: ConvertedDataset | None) -> None:
    """Warn of properties of the datasets that are seldom intended."""
    warn_of_long_answers(train_set)
    warn_of_identical_answers(train_set)
    if eval_set is not None:
        warn_of_leaks(train_set, eval_set)


# --- the training set ----------------------------------------------------------------------------------


def warn_of_long_answers(dataset: ConvertedDataset) -> bool:
    """Warn if answers have more tokens than prompts without audio, on average; tell whether they have."""
    if not len(dataset):
        return False
    audio = np.fromiter(map(audio_token_count, dataset.audio_lengths.tolist()), np.int64, len(dataset))
    answer, prompt = (
        dataset.supervised_counts.mean(),
        (dataset.token_counts - dataset.supervised_counts - audio).mean(),
    )
    if is_long := bool(answer > prompt):
        warn(
            "answers are longer than prompts: {answer:.1f} tokens to {prompt:.1f}, mean of {count} rows; "
            "if they are not meant to be (transcripts are), see whether user_prompt and prediction have "
            "changed places",
            answer=answer,
            prompt=prompt,
            count=len(dataset),
        )
    return is_long


def warn_of_identical_answers(dataset: ConvertedDataset) -> bool:
    """Warn if all examples have one answer; tell whether they have. Reading ends at the first other one."""
    if len(dataset) < 2 or np.ptp(dataset.supervised_counts):
        return False
    first = answer_ids(dataset, 0)
    if not all(np.array_equal(first, answer_ids(dataset, row)) for row in range(1, len(dataset))):
        return False
    warn(
        "all {count} rows have the same answer: there is nothing to learn but that one; check the column "
        "prediction",
        count=len(dataset),
    )
    return True


def answer_ids(dataset: ConvertedDataset, row: int) -> NDArray[np.int32]:
    """Return the token ids of a row's answer."""
    labels = dataset.tokens(row).labels
    answer: NDArray[np.int32] = labels[labels != IGNORE_INDEX]
    return answer


def warn_beyond_positions(folder: Path, dataset: ConvertedDataset, remedy: Localized) -> None:
    """Warn of rows with more tokens than a model has learnt positions for: it computes, but no sense.

    Args:
        folder: the model's.
        dataset: the rows.
        remedy: what to do.
    """
    known = value_at(read_json(folder / MODEL_CONFIG), "text_config.max_position_embeddings")
    tokens = int(dataset.token_counts.max())
    if isinstance(known, int) and tokens > known:
        warn(
            "the longest row has {tokens:,} tokens, and {folder} has learnt no more than {known:,} "
            "positions: answers to such rows make no sense; {remedy}",
            tokens=tokens,
            folder=folder,
            known=known,
            remedy=remedy,
        )


# --- evaluation examples that are trained on ------------------------------------------------------------


@dataclass(frozen=True)
class Leaks:
    """List evaluation examples, from 0, whose recording is also trained on.

    Attributes:
        same: prompt and answer are a training example's too.
        other_text: no training example with this recording has both.
    """

    same: list[int] = field(default_factory=list)
    other_text: list[int] = field(default_factory=list)


def find_leaks(train_set: ConvertedDataset, eval_set: ConvertedDataset) -> Leaks:
    """Find evaluation examples whose recording is stored in the training set, byte by byte.

    Only recordings with as many samples and stored bytes as one of the other set are read.
    """
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for index in _of_common_size(train_set, eval_set):
        by_digest[_audio_digest(train_set, index)].append(index)
    leaks = Leaks()
    for index in _of_common_size(eval_set, train_set):
        others = by_digest.get(_audio_digest(eval_set, index), [])
        ids = eval_set.tokens(index).input_ids
        if any(np.array_equal(ids, train_set.tokens(other).input_ids) for other in others):
            leaks.same.append(index)
        elif others:
            leaks.other_text.append(index)
    return leaks


def _of_common_size(dataset: ConvertedDataset, other: ConvertedDataset) -> list[int]:
    """List examples with a recording as large as one of the other dataset; no recording is read."""
    lengths = np.intersect1d(dataset.audio_lengths, other.audio_lengths)
    ours, theirs = (
        np.flatnonzero(np.isin(each.audio_lengths, lengths)).tolist() for each in (dataset, other)
    )
    sizes = {_audio_size(other, row) for row in theirs}
    return [row for row in ours if _audio_size(dataset, row) in sizes]


def _audio_size(dataset: ConvertedDataset, row: int) -> tuple[int, int]:
    return int(dataset.audio_lengths[row]), len(dataset.encoded_audio(row))


def _audio_digest(dataset: ConvertedDataset, row: int) -> bytes:
    return hashlib.sha256(dataset.encoded_audio(row)).digest()


def warn_of_leaks(train_set: ConvertedDataset, eval_set: ConvertedDataset) -> bool:
    """Warn of evaluation examples whose recording is also trained on; tell whether there are any."""
    leaks = find_leaks(train_set, eval_set)
    kinds = (
        (leaks.same, Localized("with the same prompt and answer")),
        (leaks.other_text, Localized("with another prompt or answer")),
    )
    parts = [
        Localized(
            "{count} {kind} (line {lines})",
            count=len(indices),
            kind=kind,
            lines=", ".join(map(eval_set.where, indices[:MOST_LEAKS_NAMED]))
            + ", ..." * (len(indices) > MOST_LEAKS_NAMED),
        )
        for indices, kind in kinds
        if indices
    ]
    if parts:
        warn(
            "{count} of {rows} evaluation rows {count:has|have} a recording that is also trained on: "
            "{parts}; the evaluation looks better than it is, so take them out of one of the two",
            count=len(leaks.same) + len(leaks.other_text),
            rows=len(eval_set),
            parts=join_messages(parts, "{left}; {right}"),
        )
    return bool(parts)


# --- the loss ------------------------------------------------------------------------------------------


@dataclass
class LossWatch:
    """Warn once, when enough steps are made, if the loss has not fallen.

    The median of the last losses, which no single bad step moves, is compared with the mean of the first 20,
    which a loss that falls at once keeps high. Less than a fall by 2 % is none. It is judged after 50 steps,
    a fifth of all, and 20 beyond the warm-up, whichever is latest; a shorter run at its end, roughly.

    Attributes:
        total: steps of the run.
        warmup: over which the learning rate rises.
        rate: the learning rate, to be named.
        losses: of the steps so far, from the first.
    """

    total: int
    warmup: int
    rate: float
    losses: list[float] = field(default_factory=list)

    @property
    def due(self) -> int:
        """Return the step after which it judges."""
        return max(FEWEST_STEPS, math.ceil(SHARE_OF_STEPS * self.total), self.warmup + FEWEST_LOSSES)

    def see(self, step: int, loss: float) -> bool:
        """Add the loss of the next step; tell whether a warning was given."""
        self.losses.append(loss)
        # Losses are missing if the log of a run that is gone on with is not there.
        if step != self.due or len(self.losses) != step:
            return False
        count = max(FEWEST_LOSSES, min(step // 2, step - self.warmup))
        first, last = float(np.mean(self.losses[:FEWEST_LOSSES])), float(np.median(self.losses[-count:]))
        if last <= (1 - LEAST_FALL) * first:
            return False
        warn(
            "the loss does not fall: {first:.4f} in the first {window} steps, {last:.4f} in the last "
            "{count} up to step {step} of {total}; try another --lr than {rate:g}, and see whether the "
            "recordings decide the answers",
            first=first,
            window=FEWEST_LOSSES,
            last=last,
            count=count,
            step=step,
            total=self.total,
            rate=self.rate,
        )
        return True

    def end(self, step: int) -> bool:
        """Warn after the last step of a run too short to be judged before, if it has hardly learnt.

        Args:
            step: optimizer steps made.

        Returns:
            Whether a warning was given.
        """
        # A warm-up that does not end is warned of at the start.
        if not 0 < step < self.due or len(self.losses) != step or self.warmup >= self.total:
            return False
        count = max(1, min(FEWEST_LOSSES, step // 3))
        first, last = float(np.mean(self.losses[:count])), float(np.mean(self.losses[-count:]))
        if step > 1 and last <= (1 - LEAST_FALL_OF_FEW_STEPS) * first:
            return False
        warn(
            "{step} {step:step is|steps are} too few to learn much: the loss was {first:.4f} at first, "
            "{last:.4f} at last; give more --num-epochs, or a smaller --batch-size or "
            "--gradient-accumulation-steps",
            step=step,
            first=first,
            last=last,
        )
        return True
