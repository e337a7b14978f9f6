"""The audio encoder: real patches only, against every clip padded to the longest of its batch.

The padded way is written out here with the encoder's own weights: all chunks of all clips are computed, and
a mask hides the padding from attention.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import Figure, timed
from mdl_toolkit.model import MiDashengEncoderConfig
from mdl_toolkit.model.encoder import Attention, MiDashengEncoder
from mdl_toolkit.model.lengths import visible_patch_count
from mdl_toolkit.model.mel import log_mel

RUNS = 5
CLIPS = 8
SAMPLE_RATE = 16_000


def figures() -> list[Figure]:
    """Two lines: the forward pass alone, and with the backward pass."""
    encoder = _encoder()
    waveforms, lengths = _clips()
    _check_same(encoder, waveforms, lengths)
    seconds = sum(lengths) / SAMPLE_RATE
    what = f"encoder, {CLIPS} clips of 1 to 25 s ({seconds:.0f} s); other: padded to the longest"

    def forward(padded: bool) -> None:
        with torch.no_grad():
            _encode(encoder, waveforms, lengths, padded)

    def step(padded: bool) -> None:
        _encode(encoder, waveforms, lengths, padded).square().mean().backward()

    return [
        timed(f"{what}; forward", lambda: forward(False), lambda: forward(True), RUNS),
        timed(f"{what}; forward and backward", lambda: step(False), lambda: step(True), RUNS),
    ]


def _encoder() -> MiDashengEncoder:
    torch.manual_seed(0)
    config = MiDashengEncoderConfig(
        embed_dim=512, depth=4, num_heads=8, patch_size=[64, 4], patch_stride=[64, 4], target_length=1008,
        attn_implementation="sdpa",
    )  # fmt: skip
    encoder = MiDashengEncoder(config)
    for embedding in (encoder.time_pos_embed, encoder.freq_pos_embed):
        torch.nn.init.normal_(embedding, std=0.02)
    return encoder


def _clips() -> tuple[Tensor, list[int]]:
    """Noise of 1 to 25 s, evenly spread, `[clips, longest]`, and the lengths in samples."""
    random = np.random.default_rng(0)
    lengths = [int(seconds * SAMPLE_RATE) for seconds in np.linspace(1, 25, CLIPS)]
    waveforms = torch.zeros(CLIPS, max(lengths))
    for row, length in zip(waveforms, lengths, strict=True):
        row[:length] = torch.from_numpy(random.standard_normal(length).astype(np.float32)) * 0.1
    return waveforms, lengths


def _encode(encoder: MiDashengEncoder, waveforms: Tensor, lengths: list[int], padded: bool) -> Tensor:
    return encode_padded(encoder, waveforms, lengths) if padded else encoder(waveforms, lengths)[0]


def encode_padded(encoder: MiDashengEncoder, waveforms: Tensor, lengths: list[int]) -> Tensor:
    """All clips as long as the longest one: `[clips, patches of the longest, embed_dim]`."""
    config = encoder.config
    clips, longest = waveforms.shape
    mel = log_mel(waveforms, [longest] * clips, config)
    patches = mel.shape[-1] // config.patch_frames
    cut = mel[:, :, : patches * config.patch_frames].unflatten(2, (patches, config.patch_frames))
    x = encoder.patch_embed(encoder.init_bn(cut.transpose(1, 2).flatten(0, 1))).unflatten(0, (clips, -1))
    visible = torch.tensor([visible_patch_count(length) for length in lengths])
    chunks = []
    for start in range(0, patches, config.chunk_patches):
        part = x[:, start : start + config.chunk_patches]
        seen = torch.arange(start, start + part.shape[1]) < visible.unsqueeze(1)
        seen[:, 0] = True  # softmax over nothing is not a number
        chunks.append(_chunk(encoder, part, seen[:, None, None, :]))
    return torch.cat(chunks, dim=1)


def _chunk(encoder: MiDashengEncoder, x: Tensor, seen: Tensor) -> Tensor:
    time, freq = encoder.time_pos_embed[0, :, 0].T, encoder.freq_pos_embed[0, :, 0, 0]
    x = x + time[: x.shape[1]] + freq
    for block in encoder.blocks:
        x = x + _attend(block.attn, block.norm1(x), seen)
        x = x + block.mlp(block.norm2(x))
    return encoder.norm(x)


def _attend(attention: Attention, x: Tensor, seen: Tensor) -> Tensor:
    qkv = attention.qkv(x).unflatten(-1, (3, attention.heads, attention.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return attention.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def _check_same(encoder: MiDashengEncoder, waveforms: Tensor, lengths: list[int]) -> None:
    """The longest clip has no padding in either way, so both must give it the same numbers."""
    ours, packing = encoder(waveforms, lengths)
    longest = lengths.index(max(lengths))
    alone = ours.split(packing.clips)[longest]
    torch.testing.assert_close(alone, encode_padded(encoder, waveforms, lengths)[longest], atol=1e-4, rtol=0)
