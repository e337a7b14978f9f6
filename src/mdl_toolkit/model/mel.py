"""Turn waveforms into log-mel spectrograms, in float32 whatever the model's dtype.

Window and filters are no weights: they are constants, made when first needed.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from mdl_toolkit.model.configuration import MiDashengEncoderConfig
from mdl_toolkit.model.lengths import frame_count

# The least power of a mel bin, -100 dB.
FLOOR_POWER = 1e-10
# The lowest level of a bin below the loudest bin of the same clip.
DYNAMIC_RANGE_DB = 120.0
# Of the acoustic branch: samples of its window and FFT, and the least magnitude of a mel bin.
ACOUSTIC_N_FFT = 1024
FLOOR_MAGNITUDE = 1e-7


def log_mel(waveforms: Tensor, lengths: list[int], config: MiDashengEncoderConfig) -> Tensor:
    """Compute log-mel spectrograms in dB, each clip as if it were alone.

    Args:
        waveforms: `[clips, longest]`, zero-padded on the right.
        lengths: samples of each clip.
        config: n_fft, hop_length, n_mels and so on.

    Returns:
        `[clips, n_mels, frames of the longest]` float32; frames beyond a clip's own are arbitrary.

    Raises:
        ValueError: a clip is longer than its row or too short for one frame.
    """
    with torch.autocast(waveforms.device.type, enabled=False):
        spectrum, filters = spectra(
            waveforms, lengths, config, config.n_fft, config.win_length, config.n_mels
        )
        power = spectrum.real.square() + spectrum.imag.square()
        mel = torch.matmul(filters.T, power)
        decibels = 10.0 * torch.log10(mel.clamp(min=FLOOR_POWER))
        # Raise every bin to at most 120 dB below the loudest one of its own clip.
        frames = torch.tensor([frame_count(n, config.hop_length) for n in lengths])
        frames = frames.to(waveforms.device, non_blocking=True)
        is_padding = torch.arange(decibels.shape[-1], device=waveforms.device) >= frames.unsqueeze(1)
        loudest = decibels.masked_fill(is_padding.unsqueeze(1), -torch.inf).amax(dim=(1, 2), keepdim=True)
        return torch.maximum(decibels, loudest - DYNAMIC_RANGE_DB)


def acoustic_log_mel(waveforms: Tensor, lengths: list[int], config: MiDashengEncoderConfig) -> Tensor:
    """Compute the acoustic branch's spectrograms, natural logarithms of mel magnitudes.

    Args:
        waveforms: `[clips, longest]`, zero-padded on the right.
        lengths: samples of each clip.
        config: n_mels_patch, hop_length and so on.

    Returns:
        `[clips, n_mels_patch, frames of the longest]` float32; frames beyond a clip's own are arbitrary.

    Raises:
        ValueError: a clip is longer than its row or too short for one frame.
    """
    assert config.n_mels_patch is not None
    with torch.autocast(waveforms.device.type, enabled=False):
        sizes = ACOUSTIC_N_FFT, ACOUSTIC_N_FFT, config.n_mels_patch
        spectrum, filters = spectra(waveforms, lengths, config, *sizes)
        return torch.matmul(filters.T, spectrum.abs()).clamp(min=FLOOR_MAGNITUDE).log()


def spectra(
    waveforms: Tensor,
    lengths: list[int],
    config: MiDashengEncoderConfig,
    n_fft: int,
    win_length: int,
    n_mels: int,
) -> tuple[Tensor, Tensor]:
    """Compute complex spectra `[clips, n_fft // 2 + 1, frames]`, and return them with their mel filters.

    Raises:
        ValueError: a clip is longer than its row or too short for one frame.
    """
    # A reflection of n_fft / 2 samples needs one sample more to be reflected at.
    padding = n_fft // 2
    if waveforms.ndim != 2 or len(lengths) != len(waveforms):
        shape = list(waveforms.shape)
        raise ValueError(f"input_values {shape} do not match {len(lengths)} audio lengths")
    for clip, length in enumerate(lengths):
        if not padding < length <= waveforms.shape[1]:
            raise ValueError(
                f"clip {clip} has {length} samples; from {padding + 1} to {waveforms.shape[1]} are possible"
            )
    padded = _reflect(waveforms.float(), lengths, padding)
    band = config.sample_rate, config.f_min, config.f_max
    window, filters = window_and_filters(n_fft, win_length, n_mels, *band, waveforms.device)
    sizes = n_fft, config.hop_length, win_length
    return torch.stft(padded, *sizes, window, center=False, return_complex=True), filters


def _reflect(waveforms: Tensor, lengths: list[int], padding: int) -> Tensor:
    """Pad every clip at both of its own ends with its reflection.

    Args:
        waveforms: `[clips, longest]`.
        lengths: samples of each clip.
        padding: samples at each end.

    Returns:
        `[clips, longest + 2 * padding]`.
    """
    last = torch.tensor(lengths).to(waveforms.device, non_blocking=True).unsqueeze(1) - 1
    position = torch.arange(-padding, waveforms.shape[1] + padding, device=waveforms.device).abs()
    position = torch.where(position > last, 2 * last - position, position)
    return waveforms.gather(1, position.clamp(min=0))


@lru_cache(maxsize=8)
def window_and_filters(
    n_fft: int,
    win_length: int,
    n_mels: int,
    sample_rate: int,
    f_min: float,
    f_max: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return the periodic Hann window `[win_length]` and the mel filters `[n_fft // 2 + 1, n_mels]`."""
    with torch.inference_mode(False), torch.device("cpu"):
        window = torch.hann_window(win_length, periodic=True, dtype=torch.float32)
        filters = mel_filters(n_fft // 2 + 1, n_mels, sample_rate, f_min, f_max)
        return window.to(device), filters.to(device)


def mel_filters(n_freqs: int, n_mels: int, sample_rate: int, f_min: float, f_max: float) -> Tensor:
    """Return triangular filters on the HTK mel scale, 2595 log10(1 + f / 700), not normalised by area.

    In float32 throughout, as the published model was trained.

    Returns:
        `[n_freqs, n_mels]`; equal to `tests/golden/frontend.npz`, `fbanks`.
    """
    frequencies = torch.linspace(0, sample_rate // 2, n_freqs, dtype=torch.float32)
    low, high = (2595.0 * math.log10(1.0 + f / 700.0) for f in (f_min, f_max))
    mels = torch.linspace(low, high, n_mels + 2, dtype=torch.float32)
    corners = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    width = corners.diff()
    slopes = corners.unsqueeze(0) - frequencies.unsqueeze(1)
    rising, falling = -slopes[:, :-2] / width[:-1], slopes[:, 2:] / width[1:]
    return torch.minimum(rising, falling).clamp(min=0.0)
