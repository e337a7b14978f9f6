"""Turn text and audio into the tensors that the model reads, as the published processor does.

The toolkit makes ids and labels itself (`data/chat_template.py`, `data/tokenization.py`); this class is for
those who use the model through transformers.
"""

import re
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from mdl_toolkit.model.lengths import audio_token_count


class MiDashengLMProcessor(ProcessorMixin):
    """Tokenise text with placeholders for audio, and pad clips."""

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
        rate = sampling_rate or audio_kwargs.get("sampling_rate")
        wanted = self.feature_extractor.sampling_rate
        if rate not in (None, wanted):
            raise ValueError(f"audio at {rate} Hz: the model wants {wanted} Hz; resample it first")
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        options |= kwargs.pop("text_kwargs", {}) | kwargs
        data: dict[str, Any] = {}
        if texts:
            data |= self.tokenizer(self._expand(texts, clips), **options)
            data.pop("token_type_ids", None)
        if clips:
            lengths = np.array([len(clip) for clip in clips], dtype=np.int64)
            padded = np.zeros((len(clips), lengths.max()), dtype=np.float32)
            for row, clip in zip(padded, clips, strict=True):
                row[: len(clip)] = clip
            data |= {"input_values": padded, "audio_length": lengths}
        return BatchFeature(data, tensor_type=options.get("return_tensors"))

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of the model's inputs."""
        return ["input_ids", "attention_mask", "input_values", "audio_length"]

    def _expand(self, texts: list[str], clips: list[np.ndarray]) -> list[str]:
        """Repeat each `<|AUDIO|>` once per audio token of its clip, between marks of beginning and end."""
        placeholders = sum(text.count(self.audio_token) for text in texts)
        if placeholders != len(clips):
            raise ValueError(
                f"the texts hold {placeholders} {self.audio_token} placeholders for {len(clips)} clips"
            )
        counts = iter([audio_token_count(len(c), subsample_factor=self.model_subsampling) for c in clips])

        def repeat(match: "re.Match[str]") -> str:
            audio = self.audio_token * next(counts)
            # Where one mark is there already, none is added.
            if match[1] or match[3]:
                return (match[1] or "") + audio + (match[3] or "")
            return self.audio_bos_token + audio + self.audio_eos_token

        token, bos, eos = map(re.escape, (self.audio_token, self.audio_bos_token, self.audio_eos_token))
        pattern = re.compile(f"({bos})?({token})({eos})?")
        return [pattern.sub(repeat, text) for text in texts]


def _clips(audio: Any) -> list[np.ndarray]:
    """Return one clip or several as a list of float32 arrays `[samples]`."""
    if audio is None or len(audio) == 0:
        return []
    clips = [np.asarray(clip, dtype=np.float32) for clip in (audio if np.ndim(audio[0]) > 0 else [audio])]
    for clip in clips:
        if clip.ndim != 1:
            raise ValueError(f"a clip has the shape {list(clip.shape)}; one channel is wanted, [samples]")
    return clips
