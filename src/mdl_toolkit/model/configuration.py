"""Configure MiDashengLM: audio encoder, projector, text decoder.

Defaults are the ones that the published code uses for an absent key; the text part is transformers' own.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from mdl_toolkit.model.constants import AUDIO_TOKEN_ID, SAMPLE_RATE, SEMANTIC_MODULE, TEXT_MODEL_TYPES


class MiDashengEncoderConfig(PreTrainedConfig):
    """Configure the Dasheng audio encoder: a vision transformer over log-mel patches of 64 bins x 40 ms.

    Attributes:
        n_mels_patch: mel bins of an acoustic branch beside it; None if there is none.
        semantic_module: name, in a model with that branch, of the encoder without it.
        acoustic_patch_embed_module: name of the branch's convolution.
        acoustic_norm_module: name of its layer norm.
    """

    model_type = "midashenglm_dasheng_encoder"

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float | None = None
    patch_size: int | list[int] | tuple[int, ...] = 16
    patch_stride: int | list[int] | tuple[int, ...] = 16
    input_channels: int = 1
    target_length: int = 1012
    outputdim: int = 527
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    n_fft: int = 512
    win_length: int = 512
    hop_length: int = 160
    n_mels: int = 64
    f_min: float = 0.0
    f_max: float = 8000.0
    sample_rate: int = SAMPLE_RATE
    center: bool = True
    n_mels_patch: int | None = None
    semantic_module: str = SEMANTIC_MODULE
    acoustic_patch_embed_module: str = "patch_embed"
    acoustic_norm_module: str = "norm"

    @property
    def patch_frames(self) -> int:
        """Return the frames in a patch."""
        return _pair(self.patch_stride)[1]

    @property
    def chunk_patches(self) -> int:
        """Return the patches in a whole encoder chunk: 252, or 10.08 s."""
        return self.target_length // self.patch_frames

    def check(self) -> None:
        """Refuse settings that no published MiDashengLM has and this implementation does not compute.

        Raises:
            ValueError: a setting is not supported; the message names it and its value.
        """
        patch = (self.n_mels, self.patch_frames)
        supported: dict[str, Any] = {
            "patch_size": patch,
            "patch_stride": patch,
            "input_channels": 1,
            "center": True,
            "drop_rate": 0.0,
            "attn_drop_rate": 0.0,
        }
        for key, wanted in supported.items():
            value = _pair(getattr(self, key)) if key.startswith("patch") else getattr(self, key)
            if value != wanted:
                raise ValueError(f"audio_encoder_config.{key} = {value} is not supported, only {wanted}")


class MiDashengLMConfig(PreTrainedConfig):
    """Configure the whole model; the `model_type` of `text_config` is that of the decoder, a Qwen."""

    model_type = "midashenglm"
    sub_configs: ClassVar[dict[str, Any]] = {
        "audio_encoder_config": MiDashengEncoderConfig,
        "text_config": AutoConfig,
    }

    audio_encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    subsample_factor: int = 5
    audio_token_id: int | None = AUDIO_TOKEN_ID
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Make the two parts; whole and decoder agree on whether input and output embeddings are tied.

        Raises:
            ValueError: the decoder is of a kind that no MiDashengLM has, or attends to a window only.
        """
        audio, text = self.audio_encoder_config, self.text_config
        if self.audio_token_id is None:
            self.audio_token_id = AUDIO_TOKEN_ID
        if not isinstance(audio, PreTrainedConfig):
            self.audio_encoder_config = MiDashengEncoderConfig(**(audio or {}))
        given = {"model_type": text.model_type} if isinstance(text, PreTrainedConfig) else text or {}
        kind = given.get("model_type") or TEXT_MODEL_TYPES[0]
        if kind not in TEXT_MODEL_TYPES:
            known = ", ".join(TEXT_MODEL_TYPES)
            raise ValueError(f"text_config.model_type {kind!r} is not one of {known}")
        if not isinstance(text, PreTrainedConfig):
            settings = {"tie_word_embeddings": self.tie_word_embeddings, **given, "model_type": kind}
            self.text_config = AutoConfig.for_model(**settings)
        super().__post_init__(**kwargs)
        assert isinstance(self.text_config, PreTrainedConfig)
        if {*self.text_config.layer_types} - {"full_attention"}:
            raise ValueError("text_config.layer_types: only full_attention is supported")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    @property
    def parts(self) -> tuple[MiDashengEncoderConfig, PreTrainedConfig]:
        """Return the audio encoder's and the text decoder's configuration."""
        audio, text = self.audio_encoder_config, self.text_config
        assert isinstance(audio, MiDashengEncoderConfig)
        assert isinstance(text, PreTrainedConfig)
        return audio, text


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Return a patch's bins and frames, from one number for both or from two."""
    first, second = (size, size) if isinstance(size, int) else size
    return first, second
