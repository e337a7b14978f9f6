"""Encode and project audio: the Dasheng encoder and the projector, over real patches only.

All patches of all clips lie in one tensor, `[patches, embed_dim]`. Only attention sees chunks of 10.08 s,
each by itself. Padding is never computed: a clip's features do not depend on the others of its batch.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from mdl_toolkit.model.configuration import MiDashengEncoderConfig
from mdl_toolkit.model.kernels.attention import chunked_attention, padded_attention
from mdl_toolkit.model.kernels.norms import LayerNorm
from mdl_toolkit.model.lengths import patch_count, visible_patch_count
from mdl_toolkit.model.mel import acoustic_log_mel, log_mel

LAYER_NORM_EPS = 1e-6
ACOUSTIC_NORM_EPS = 1e-5


@dataclass(frozen=True)
class PatchLayout:
    """Hold the patches of each clip and chunk, and which of them attention sees.

    Attributes:
        clips: patches of each clip.
        chunks: patches of each chunk, clip after clip.
        keys: patches of each chunk that can be seen, its first ones; at least one.
        device: where the index tensors live.
    """

    clips: tuple[int, ...]
    chunks: tuple[int, ...]
    keys: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(lengths: list[int], config: MiDashengEncoderConfig, device: torch.device) -> "PatchLayout":
        """Lay out clips of `lengths` samples."""
        clips, chunks, keys = [], [], []
        for length in lengths:
            patches = patch_count(length, config.hop_length, config.patch_frames)
            visible = visible_patch_count(length, config.hop_length, config.patch_frames)
            clips.append(patches)
            for start in range(0, patches, config.chunk_patches):
                chunk = min(config.chunk_patches, patches - start)
                chunks.append(chunk)
                # A chunk of a single invisible patch still sees itself.
                keys.append(min(chunk, max(visible - start, 1)))
        return PatchLayout(tuple(clips), tuple(chunks), tuple(keys), device)

    @property
    def is_even(self) -> bool:
        """Tell whether no mask is needed: chunks have one length and every patch can be seen."""
        return len(set(self.chunks)) <= 1 and self.chunks == self.keys

    @cached_property
    def positions(self) -> Tensor:
        """Return the position of every patch in its chunk, `[patches]`."""
        return self._there(torch.cat([torch.arange(n) for n in self.chunks]))

    @cached_property
    def gather(self) -> Tensor:
        """Return the index of each chunk's patches, `[chunks, longest]`; 0 at padding."""
        starts = torch.tensor((0, *self.chunks[:-1])).cumsum(0).unsqueeze(1)
        column = torch.arange(max(self.chunks)).unsqueeze(0)
        return self._there((starts + column) * (column < torch.tensor(self.chunks).unsqueeze(1)))

    @cached_property
    def scatter(self) -> Tensor:
        """Return the index of every patch in a flattened `[chunks, longest]`; `[patches]`."""
        longest = max(self.chunks)
        chunk = torch.repeat_interleave(torch.arange(len(self.chunks)), torch.tensor(self.chunks))
        return self._there(chunk) * longest + self.positions

    @cached_property
    def mask(self) -> Tensor:
        """Return True where a key can be seen, `[chunks, 1, 1, longest]`."""
        seen = torch.arange(max(self.chunks)) < torch.tensor(self.keys).unsqueeze(1)
        return self._there(seen[:, None, None, :])

    def _there(self, indices: Tensor) -> Tensor:
        """Copy indices to the device without waiting for it."""
        return indices.to(self.device, non_blocking=True)

    def cut(self, mel: Tensor, width: int) -> Tensor:
        """Cut spectrograms `[clips, bins, frames]` into the real patches, `[patches, bins, width]`."""
        most = max(self.clips)
        whole = mel[:, :, : most * width].unflatten(2, (most, width)).transpose(1, 2)
        # Indices from the CPU, not a mask: a GPU would have to wait for the count of what is true in it.
        real = torch.arange(most) < torch.tensor(self.clips).unsqueeze(1)
        clip, patch = real.nonzero(as_tuple=True)
        return whole[self._there(clip), self._there(patch)].contiguous()


class FrozenBatchNorm(nn.BatchNorm2d):
    """Normalise mel bins with BatchNorm's stored statistics, always, in float32."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":  # noqa: ARG002 - the signature of nn.Module
        """Stay in evaluation mode: in batch mode the loss of the golden batches is 0.5 to 0.8 off."""
        return super().train(False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[patches, bins, frames]`."""
        assert self.running_mean is not None
        assert self.running_var is not None
        statistics = (self.running_mean.float(), self.running_var.float())
        weight, bias = self.weight.float(), self.bias.float()
        return functional.batch_norm(input.float(), *statistics, weight, bias, False, 0.0, self.eps)


class PatchEmbed(nn.Module):
    """Embed patches by a convolution whose kernel is its stride: a linear map of each patch."""

    def __init__(self, config: MiDashengEncoderConfig) -> None:
        super().__init__()
        kernel = (config.n_mels, config.patch_frames)
        self.proj = nn.Conv2d(config.input_channels, config.embed_dim, kernel, stride=kernel)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed `[patches, bins, frames]` as `[patches, embed_dim]`."""
        return self.proj(patches.unsqueeze(1).to(self.proj.weight.dtype)).flatten(1)


class Attention(nn.Module):
    """Attend in both directions within each chunk, by torch's attention whatever the decoder uses."""

    def __init__(self, config: MiDashengEncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.head_dim = config.embed_dim // config.num_heads
        self.scaling = self.head_dim**-0.5
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """Map `[patches, embed_dim]` to the same shape."""
        qkv = self.qkv(x).view(-1, 3, self.heads, self.head_dim)
        if qkv.device.type == "cpu":
            out = chunked_attention(qkv, layout.chunks, layout.keys, self.scaling)
        else:
            mask = None if layout.is_even else layout.mask
            out = padded_attention(qkv, layout.gather, layout.scatter, mask, self.scaling)
        return self.proj(out.flatten(1))


class Mlp(nn.Module):
    """Apply two linear layers around an exact GELU."""

    def __init__(self, config: MiDashengEncoderConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[patches, embed_dim]` to the same shape."""
        return self.fc2(functional.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Scale each channel by a learned factor; present only when `init_values` is set."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `[patches, embed_dim]`."""
        return x * self.gamma


class MiDashengEncoderBlock(GradientCheckpointingLayer):
    """Compute a transformer block: x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, config: MiDashengEncoderConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(config)
        scale = config.init_values
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """Map `[patches, embed_dim]` to the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x), layout))
        return x + self.ls2(self.mlp(self.norm2(x)))


class MiDashengEncoder(nn.Module):
    """Encode waveforms as one vector per 40 ms."""

    def __init__(self, config: MiDashengEncoderConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.init_bn = FrozenBatchNorm(config.n_mels)
        self.patch_embed = PatchEmbed(config)
        self.time_pos_embed = nn.Parameter(torch.empty(1, config.embed_dim, 1, config.chunk_patches))
        self.freq_pos_embed = nn.Parameter(torch.empty(1, config.embed_dim, 1, 1))
        self.blocks = nn.ModuleList(MiDashengEncoderBlock(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)

    def forward(self, waveforms: Tensor, lengths: list[int]) -> tuple[Tensor, PatchLayout]:
        """Encode clips.

        Args:
            waveforms: `[clips, longest]`, zero-padded on the right.
            lengths: samples of each clip.

        Returns:
            `[patches of all clips, embed_dim]`, and their layout.
        """
        layout = PatchLayout.of(lengths, self.config, waveforms.device)
        mel = log_mel(waveforms, lengths, self.config)
        # Clips of under 480 samples have no patch.
        if not layout.chunks:
            return self.norm.weight.new_zeros(0, self.config.embed_dim), layout
        patches = layout.cut(mel, self.config.patch_frames)
        x = self.patch_embed(self.init_bn(patches)) + (
            self.time_pos_embed[0, :, 0].T.index_select(0, layout.positions) + self.freq_pos_embed[0, :, 0, 0]
        )
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x), layout


class AcousticEncoder(nn.Module):
    """Add an acoustic branch to the encoder's output: patches of a finer spectrogram, normalised.

    Its parts have the names that the configuration gives them, so that they are those of the checkpoint.
    """

    def __init__(self, config: MiDashengEncoderConfig) -> None:
        super().__init__()
        self.config = config
        kernel = (config.n_mels_patch or 0, config.patch_frames)
        self.add_module(config.semantic_module, MiDashengEncoder(config))
        patch_embed = nn.Conv2d(config.input_channels, config.embed_dim, kernel, stride=kernel)
        self.add_module(config.acoustic_patch_embed_module, patch_embed)
        self.add_module(config.acoustic_norm_module, LayerNorm(config.embed_dim, eps=ACOUSTIC_NORM_EPS))

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the encoder's blocks; the branch has none."""
        blocks = self.get_submodule(self.config.semantic_module).blocks
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def forward(self, waveforms: Tensor, lengths: list[int]) -> tuple[Tensor, PatchLayout]:
        """Encode clips, as `MiDashengEncoder` does."""
        config = self.config
        semantic, layout = self.get_submodule(config.semantic_module)(waveforms, lengths)
        if not layout.chunks:
            return semantic, layout
        patches = layout.cut(acoustic_log_mel(waveforms, lengths, config), config.patch_frames)
        convolution = self.get_submodule(config.acoustic_patch_embed_module)
        assert isinstance(convolution, nn.Conv2d)
        embedded = convolution(patches.unsqueeze(1).to(convolution.weight.dtype)).flatten(1)
        return semantic + self.get_submodule(config.acoustic_norm_module)(embedded), layout


class AudioProjector(nn.Module):
    """Join five consecutive patches to an audio token: two linear layers around an exact GELU."""

    def __init__(self, embed_dim: int, hidden_size: int, subsample_factor: int) -> None:
        super().__init__()
        self.k = subsample_factor
        self.net = nn.Sequential(
            nn.Linear(embed_dim * subsample_factor, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, x: Tensor, layout: PatchLayout) -> Tensor:
        """Map `[patches, embed_dim]` to `[audio tokens, hidden_size]`; groups straddle chunk borders."""
        # A clip's last `patches mod 5` are in no group.
        starts = accumulate(layout.clips[:-1], initial=0)
        grouped = [
            torch.arange(start, start + n // self.k * self.k)
            for start, n in zip(starts, layout.clips, strict=True)
        ]
        x = x.index_select(0, torch.cat(grouped).to(layout.device, non_blocking=True))
        return self.net(x.unflatten(0, (-1, self.k)).flatten(1))
