"""What a step needs beside weights, adapters and optimizer: an estimate from shapes and lengths alone.

For each position or patch and layer: what autograd keeps until the backward pass has used it.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.model.lengths import patch_count
from mdl_toolkit.training.gradient_checkpointing import NONE, KeptBlocks

FLOAT = 4  # bytes of a float32 number
# Bytes per sample of the front end at its widest: the padded waveform (4), and of each frame of 160 samples
# 257 complex numbers (12.85), their squares and the sum (3 x 6.43). Measured: 36.2.
FRONT_END = 36.2

Integers = NDArray[np.int64]


def shared_positions(config: MiDashengLMConfig, options: TrainOptions, beginning: int) -> int:
    """Of the positions with which all rows begin, those that one row computes for its batch: all or none."""
    drops = options.lora_dropout > 0 and "decoder" in options.train_target
    return 0 if drops or config.parts[1].attention_dropout > 0 else beginning


@dataclass(frozen=True)
class Step:
    """One batch on its way forward and back; figures are bytes beyond weights, adapters and optimizer.

    What is counted was found by comparing with the tensors that autograd keeps in torch 2.13 and peft 0.21.

    Attributes:
        config: the model's.
        options: the run's.
        number: bytes of a number in matrix products: 4, or 2 under autocast to bfloat16.
        on_gpu: where autocast computes the encoder's norms in float32.
        quantization: of the decoder's matrices.
        gradients: float32, of each target.
        lengths: decoder positions, of which `supervised` are learnt, and audio `samples`; each `[rows]`.
        beginning: positions that all rows have in common, from the first on.
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
    beginning: int
    kept: KeptBlocks = NONE

    def keeping(self, most: int) -> KeptBlocks:
        """As many blocks as `most` bytes allow: decoder layers first, of which a byte saves more time."""
        every, found = self.blocks, NONE
        for wanted in (
            *(KeptBlocks(0, count) for count in range(1, every.decoder + 1)),
            *(KeptBlocks(count, every.decoder) for count in range(1, every.encoder + 1)),
        ):
            if replace(self, kept=wanted).peak > most:
                break
            found = wanted
        return found

    @property
    def blocks(self) -> KeptBlocks:
        """All that there are."""
        audio, text = self.config.parts
        return KeptBlocks(int(audio.depth), int(text.num_hidden_layers))

    @property
    def peak(self) -> int:
        """The most at once: in the front end, at the loss, or on the way back through decoder or encoder."""
        waves = len(self.samples) * int(self.samples.max())
        every, head = sum(self.gradients.values()), self.gradients.get("lm_head", 0)
        has_earlier = self.options.gradient_accumulation_steps > 1  # batch, which has left its gradients
        encoder, decoder = self._encoder, self._decoder
        front = encoder + decoder + max(self._loss, self._work(*self._layers) + head)
        moments = (front + every * has_earlier, encoder + self._work(*self._blocks) + every)
        return max(int(FRONT_END * waves), FLOAT * waves + max(moments))

    @property
    def _blocks(self) -> tuple[int, int, int]:
        """Of the encoder: all blocks, those that keep what they computed, and what one computes."""
        every = self.blocks.encoder
        return every, self.kept.encoder if self.options.gradient_checkpointing else every, self._block

    @property
    def _layers(self) -> tuple[int, int, int]:
        """As `_blocks`, of the decoder."""
        every = self.blocks.decoder
        return every, self.kept.decoder if self.options.gradient_checkpointing else every, self._layer

    @property
    def _block(self) -> int:
        """An encoder block: inputs of two norms, four layers and the GELU; q, k, v and result."""
        audio, norm = self.config.parts[0], FLOAT if self.on_gpu else self.number
        if "encoder" not in self.gradients:
            return 0
        patches, padded = self._patches
        dim, hidden = audio.embed_dim, int(audio.embed_dim * audio.mlp_ratio)
        patch = norm * 2 * dim + self.number * (3 * dim + 2 * hidden)
        patch += self._copies(is_quantized=False) * (3 * dim + hidden)
        return patches * patch + padded * self.number * 4 * dim

    @cached_property
    def _patches(self) -> tuple[int, int]:
        """All patches; and as attention computes them: on a GPU, chunks padded to the longest."""
        audio = self.config.parts[0]
        counts = [patch_count(n, audio.hop_length, audio.patch_frames) for n in self.samples.tolist()]
        chunks = sum(-(-count // audio.chunk_patches) for count in counts)
        longest = chunks * min(max(counts), audio.chunk_patches)
        return sum(counts), longest if self.on_gpu else sum(counts)

    @property
    def _encoder(self) -> int:
        """What encoder and projector keep; the latter the inputs of its two layers and of its GELU."""
        audio, hidden = self.config.parts[0], int(self.config.parts[1].hidden_size)
        if not {"encoder", "projector"} & {*self.gradients}:
            return 0
        width = audio.embed_dim + 2 * hidden // self.config.subsample_factor
        kept = self._patches[0] * self.number * width
        return kept + self._kept(*self._blocks, self._patches[0] * self.number * audio.embed_dim)

    @property
    def _layer(self) -> int:
        """A decoder layer: inputs of norms and linear layers, gate and up; what attention keeps."""
        text = self.config.parts[1]
        if not {*self.gradients} - ({"lm_head"} if not self.config.tie_word_embeddings else set()):
            return 0
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        query, key = text.num_attention_heads * head, text.num_key_value_heads * head
        before = self._stream + self._inputs(text.hidden_size, 3 * text.hidden_size)
        attended = self.number * len(self.lengths) * int(self.lengths.max()) * 2 * (query + key)
        return int(self._positions * (before + self._inputs(query, query) + self._after) + attended)

    @property
    def _after(self) -> int:
        """Bytes for each position that is there after attention."""
        text = self.config.parts[1]
        wide, hidden = text.intermediate_size, text.hidden_size
        inputs = self._inputs(hidden, 2 * hidden) + self._inputs(wide, wide)
        return int(self._stream + self.number * 2 * wide + inputs)

    def _inputs(self, together: int, apart: int) -> int:
        """Bytes of linear layers' inputs: kept together, by 8-bit layers, and for each adapter apart."""
        trains, copies = "decoder" in self.gradients, self._copies(is_quantized=self.quantization is not None)
        shared = together if self.quantization == "8bit" or (trains and not copies) else 0
        return self.number * shared + copies * apart * trains

    @property
    def _stream(self) -> int:
        """Bytes of what goes from layer to layer; float32 where that is what the embeddings are."""
        embeds = {"embed_tokens", "lm_head"} & {*self.gradients}
        return int((FLOAT if embeds else self.number) * self.config.parts[1].hidden_size)

    @property
    def _positions(self) -> int:
        """Of all rows, without padding; what they begin with once, if nothing is dropped at random."""
        shared = shared_positions(self.config, self.options, self.beginning)
        return int(self.lengths.sum()) - shared * (len(self.lengths) - 1)

    @property
    def _decoder(self) -> int:
        """What the decoder keeps; the last layer goes on from attention with what is supervised alone."""
        text = self.config.parts[1]
        if not self._layer:
            return 0
        layers, kept, _ = self._layers
        always = self._positions * self.number * (3 * text.hidden_size + text.intermediate_size)
        again = (layers - kept) * (self.quantization == "8bit")
        others = (self._positions - int(self.supervised.sum())) * self._after if kept else 0
        return int(self._kept(*self._layers, self._positions * self._stream) + again * always - others)

    def _kept(self, layers: int, kept: int, layer: int, width: int) -> int:
        """What so many layers keep; those that are computed again, their inputs."""
        return kept * layer + (layers - kept) * min(layer, width)

    def _work(self, layers: int, kept: int, layer: int) -> int:
        """A layer on its way back: a quarter more, or three if it is made again (measured).

        What is computed again meets no kept ones.
        """
        return max(layer // 4 if kept else 0, (7 * layer // 4 - kept * layer) if kept < layers else 0)

    def _copies(self, *, is_quantized: bool) -> int:
        """Bytes of a number in inputs that each adapter keeps for itself, as PEFT's plain LoRA layers do."""
        if self.options.lora_dropout > 0:
            return self.number + (1 if self.on_gpu else FLOAT)  # and the mask
        return self.number if is_quantized and self.number < FLOAT else 0

    @property
    def _loss(self) -> int:
        """Supervised positions' states and gradients, and float32 logits; then a trained head's gradient."""
        from mdl_toolkit.model.constants import MOST_LOGITS
        from mdl_toolkit.model.kernels.cross_entropy import slice_size

        text, head = self.config.parts[1], self.gradients.get("lm_head", 0)
        supervised, casts = int(self.supervised.sum()), self.number < FLOAT
        if head:
            rows = min(supervised, max(1, MOST_LOGITS // text.vocab_size))
        else:
            rows = slice_size(supervised, text.vocab_size)
        logits = rows * text.vocab_size
        numbers = logits * (FLOAT + self.number * casts)
        copy = head // 2 * casts
        states = self.number * supervised * text.hidden_size * (1 if head else 2)
        return int(states + max(numbers, self.number * logits + head) + copy)
