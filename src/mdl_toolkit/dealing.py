"""Whether the rows of a batch are computed in lanes, side by side on a CPU, and which row in which lane.

Threads that share every operation wait for each other at its end, and all for the one that does what is no
operation. Threads with rows of their own do not: on two cores a step takes 3 to 8 % less
(`benchmarks/HISTORY.md`). What rows share, such as a system prompt, is computed in every lane; whether that
is worth it is decided for each batch, by its arithmetic.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mdl_toolkit.lora import FULL_TARGETS
from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.training_options import TrainOptions

Integers = NDArray[np.int64]

LANES = 2  # more were not measured
WORTH = 0.04  # of a batch's arithmetic: so much more is made up for


@dataclass(frozen=True)
class Dealing:
    """What decides about lanes.

    Attributes:
        lanes: that there are; with one, batches are computed whole.
        position: arithmetic of a position in the decoder, in any unit.
        sample: arithmetic of a sample of audio in the encoder, in the same unit.
        beginning: positions that all rows have in common, computed once in each lane.
    """

    lanes: int = 1
    position: float = 1.0
    sample: float = 0.0
    beginning: int = 0

    @staticmethod
    def of(
        config: MiDashengLMConfig, options: TrainOptions, device: torch.device, dtype: torch.dtype,
        quantization: str | None, beginning: int,
    ) -> "Dealing":  # fmt: skip
        """For a run, as it is going to be computed.

        One lane where random numbers are drawn, whose order would be anyone's; where layers keep a state of
        their own (bitsandbytes) or autocast a cache for all threads; and where a gradient is as large as a
        vocabulary, as each lane has its own.
        """
        drops = options.lora_dropout > 0 or config.parts[1].attention_dropout > 0
        is_full = any(target in FULL_TARGETS for target in options.train_target)
        is_plain = device.type == "cpu" and dtype == torch.float32 and quantization is None
        if torch.get_num_threads() % LANES or drops or is_full or not is_plain:
            return WHOLE
        return Dealing(LANES, *_arithmetic(config, options), beginning)

    def deal(self, positions: Integers, samples: Integers) -> list[Integers]:
        """The rows of each lane, or all in one where lanes would take longer.

        Args:
            positions: of each row of a batch in the decoder, `[rows]`.
            samples: of each row's audio, `[rows]`.
        """
        costs = self.position * (positions - self.beginning) + self.sample * samples
        loads = np.full(self.lanes, self.position * self.beginning)
        whole = loads[0] + costs.sum()
        lane_of = np.zeros(len(costs), dtype=np.int64)
        for row in (-costs).argsort(kind="stable"):  # the largest first, to where the least is
            lane_of[row] = loads.argmin()
            loads[lane_of[row]] += costs[row]
        if len(costs) < self.lanes or loads.max() * self.lanes > (1 + WORTH) * whole:
            return [np.arange(len(costs))]
        return [np.flatnonzero(lane_of == lane) for lane in range(self.lanes)]


WHOLE = Dealing()


def _arithmetic(config: MiDashengLMConfig, options: TrainOptions) -> tuple[float, float]:
    """Of a position and of a sample: multiplications in matrices, back as often as forwards."""
    audio, text = config.parts
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, key = text.num_attention_heads * head, text.num_key_value_heads * head
    layer = text.hidden_size * (2 * query + 2 * key + 3 * text.intermediate_size)
    block = audio.embed_dim**2 * (4 + 2 * audio.mlp_ratio)
    is_kept = options.cache_audio_features and options.num_epochs > 1  # features of each row
    passes = 0 if is_kept else 2 if "encoder" in options.train_target else 1
    per_sample = passes * audio.depth * block / (audio.hop_length * audio.patch_frames)
    return 2.0 * text.num_hidden_layers * layer, per_sample
