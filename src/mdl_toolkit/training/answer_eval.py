"""Generate answers to evaluation examples while a run trains, and compare them with their references."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.tokenization import IGNORE_INDEX, ChatTokenizer
from mdl_toolkit.evaluation.text_metrics import SPACELESS, TEXT_METRICS, WORDLESS, TextMetric, are_mostly
from mdl_toolkit.inference.generate import Answerer, Question, ask, base_model, not_finite, prompt_of
from mdl_toolkit.utils.console import warn
from mdl_toolkit.utils.distributed import World

# An answer may have so many new tokens beyond twice its reference's.
EXTRA_TOKENS = 16


@dataclass(frozen=True, eq=False)
class AnswerEvaluator:
    """Compare a model's answers to evaluation examples with their references.

    Attributes:
        dataset: the examples, with labels.
        drawn: indices of the examples that are answered, in all processes together, `[drawn]`.
        share: indices of those that this process answers, `[share]`.
        tokenizer: the model's tokenizer.
        metric: what compares an answer with its reference.
    """

    dataset: ConvertedDataset
    drawn: NDArray[np.int64]
    share: NDArray[np.int64]
    tokenizer: ChatTokenizer
    metric: TextMetric

    @classmethod
    def of(
        cls, options: TrainOptions, dataset: ConvertedDataset | None, tokenizer: ChatTokenizer, world: World
    ) -> "AnswerEvaluator | None":
        """Prepare what `--eval-metric` asks for; None without the option or without evaluation examples."""
        if options.eval_metric is None or dataset is None:
            return None
        drawn = draw(dataset.token_counts, options.eval_samples, options.seed)
        if options.eval_metric == "wer":
            labels = (dataset.tokens(int(row)).labels for row in drawn)
            answers = (tokenizer.decode(each[each != IGNORE_INDEX].tolist()) for each in labels)
            if are_mostly(SPACELESS, answers):
                warn(WORDLESS)
        return cls(
            dataset, drawn, drawn[world.rank :: world.size], tokenizer, TEXT_METRICS[options.eval_metric]
        )

    def count(self, model: Any, batch_size: int, is_stopped: Callable[[], bool]) -> tuple[float, ...]:
        """Return sums over this process's examples: as `half_interval` of `evaluator` takes them.

        They are the metric's numerator and denominator, and their squares and product.

        Args:
            model: in evaluation mode.
            batch_size: the most answers that are generated together.
            is_stopped: tells whether to stop; then only the answers so far are counted.
        """
        references: dict[int, str] = {}

        def questions() -> Iterator[Question]:
            for index in map(int, self.share):
                sample = self.dataset[index]
                reference = sample.labels[sample.labels != IGNORE_INDEX]
                references[index] = self.tokenizer.decode(reference.tolist())
                yield Question(index, prompt_of(sample), 2 * len(reference) + EXTRA_TOKENS)

        sums, unanswered = np.zeros(5), list[int]()
        engine, alone = (Answerer(model, self.tokenizer, size).answers for size in (batch_size, 1))
        for index, answer in ask(engine, alone, questions()):
            if answer is None:
                unanswered.append(index)
            part, whole = self.metric.count(references.pop(index), answer or "")
            sums += part, whole, part**2, part * whole, whole**2
            if is_stopped():
                break
        if unanswered:
            warn(
                "evaluation: {count} {count:row has|rows have} no answer, which counts as an empty one "
                "(line {line} first): {reason}",
                count=len(unanswered),
                line=self.dataset.where(min(unanswered)),
                reason=not_finite(base_model(model).dtype),
            )
        return tuple(sums.tolist())


def draw(lengths: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Draw the indices of at most `count` examples, the same for the same seed, the longest first.

    Args:
        lengths: tokens of every example, `[examples]`.
        count: the most to draw.
        seed: of the random numbers.
    """
    indices = np.random.default_rng(seed).permutation(len(lengths))[:count]
    return indices[np.argsort(-lengths[indices], kind="stable")]
