"""How long a clip is at each stage: samples, frames, patches, audio tokens. Plain integers only.

The formulas stand here once; the golden table `tests/golden/audio_tokens.npz` holds them to the published
model.
"""

HOP_LENGTH = 160  # samples between two frames: 10 ms at 16 kHz
PATCH_STRIDE = 4  # frames in a patch: 40 ms
SUBSAMPLE_FACTOR = 5  # patches in an audio token: 200 ms
# Of one audio token: 3,200, or 0.2 s. Shorter clips are padded to it; vLLM pads to the same.
MIN_SAMPLES = HOP_LENGTH * PATCH_STRIDE * SUBSAMPLE_FACTOR


def frame_count(samples: int, hop_length: int = HOP_LENGTH) -> int:
    """Frames of a centred STFT over `samples` samples."""
    return 1 + samples // hop_length


def patch_count(samples: int, hop_length: int = HOP_LENGTH, patch_stride: int = PATCH_STRIDE) -> int:
    """Whole patches in the frames of a clip; frames left over are dropped."""
    return frame_count(samples, hop_length) // patch_stride


def visible_patch_count(samples: int, hop_length: int = HOP_LENGTH, patch_stride: int = PATCH_STRIDE) -> int:
    """Patches that serve as attention keys; `patch_count` may be one more."""
    return samples // (hop_length * patch_stride)


def audio_token_count(
    samples: int,
    hop_length: int = HOP_LENGTH,
    patch_stride: int = PATCH_STRIDE,
    subsample_factor: int = SUBSAMPLE_FACTOR,
) -> int:
    """Audio tokens that a clip of `samples` samples becomes in the decoder: 5 per second."""
    return patch_count(samples, hop_length, patch_stride) // subsample_factor
