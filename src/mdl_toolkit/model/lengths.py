"""Count a clip's frames, patches and audio tokens from its samples, without importing torch.

The formulas stand here once; the golden table `tests/golden/audio_tokens.npz` compares them with the
published model.
"""

# Samples between two frames: 10 ms at 16 kHz.
HOP_LENGTH = 160
# Frames in a patch: 40 ms.
PATCH_STRIDE = 4
# Patches in an audio token: 200 ms.
SUBSAMPLE_FACTOR = 5
# Samples of one audio token, 0.2 s: shorter clips are padded to it, by vLLM too.
MIN_SAMPLES = HOP_LENGTH * PATCH_STRIDE * SUBSAMPLE_FACTOR


def frame_count(samples: int, hop_length: int = HOP_LENGTH) -> int:
    """Return the frames of a centred STFT over `samples` samples."""
    return 1 + samples // hop_length


def patch_count(samples: int, hop_length: int = HOP_LENGTH, patch_stride: int = PATCH_STRIDE) -> int:
    """Return the whole patches in the frames of a clip; frames left over are dropped."""
    return frame_count(samples, hop_length) // patch_stride


def visible_patch_count(samples: int, hop_length: int = HOP_LENGTH, patch_stride: int = PATCH_STRIDE) -> int:
    """Return the patches that serve as attention keys; `patch_count` may be one more."""
    return samples // (hop_length * patch_stride)


def audio_token_count(
    samples: int,
    hop_length: int = HOP_LENGTH,
    patch_stride: int = PATCH_STRIDE,
    subsample_factor: int = SUBSAMPLE_FACTOR,
) -> int:
    """Return the audio tokens that a clip of `samples` samples becomes: 5 per second."""
    return patch_count(samples, hop_length, patch_stride) // subsample_factor
