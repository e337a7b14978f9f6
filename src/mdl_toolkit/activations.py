"""What a training step keeps in memory besides the weights, from shapes alone: nothing is computed.

Each term says what autograd saves it for. `tests/test_memory.py` holds them to what autograd really saves in
torch 2.13 and peft 0.21, tensor by tensor, and the sums to measured peaks. Not modelled: eager attention
(all we load use torch's fused one), evaluation, and what allocators add.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.model.configuration import MiDashengEncoderConfig, MiDashengLMConfig
from mdl_toolkit.model.lengths import audio_token_count, patch_count
from mdl_toolkit.model.modeling import MOST_LOGITS

FLOAT = 4  # bytes of a float32 number
# Bytes per sample of the front end at its widest: the padded waveform (4), and of each frame of 160 samples
# 257 complex numbers (12.85), their squares and the sum (3 x 6.43). Measured: 36.2.
FRONT_END = 36.2

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class BatchShape:
    """How much there is in one batch.

    Attributes:
        rows: clips, and rows of text.
        positions: of the longest row; the others are padded to it.
        supervised: positions that are learnt, in all rows together.
        samples: of the longest clip; the others are padded to it until the front end is done.
        patches: of all clips, without padding.
        padded: patches of all encoder chunks when they are padded to the longest, as attention needs them.
        audio_tokens: of all clips.
        is_even: all rows are equally long, so that attention in the decoder needs no mask.
    """

    rows: int
    positions: int
    supervised: int
    samples: int
    patches: int
    padded: int
    audio_tokens: int
    is_even: bool

    @staticmethod
    def of(
        positions: Integers, supervised: Integers, samples: Integers, config: MiDashengEncoderConfig
    ) -> "BatchShape":
        """The batch of some rows, by decoder positions, supervised positions and samples, `[rows]` each."""
        patches = [patch_count(n, config.hop_length, config.patch_frames) for n in samples.tolist()]
        chunks = sum(-(-n // config.chunk_patches) for n in patches)
        return BatchShape(
            len(positions), int(positions.max()), int(supervised.sum()), int(samples.max()), sum(patches),
            chunks * min(max(patches), config.chunk_patches),
            sum(audio_token_count(n, config.hop_length, config.patch_frames) for n in samples.tolist()),
            bool(positions.min() == positions.max()),
        )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What of the options decides what a step keeps.

    Attributes:
        targets: words of `--train-target`.
        rank: of the adapters.
        number: bytes of a number in matrix products: 4, or 2 under autocast to bfloat16.
        dropout_mask: bytes of a number's dropout mask: 0 without dropout, 1 on CUDA, 4 on a CPU.
        norm: bytes of a number in the encoder's norms; CUDA's autocast computes them in float32.
        checkpointing: layers are computed again in the backward pass.
        keeps_inputs: the decoder's base layers keep their inputs too, as those of 8 bits do.
    """

    targets: frozenset[str]
    rank: int
    number: int
    dropout_mask: int
    norm: int
    checkpointing: bool
    keeps_inputs: bool

    @property
    def copies_inputs(self) -> bool:
        """Every adapter keeps an input of its own: a cast or dropped-out one."""
        return self.number < FLOAT or self.dropout_mask > 0

    @property
    def casts(self) -> bool:
        """Under autocast an adapter's input is cast to float32, and then back."""
        return self.number < FLOAT


@dataclass(frozen=True)
class Gradients:
    """Bytes of the gradients, float32, of each target; they appear in the backward pass."""

    encoder: int = 0
    projector: int = 0
    decoder: int = 0
    embed_tokens: int = 0
    lm_head: int = 0

    @property
    def total(self) -> int:
        """Of all targets."""
        return self.encoder + self.projector + self.decoder + self.embed_tokens + self.lm_head


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of one batch, and the update after it.

    Attributes:
        config: the model's.
        batch: its shape.
        recipe: how it is trained.
        gradients: bytes of each target's gradients.
        has_earlier: gradients of an earlier batch of the same optimizer step are there all the time.
        update: bytes that the update itself needs for a moment.
        dequantized: bytes of the largest quantised matrix when it is a float one for a moment.
    """

    config: MiDashengLMConfig
    batch: BatchShape
    recipe: Recipe
    gradients: Gradients
    has_earlier: bool = False
    update: int = 0
    dequantized: int = 0

    @property
    def peak(self) -> int:
        """Most bytes at once, beyond weights, adapters and optimizer states."""
        return max(self.moments.values())

    @cached_property
    def moments(self) -> dict[str, int]:
        """Bytes at the moments that can be the peak: a backward pass frees layers while gradients grow."""
        found = self.gradients
        decoded = found.lm_head + found.decoder
        kept = self.kept_encoder + self.kept_projector
        decoder_first, decoder_last = self._ends(self.kept_decoder, self.config.parts[1].num_hidden_layers)
        encoder_first, encoder_last = self._ends(self.kept_encoder, self.config.parts[0].depth)
        moments = {
            "front end": (self.front_end, 0),
            "frozen encoder": (self.frozen_encoder, 0),
            "loss": (kept + self.kept_decoder + self.loss, 0),
            "decoder, last layer": (kept + decoder_last + self.decoder_work, found.lm_head),
            "decoder, first layer": (kept + decoder_first + self.decoder_work, decoded),
            "encoder, last block": (encoder_last + self.encoder_work, decoded + found.projector),
            "encoder, first block": (encoder_first + self.encoder_work, found.total - found.embed_tokens),
            "embeddings": (self.embeddings, found.total),
            "update": (self.update, found.total),
        }
        return {
            name: self.inputs + held + (found.total if self.has_earlier else new)
            for name, (held, new) in moments.items()
        }

    # --- which parts autograd goes through ---

    @property
    def _is_tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    @property
    def through_encoder(self) -> bool:
        """Something in the encoder is trained."""
        return "encoder" in self.recipe.targets

    @property
    def through_projector(self) -> bool:
        """Something in or before the projector is trained."""
        return bool({"encoder", "projector"} & self.recipe.targets)

    @property
    def trains_embeddings(self) -> bool:
        """Word embeddings are trained, be it as the output head's."""
        words = {"embed_tokens", "lm_head"} if self._is_tied else {"embed_tokens"}
        return bool(words & self.recipe.targets)

    @property
    def through_decoder(self) -> bool:
        """Something in or before the decoder is trained."""
        return self.through_projector or self.trains_embeddings or "decoder" in self.recipe.targets

    # --- what is kept from the forward to the backward pass ---

    @property
    def inputs(self) -> int:
        """The batch itself: waveforms in float32; ids, mask and labels in int64."""
        return self.batch.rows * (FLOAT * self.batch.samples + 3 * 8 * self.batch.positions)

    @cached_property
    def encoder_layer(self) -> int:
        """What one encoder block keeps when its adapters are trained."""
        config, batch, recipe = self.config.parts[0], self.batch, self.recipe
        dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        patch = (
            2 * recipe.norm * dim  # what norm1 and norm2 got
            + recipe.number * 3 * dim  # for lora_A of qkv, proj and fc1
            + recipe.number * 2 * hidden  # for the GELU, and for lora_A of fc2
            + recipe.number * 4 * recipe.rank  # for lora_B of the four
            + recipe.dropout_mask * (3 * dim + hidden)
        )
        # Attention sees chunks padded to the longest: q, k, v, what came of them, and a logarithm per head.
        padded = recipe.number * 4 * dim + FLOAT * config.num_heads
        return batch.patches * patch + batch.padded * padded

    @cached_property
    def kept_encoder(self) -> int:
        """What the encoder keeps: the inputs of its blocks, or all that they keep. Its last norm makes up
        for the first block's, whose input needs no gradient."""
        if not self.through_encoder:
            return 0
        config = self.config.parts[0]
        one = self.recipe.number * config.embed_dim * self.batch.patches
        return config.depth * (one if self.recipe.checkpointing else self.encoder_layer)

    @cached_property
    def kept_projector(self) -> int:
        """Between its two layers the GELU's input; with adapters also what their lora_A and lora_B get."""
        if not self.through_projector:
            return 0
        hidden = self.config.parts[1].hidden_size
        wide = self.config.parts[0].embed_dim * self.config.subsample_factor
        adapted = wide + hidden + 2 * self.recipe.rank if "projector" in self.recipe.targets else 0
        return self.batch.audio_tokens * self.recipe.number * (hidden + adapted)

    @cached_property
    def decoder_layer(self) -> int:
        """What one decoder layer keeps."""
        text, recipe, rows, positions = (
            self.config.parts[1],
            self.recipe,
            self.batch.rows,
            self.batch.positions,
        )
        position = (
            FLOAT * 2 * text.hidden_size  # both norms compute in float32
            + self._attention
            + recipe.number * 3 * text.intermediate_size  # for the SiLU, and both factors of its product
            + self._decoder_inputs
        )
        # Attention makes a mask of numbers out of the one of flags, anew in each layer.
        mask = 0 if self.batch.is_even else recipe.number * positions * positions
        return rows * (positions * position + mask)

    @property
    def _attention(self) -> int:
        """Per position: q, k, v, what came of them, and a logarithm per head."""
        query, key = self._widths
        # Under a mask, keys and values are repeated for every head.
        repeated = key if self.batch.is_even else query
        kept = self.recipe.number * (2 * query + 2 * repeated)
        # Qwen3 normalises q and k, head by head, in float32.
        norms = FLOAT * (query + key) if self.config.parts[1].model_type == "qwen3" else 0
        return kept + norms + FLOAT * int(self.config.parts[1].num_attention_heads)

    @property
    def _decoder_inputs(self) -> int:
        """Per position: what the adapters of the seven linear layers keep of their inputs."""
        text, recipe, (query, _) = self.config.parts[1], self.recipe, self._widths
        hidden, wide = text.hidden_size, text.intermediate_size
        shared = 2 * hidden + wide  # q, k, v share one input, gate and up another; o's is kept by attention
        own = 5 * hidden + query + wide
        lora = recipe.number * ((own if recipe.copies_inputs else shared) + 7 * recipe.rank)
        adapted = lora + recipe.dropout_mask * own if "decoder" in recipe.targets else 0
        is_kept = recipe.keeps_inputs and (recipe.copies_inputs or not adapted)
        return int(adapted + (recipe.number * shared if is_kept else 0))

    @property
    def _widths(self) -> tuple[int, int]:
        """Numbers in all queries, and in all keys, of a position."""
        text: Any = self.config.parts[1]
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return head * text.num_attention_heads, head * text.num_key_value_heads

    @cached_property
    def kept_decoder(self) -> int:
        """What the decoder keeps: the inputs of its layers, or all that they keep."""
        if not self.through_decoder:
            return 0
        text, batch = self.config.parts[1], self.batch
        number = FLOAT if self.trains_embeddings else self.recipe.number  # full copies are float32
        one = number * text.hidden_size * batch.rows * batch.positions
        layers = text.num_hidden_layers * (one if self.recipe.checkpointing else self.decoder_layer)
        return int(layers + FLOAT * text.hidden_size * batch.rows * batch.positions)  # the last norm's

    def _ends(self, kept: int, layers: int) -> tuple[int, int]:
        """What is kept when the backward pass comes to the first layer, and to the last one.

        With checkpointing the layer at hand is made again, beside its input.
        """
        return kept // layers, kept

    # --- what is needed for a moment ---

    @cached_property
    def front_end(self) -> int:
        """Waveforms to mel bins."""
        return int(FRONT_END * self.batch.rows * self.batch.samples)

    @cached_property
    def frozen_encoder(self) -> int:
        """Without a backward pass, the widest moment of a block: its MLP or its attention."""
        if self.through_encoder:
            return 0
        config, batch = self.config.parts[0], self.batch
        dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        # Input and norm, and before and after the GELU.
        mlp = batch.patches * (2 * dim + 2 * hidden)
        # Input, norm, q k v; and padded q, k, v and what came of them.
        attention = batch.patches * 5 * dim + batch.padded * 4 * dim
        return self.recipe.number * max(mlp, attention)

    @cached_property
    def loss(self) -> int:
        """Logits of the supervised positions: log-softmax, its gradient, and the logits' gradient."""
        vocabulary = self.config.parts[1].vocab_size
        at_once = min(self.batch.supervised, max(1, MOST_LOGITS // vocabulary))
        logits = FLOAT * at_once * vocabulary
        states = self.recipe.number * self.batch.supervised * self.config.parts[1].hidden_size
        head = self.gradients.lm_head
        if at_once < self.batch.supervised:  # slice by slice: the head's gradient is there from the second on
            return int(states + 3 * logits + head)
        return int(states + max(3 * logits, logits + head))

    @cached_property
    def embeddings(self) -> int:
        """A second gradient as large as the embeddings, which is added to the first."""
        if self._is_tied:  # the head's came before
            return self.gradients.lm_head
        return self.gradients.embed_tokens if self.has_earlier else 0

    @cached_property
    def decoder_work(self) -> int:
        """One layer on its way backwards, beyond what is kept of it."""
        if not self.through_decoder:
            return 0
        text, recipe, tokens = self.config.parts[1], self.recipe, self.batch.rows * self.batch.positions
        is_adapted = "decoder" in recipe.targets
        # At the product in the MLP: its two factors and the SiLU's input, and three gradients as wide; the
        # product itself, if it was kept, is gone by then. Under autocast down_proj's input is cast before.
        work = tokens * recipe.number * text.intermediate_size * (2 if is_adapted and not recipe.casts else 3)
        if is_adapted and recipe.casts:
            work += tokens * recipe.number * 5 * text.hidden_size
        again = self.decoder_layer if recipe.checkpointing else 0
        return int(work + again + self.dequantized)

    @cached_property
    def encoder_work(self) -> int:
        """One block on its way backwards, beyond what is kept of it."""
        if not self.through_encoder:
            return 0
        config, batch, recipe = self.config.parts[0], self.batch, self.recipe
        dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        if (
            recipe.casts
        ):  # the forward pass at fc2: its input, that in float32, and three as wide as the model
            mlp = batch.patches * (3 * hidden + 3 * dim)
        else:  # at the GELU: its gradient and the block's; its output is gone, another gradient in its place
            mlp = batch.patches * (hidden + dim)
        # At attention: gradients of q, k, v and of what came of them; much of the block is gone.
        attention = batch.padded * 4 * dim - batch.patches * (dim + 2 * hidden)
        again = self.encoder_layer if recipe.checkpointing else 0
        return recipe.number * max(mlp, attention) + again
