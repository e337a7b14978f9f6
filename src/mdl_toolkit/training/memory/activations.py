"""Estimate the activation memory of a step, from shapes and lengths alone.

For each token or patch and layer, it is what autograd keeps until the backward pass has used it.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.model.lengths import patch_count
from mdl_toolkit.training.gradient_checkpointing import NONE, KeptBlocks

# Bytes of a float32 number.
FLOAT = 4
# Bytes per sample of the front end at its widest: the padded waveform (4), and of each frame of 160 samples
# 257 complex numbers (12.85), their squares and the sum (3 x 6.43). Measured: 36.2.
FRONT_END = 36.2

Integers = NDArray[np.int64]


def shared_tokens(config: MiDashengLMConfig, options: TrainOptions, shared_prefix: int) -> int:
    """Return the number of prefix tokens that are computed once for a batch: all of them or none.

    Args:
        config: the model's.
        options: the run's.
        shared_prefix: tokens before the audio that all examples have in common.
    """
    drops = options.lora_dropout > 0 and "decoder" in options.train_target
    return 0 if drops or config.parts[1].attention_dropout > 0 else shared_prefix


@dataclass(frozen=True)
class ActivationEstimate:
    """Estimate bytes that one batch needs forward and back, beyond weights, adapters and optimizer.

    It was fitted to the tensors that autograd keeps in torch 2.13 and peft 0.21.

    Attributes:
        config: the model's.
        options: the run's.
        number: bytes of a number in matrix products: 4, or 2 under autocast to bfloat16.
        on_gpu: whether attention pads the encoder's chunks, and PEFT's dropout keeps a byte for each number.
        quantization: of the decoder's matrices.
        gradients: float32, of each target.
        lengths: decoder tokens of every example, `[examples]`.
        supervised: supervised tokens among them, `[examples]`.
        samples: audio samples of every example, `[examples]`.
        shared_prefix: tokens before the audio that all examples have in common.
        kept: blocks that keep their activations with gradient checkpointing; without, all do.
    """

    config: MiDashengLMConfig
    options: TrainOptions
    number: int
    on_gpu: bool
    quantization: str | None
    gradients: dict[str, int]
    lengths: Integers
    supervised: Integers
    samples: Integers
    shared_prefix: int
    kept: KeptBlocks = NONE

    def fit_blocks(self, most: int) -> KeptBlocks:
        """Return as many blocks as can be kept within `most` bytes in all.

        Decoder layers come first, as a byte of theirs saves more time.
        """
        every, fitting = self.blocks, NONE
        for wanted in (
            *(KeptBlocks(0, count) for count in range(1, every.decoder + 1)),
            *(KeptBlocks(count, every.decoder) for count in range(1, every.encoder + 1)),
        ):
            if replace(self, kept=wanted).peak > most:
                break
            fitting = wanted
        return fitting

    @property
    def blocks(self) -> KeptBlocks:
        """Return the numbers of all blocks."""
        audio, text = self.config.parts
        return KeptBlocks(int(audio.depth), int(text.num_hidden_layers))

    @property
    def peak(self) -> int:
        """Return the most bytes at once: in the front end, at the loss, or in a backward pass."""
        waves = len(self.samples) * int(self.samples.max())
        every, head = sum(self.gradients.values()), self.gradients.get("lm_head", 0)
        # An earlier batch has left its gradients.
        has_earlier = self.options.gradient_accumulation_steps > 1
        front = self.encoder + self.decoder + max(self.loss, self._work(*self._layers) + head)
        moments = (front + every * has_earlier, self.encoder + self._work(*self._blocks) + every)
        return max(int(FRONT_END * waves), FLOAT * waves + max(moments))

    @property
    def _blocks(self) -> tuple[int, int, int]:
        """Return the encoder's blocks, those that keep their activations, and the bytes of one block."""
        every = self.blocks.encoder
        return every, self.kept.encoder if self.options.gradient_checkpointing else every, self.block

    @property
    def _layers(self) -> tuple[int, int, int]:
        """Return the decoder's layers, those that keep their activations, and the bytes of one layer."""
        every = self.blocks.decoder
        return every, self.kept.decoder if self.options.gradient_checkpointing else every, self.layer

    @property
    def block(self) -> int:
        """Return bytes of an encoder block: inputs of norms, linear layers and GELU; q, k, v, result."""
        audio = self.config.parts[0]
        if "encoder" not in self.gradients:
            return 0
        patches, padded = self._patches
        dim, hidden = audio.embed_dim, int(audio.embed_dim * audio.mlp_ratio)
        patch = self.number * (5 * dim + 2 * hidden)
        patch += self._copies(is_quantized=False) * (3 * dim + hidden)
        patch += self._magnitudes * (5 * dim + hidden)
        return patches * patch + padded * self.number * 4 * dim

    @cached_property
    def _patches(self) -> tuple[int, int]:
        """Count all patches, without padding, and as attention computes them: on a GPU, in padded chunks."""
        audio = self.config.parts[0]
        counts = [patch_count(n, audio.hop_length, audio.patch_frames) for n in self.samples.tolist()]
        chunks = sum(-(-count // audio.chunk_patches) for count in counts)
        longest = chunks * min(max(counts), audio.chunk_patches)
        return sum(counts), longest if self.on_gpu else sum(counts)

    @property
    def encoder(self) -> int:
        """Return bytes that encoder and projector keep, the latter the inputs of its layers and GELU."""
        audio, hidden = self.config.parts[0], int(self.config.parts[1].hidden_size)
        if not {"encoder", "projector"} & {*self.gradients}:
            return 0
        width = audio.embed_dim + 2 * hidden // self.config.subsample_factor
        kept = self._patches[0] * self.number * width
        return kept + self._kept(*self._blocks, self._patches[0] * self.number * audio.embed_dim)

    @property
    def layer(self) -> int:
        """Return bytes of a decoder layer: inputs of norms and linear layers, gate and up, attention."""
        text = self.config.parts[1]
        if not {*self.gradients} - ({"lm_head"} if not self.config.tie_word_embeddings else set()):
            return 0
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query, key = text.num_attention_heads * head, text.num_key_value_heads * head
        before = self._stream + self._inputs(text.hidden_size, 3 * text.hidden_size)
        before += self._magnitudes * ("decoder" in self.gradients) * (query + 2 * key + text.hidden_size)
        attended = self.number * len(self.lengths) * int(self.lengths.max()) * 2 * (query + key)
        return int(self._tokens * (before + self._inputs(query, query) + self._after) + attended)

    @property
    def _after(self) -> int:
        """Return bytes of a decoder layer behind attention, for each token."""
        text = self.config.parts[1]
        wide, hidden = text.intermediate_size, text.hidden_size
        inputs = self._inputs(hidden, 2 * hidden) + self._inputs(wide, wide)
        inputs += self._magnitudes * ("decoder" in self.gradients) * (2 * wide + hidden)
        return int(self._stream + self.number * 2 * wide + inputs)

    def _inputs(self, together: int, apart: int) -> int:
        """Return bytes of linear layers' inputs, for a token; `together` and `apart` are widths.

        Some are kept once for all layers that share them, others for each adapter apart.
        """
        trains, copies = "decoder" in self.gradients, self._copies(is_quantized=self.quantization is not None)
        shared = together if self.quantization == "8bit" or (trains and copies < self.number) else 0
        return self.number * shared + copies * apart * trains

    @property
    def _stream(self) -> int:
        """Return bytes of a token between layers: float32 where the embeddings are."""
        embeds = {"embed_tokens", "lm_head"} & {*self.gradients}
        return int((FLOAT if embeds else self.number) * self.config.parts[1].hidden_size)

    @property
    def _tokens(self) -> int:
        """Count all tokens without padding, a shared prefix once if it is computed once."""
        shared = shared_tokens(self.config, self.options, self.shared_prefix)
        return int(self.lengths.sum()) - shared * (len(self.lengths) - 1)

    @property
    def decoder(self) -> int:
        """Return bytes that the decoder keeps; behind its last attention, only supervised tokens go on."""
        text = self.config.parts[1]
        if not self.layer:
            return 0
        layers, kept, _ = self._layers
        always = self._tokens * self.number * (3 * text.hidden_size + text.intermediate_size)
        again = (layers - kept) * (self.quantization == "8bit")
        others = (self._tokens - int(self.supervised.sum())) * self._after if kept else 0
        return int(self._kept(*self._layers, self._tokens * self._stream) + again * always - others)

    def _kept(self, layers: int, kept: int, layer: int, width: int) -> int:
        """Return bytes that layers keep: activations of `layer` bytes, or inputs of `width` bytes."""
        return kept * layer + (layers - kept) * min(layer, width)

    def _work(self, layers: int, kept: int, layer: int) -> int:
        """Return bytes of a layer's backward pass: a quarter of it, or 7 quarters if recomputed (measured).

        Layers are recomputed after the kept ones have been freed.
        """
        return max(layer // 4 if kept else 0, (7 * layer // 4 - kept * layer) if kept < layers else 0)

    def _copies(self, *, is_quantized: bool) -> int:
        """Return bytes that an adapter keeps for a number of its input: a mask, or as PEFT's layers do."""
        if self.options.lora_dropout > 0:
            # The mask of dropout; with PEFT's own layers the input too.
            is_pefts = is_quantized or self.options.lora_variant == "dora"
            return self.number + (1 if self.on_gpu else FLOAT) if is_pefts else 1
        return self.number if is_quantized and self.number < FLOAT else 0

    @property
    def _magnitudes(self) -> int:
        """Return bytes that DoRA keeps for each number of a layer's output: the base's and the adapter's."""
        # Measured: some of the two is what other operations keep too.
        return 7 * self.number // 4 * (self.options.lora_variant == "dora")

    @property
    def loss(self) -> int:
        """Return bytes of the loss: supervised states, their gradients, float32 logits, a head's gradient."""
        from mdl_toolkit.model.kernels.cross_entropy import slice_size

        text, head = self.config.parts[1], self.gradients.get("lm_head", 0)
        supervised, casts = int(self.supervised.sum()), self.number < FLOAT
        tokens = slice_size(supervised, text.vocab_size)
        logits = tokens * text.vocab_size
        numbers = logits * (FLOAT * (2 if head else 1) + self.number * casts)
        copy = head // 2 * casts
        states = self.number * supervised * text.hidden_size * (1 if head else 2)
        return int(states + max(numbers, self.number * logits + head) + copy)
