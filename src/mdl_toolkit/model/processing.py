"""Turn text and audio into the tensors that the model reads, as the published processor does.

The toolkit's own data path builds ids and labels itself (rooms `conversation` and `tokens`); this class is
for those who use the model through transformers.
"""

import re
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from mdl_toolkit.model.lengths import audio_token_count


class MiDashengLMProcessor(ProcessorMixin):
    """Join a tokenizer and a feature extractor that only pads."""

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        model_subsampling: int = 5,
        audio_token: str | None = None,
        audio_bos_token: str | None = None,
        audio_eos_token: str | None = None,
    ) -> None:
        self.model_subsampling = model_subsampling
        self.audio_token = str(audio_token or getattr(tokenizer, "audio_token", "<|AUDIO|>"))
        self.audio_bos_token = str(audio_bos_token or getattr(tokenizer, "audio_bos_token", "<|audio_bos|>"))
        self.audio_eos_token = str(audio_eos_token or getattr(tokenizer, "audio_eos_token", "<|audio_eos|>"))
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenise text, padded on the left, and pad clips on the right.

        Args:
            text: one or several texts; each `<|AUDIO|>` stands for the next clip.
            audio: one clip or several, each `[samples]`.
            sampling_rate: of the clips; must be the model's 16,000 if given.
            kwargs: for the tokenizer, as keywords or as `text_kwargs`; `audio_kwargs` are the clips'.

        Returns:
            `input_ids`, `attention_mask` and, with audio, `input_values` `[clips, longest]` float32 and
            `audio_length` `[clips]` in samples.

        Raises:
            ValueError: the rate is wrong, a clip has channels, or placeholders and clips differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        clips = _clips(audio)
        audio_kwargs = {**kwargs.pop("audio_kwargs", {}), **kwargs.pop("common_kwargs", {})}
        self._check_rate(sampling_rate or audio_kwargs.get("sampling_rate"))
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        options |= kwargs.pop("text_kwargs", {}) | kwargs
        data: dict[str, Any] = {}
        if texts:
            data |= self.tokenizer(self._expand(texts, clips), **options)
            data.pop("token_type_ids", None)
        if clips:
            data |= _pad(clips)
        return BatchFeature(data, tensor_type=options.get("return_tensors"))

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of the model's inputs."""
        return ["input_ids", "attention_mask", "input_values", "audio_length"]

    def _check_rate(self, rate: int | None) -> None:
        wanted = self.feature_extractor.sampling_rate
        if rate not in (None, wanted):
            raise ValueError(f"audio at {rate} Hz: the model wants {wanted} Hz; resample it first")

    def _expand(self, texts: list[str], clips: list[np.ndarray]) -> list[str]:
        """Repeat each `<|AUDIO|>` once per audio token of its clip."""
        found = sum(text.count(self.audio_token) for text in texts)
        if found != len(clips):
            raise ValueError(f"the texts hold {found} {self.audio_token} placeholders for {len(clips)} clips")
        counts = iter([audio_token_count(len(c), subsample_factor=self.model_subsampling) for c in clips])
        token, bos, eos = map(re.escape, (self.audio_token, self.audio_bos_token, self.audio_eos_token))
        pattern = re.compile(f"({bos})?({token})({eos})?")
        return [pattern.sub(lambda match: self._repeat(match, next(counts)), text) for text in texts]

    def _repeat(self, match: "re.Match[str]", count: int) -> str:
        """Return `count` placeholders, with beginning and end marks where neither is there."""
        body = self.audio_token * count
        if match[1] or match[3]:
            return (match[1] or "") + body + (match[3] or "")
        return self.audio_bos_token + body + self.audio_eos_token


def _clips(audio: Any) -> list[np.ndarray]:
    if audio is None or len(audio) == 0:
        return []
    clips = [np.asarray(clip, dtype=np.float32) for clip in (audio if np.ndim(audio[0]) > 0 else [audio])]
    for clip in clips:
        if clip.ndim != 1:
            raise ValueError(f"a clip has the shape {list(clip.shape)}; one channel is wanted, [samples]")
    return clips


def _pad(clips: list[np.ndarray]) -> dict[str, np.ndarray]:
    lengths = np.array([len(clip) for clip in clips], dtype=np.int64)
    padded = np.zeros((len(clips), lengths.max()), dtype=np.float32)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    return {"input_values": padded, "audio_length": lengths}
