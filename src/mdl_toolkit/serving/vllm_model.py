"""Compute MiDashengLM in vLLM: the toolkit's encoder and projector, and vLLM's own Qwen decoder.

The waveform reaches the encoder in float32 whatever the model's dtype, each clip is encoded as if alone, and
adapters apply to all three parts (encoder and projector with `--enable-tower-connector-lora`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.sequence import IntermediateTensors

from mdl_toolkit.model.constants import SAMPLE_RATE
from mdl_toolkit.model.encoder import AudioProjector, MiDashengEncoder
from mdl_toolkit.model.lengths import MIN_SAMPLES, audio_token_count, patch_count
from mdl_toolkit.model.processing import MiDashengLMProcessor

# Of the clip with which vLLM measures memory when it starts.
PROFILED_SECONDS = 30
# Window and filters, in some checkpoints.
FRONT_END = "audio_encoder.front_end."
DECODERS = {"qwen3": "Qwen3ForCausalLM"}


class MiDashengLMProcessingInfo(BaseProcessingInfo):
    """Tell vLLM which processor and which audio the model takes."""

    def get_hf_processor(self, **kwargs: object) -> MiDashengLMProcessor:
        """Load the toolkit's processor, whatever a folder's `auto_map` says."""
        processor: MiDashengLMProcessor = self.ctx.get_hf_processor(MiDashengLMProcessor, **kwargs)
        return processor

    def get_data_parser(self) -> MultiModalDataParser:
        """Return what makes mono samples at 16 kHz of a request's audio, with the toolkit's resampler."""
        return MultiModalDataParser(
            target_sr=SAMPLE_RATE,
            target_channels=1,
            audio_resample_method="soxr",
            expected_hidden_size=self._get_expected_hidden_size(),
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Allow any number of clips."""
        return {"audio": None}


class MiDashengLMDummyInputs(BaseDummyInputsBuilder[MiDashengLMProcessingInfo]):
    """Make the clips with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a placeholder for each clip."""
        return VllmMiDashengLM.get_placeholder_str("audio", 0) * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, MultiModalDummyOptions]
    ) -> MultiModalDataDict:
        """Return clips of silence."""
        count, overrides = mm_counts.get("audio", 0), mm_options.get("audio")
        length = PROFILED_SECONDS * SAMPLE_RATE
        return {"audio": self._get_dummy_audios(length=length, num_audios=count, overrides=overrides)}


class MiDashengLMMultiModalProcessor(BaseMultiModalProcessor[MiDashengLMProcessingInfo]):
    """Turn a request's clips into tensors, and its placeholders into as many as there are audio tokens."""

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """Pad clips; the bits of the waveform are passed as integers, as vLLM casts what is float."""
        clips: list[Tensor] = []
        for samples in hf_data["audio"]:  # type: ignore[attr-defined]
            clip = torch.as_tensor(samples, dtype=torch.float32)
            if not len(clip):
                raise ValueError("the audio has no samples")
            clips.append(nn.functional.pad(clip, (0, max(0, MIN_SAMPLES - len(clip)))))
        lengths = torch.tensor([len(clip) for clip in clips])
        bits = pad_sequence(clips, batch_first=True).view(torch.int32)
        return BatchFeature({"input_values": bits, "audio_length": lengths})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "input_values": MultiModalFieldConfig.batched("audio"),
            "audio_length": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().audio_token_id
        # Not there where vLLM has the clip already; then nothing is asked of them either.
        lengths = out_mm_kwargs.get_data().get("audio_length", ())
        return [
            PromptReplacement(
                modality="audio",
                target=[token],
                replacement=lambda item: [token] * audio_token_count(int(lengths[item])),
            )
        ]


@MULTIMODAL_REGISTRY.register_processor(
    MiDashengLMMultiModalProcessor, info=MiDashengLMProcessingInfo, dummy_inputs=MiDashengLMDummyInputs
)
class VllmMiDashengLM(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """Answer prompts that hold audio, in vLLM."""

    decoder: Any
    supports_tower_connector_lora = True
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """Return what stands for a clip where a chat template takes texts only."""
        if modality != "audio":
            raise ValueError("only audio is supported")
        return "<|audio_bos|><|AUDIO|><|audio_eos|>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: Any = vllm_config.model_config.hf_config
        audio, text = self.config.parts
        with self._mark_tower_model(vllm_config, "audio"):  # type: ignore[operator]
            self.audio_encoder = MiDashengEncoder(audio)
            self.audio_projector = AudioProjector(
                audio.embed_dim, text.hidden_size, self.config.subsample_factor
            )
            self.audio_encoder.init_bn.float()
            lora = vllm_config.lora_config
            # Without, these stay torch's own, and vLLM refuses adapters for them by name.
            if lora is not None and lora.enable_tower_connector_lora:
                use_vllm_linears(self.audio_encoder, maybe_prefix(prefix, "audio_encoder"))
                use_vllm_linears(self.audio_projector, maybe_prefix(prefix, "audio_projector"))
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.decoder = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "decoder"),
                architectures=[DECODERS.get(text.model_type, "Qwen2ForCausalLM")],
            )
        self.make_empty_intermediate_tensors = self.decoder.make_empty_intermediate_tensors

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return the names of decoder, projector and encoder."""
        return MultiModelKeys.from_string_field(
            language_model="decoder.", connector="audio_projector.", tower_model="audio_encoder."
        )

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: MultiModalKwargsItem | None, num_mm_embeds: int
    ) -> tuple[int, int]:
        """Count the rows of a clip in the encoder's and in the projector's linear layers.

        Args:
            modality: audio.
            mm_kwargs: the clip; None for the most that so many audio tokens may have.
            num_mm_embeds: its audio tokens.
        """
        if mm_kwargs is None:
            # A clip's last patches may make no token.
            return num_mm_embeds * (2 * self.config.subsample_factor - 1), num_mm_embeds
        audio, _ = self.config.parts
        patches = patch_count(int(mm_kwargs["audio_length"].data), audio.hop_length, audio.patch_frames)
        return patches, num_mm_embeds

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Encode and project clips; return each one's audio tokens, `[tokens, hidden_size]`."""
        if (bits := kwargs.get("input_values")) is None:
            return []
        waveforms = pad_sequence([clip.view(torch.float32) for clip in bits], batch_first=True)
        encoded, layout = self.audio_encoder(waveforms, [int(length) for length in kwargs["audio_length"]])
        tokens = [patches // self.config.subsample_factor for patches in layout.clips]
        return self.audio_projector(encoded, layout).split(tokens)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """Compute the decoder's states from embeddings in which audio tokens have their places."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.decoder.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute logits from the decoder's states."""
        logits: Tensor | None = self.decoder.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint, but window and filters, which are made here."""
        needed = ((name, tensor) for name, tensor in weights if not name.startswith(FRONT_END))
        loaded: set[str] = AutoWeightsLoader(self).load_weights(needed)
        return loaded


def use_vllm_linears(tower: nn.Module, prefix: str) -> None:
    """Replace a tower's linear layers by vLLM's, to which adapters can be added; each process has all."""
    for name, linear in [*tower.named_modules()]:
        if isinstance(linear, nn.Linear):
            has_bias, sizes = linear.bias is not None, (linear.in_features, linear.out_features)
            layer = ReplicatedLinear(*sizes, bias=has_bias, prefix=f"{prefix}.{name}", return_bias=False)
            tower.set_submodule(name, layer)
