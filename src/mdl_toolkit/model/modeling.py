"""Compute MiDashengLM: audio encoder, projector and Qwen decoder as one transformers model.

The decoder and its generation loop are transformers' own. No file is read but by `from_pretrained`, and no
code from a checkpoint is ever run.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mdl_toolkit.model.configuration import MiDashengLMConfig
from mdl_toolkit.model.constants import IGNORE_INDEX
from mdl_toolkit.model.encoder import AcousticEncoder, AudioProjector, LayerScale, MiDashengEncoder
from mdl_toolkit.model.kernels.cross_entropy import head_loss, slice_size
from mdl_toolkit.model.packed_decoder import PACKED_LAYERS, can_drop, packed_states
from mdl_toolkit.model.packing import PackingPlan, Plan, true_indices
from mdl_toolkit.model.transformers_names import CACHE_NAMES

# Inputs of the decoder that the loss does not heed.
UNHEEDED = ("position_ids", *CACHE_NAMES)
# Tensors that a message names of each kind.
MOST_LISTED = 20


class CheckpointError(ValueError):
    """Report that a checkpoint's tensors do not fit the model; the message names them."""


@dataclass
class MiDashengLMOutput(CausalLMOutputWithPast):
    """Hold what a forward pass returns.

    Attributes:
        loss: cross entropy over the supervised tokens; with `labels` only.
        logits: `[batch, tokens, vocabulary]`; without `labels`, or when asked for.
        past_key_values: the decoder's cache, when it is used; `cache` from transformers 5.24 on.
    """


@dataclass(frozen=True)
class LossPlan(Plan):
    """Hold where a batch's tokens go on their way to the loss, which follows from ids and labels alone.

    Attributes:
        packing: the tokens that the decoder computes, and those that predict a supervised one.
        targets: what they predict, `[supervised]` ids.
        placeholders: index of each audio placeholder in the flattened batch, `[audio tokens]`.
    """

    packing: PackingPlan
    targets: Tensor
    placeholders: Tensor


class MiDashengLMModel(PreTrainedModel, GenerationMixin):
    """Answer prompts that hold audio.

    The interface is the published one: `input_ids` and `attention_mask` `[batch, tokens]`, padded on the
    left, with one `<|AUDIO|>` placeholder per audio token; `input_values` `[clips, longest]`, zero-padded on
    the right; `audio_length` `[clips]` in samples; clips in the order of their placeholders.
    """

    config_class = MiDashengLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiDashengEncoderBlock", "PackedQwen2Layer", "PackedQwen3Layer"]  # noqa: RUF012
    _skip_keys_device_placement = "past_key_values"
    # Each by name: `init_bn` alone would make a float of the counter `num_batches_tracked` too.
    _keep_in_fp32_modules_strict = {  # noqa: RUF012
        "init_bn.weight",
        "init_bn.bias",
        "init_bn.running_mean",
        "init_bn.running_var",
    }
    _keys_to_ignore_on_load_unexpected = [r"^audio_encoder\.(\w+\.)?front_end\."]  # noqa: RUF012
    # Share of a token's target that goes to all tokens alike, in training mode.
    label_smoothing = 0.0
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    _tied_weights_keys = {"decoder.lm_head.weight": "decoder.model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MiDashengLMConfig) -> None:
        super().__init__(config)
        audio, text = config.parts
        self.audio_encoder = (AcousticEncoder if audio.n_mels_patch else MiDashengEncoder)(audio)
        self.audio_projector = AudioProjector(audio.embed_dim, text.hidden_size, config.subsample_factor)
        self.decoder = (Qwen3ForCausalLM if text.model_type == "qwen3" else Qwen2ForCausalLM)(text)
        for layer in self.decoder.model.layers:
            layer.__class__ = PACKED_LAYERS[type(layer)]
        # The whole model's settings are the only ones.
        self.decoder.generation_config = GenerationConfig()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the weights that a module holds itself; transformers calls this for each."""
        super()._init_weights(module)
        if isinstance(module, MiDashengEncoder):
            nn.init.trunc_normal_(module.time_pos_embed, std=0.02)
            nn.init.trunc_normal_(module.freq_pos_embed, std=0.02)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, self.config.audio_encoder_config.init_values)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as transformers does, but accept no tensor too many, none too few and none of another shape.

        Raises:
            CheckpointError: naming tensors that are unknown, missing or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # Mismatched sizes are let through there and refused here, where the message names them.
        ours = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, **ours})
        wrong = {
            "unknown": sorted(info["unexpected_keys"]),
            "missing": sorted(info["missing_keys"]),
            "of another shape": sorted(
                f"{key} {list(found)} instead of {list(wanted)}"
                for key, found, wanted in info["mismatched_keys"]
            ),
        }
        problems = []
        for problem, names in wrong.items():
            more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
            if names:
                problems.append(f"{problem}: {', '.join(names[:MOST_LISTED])}{more}")
        if problems:
            name = pretrained_model_name_or_path
            raise CheckpointError(f"{name}: tensors that do not fit this model; " + "; ".join(problems))
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's word embeddings."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's word embeddings."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's output head."""
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's output head."""
        self.decoder.set_output_embeddings(value)

    def audio_features(self, input_values: Tensor, audio_length: Tensor | list[int] | None = None) -> Tensor:
        """Encode and project clips.

        Args:
            input_values: `[clips, longest]` samples at 16 kHz.
            audio_length: `[clips]` in samples, a tensor or numbers; all have the longest if not given.

        Returns:
            `[audio tokens of all clips, hidden_size]`.
        """
        longest = [input_values.shape[-1]] * len(input_values)
        given = audio_length.tolist() if isinstance(audio_length, Tensor) else audio_length
        lengths = longest if given is None else given
        encoded, layout = self.audio_encoder(input_values, lengths)
        return self.audio_projector(encoded, layout)

    def fuse(
        self,
        input_ids: Tensor | None,
        input_values: Tensor | None,
        audio_length: Tensor | list[int] | None,
        audio_features: Tensor | None = None,
        placeholders: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens, and put audio features in the place of the placeholders' embeddings.

        Args:
            input_ids: `[batch, tokens]`.
            input_values: `[clips, longest]` samples at 16 kHz.
            audio_length: `[clips]` in samples.
            audio_features: `[audio tokens of all clips, hidden_size]`, in place of the clips.
            placeholders: index of each placeholder in flattened ids, `[audio tokens]`, if they are known.

        Returns:
            `[batch, tokens, hidden_size]`.

        Raises:
            ValueError: there are no ids, or not as many placeholders as audio features.
        """
        if input_ids is None:
            raise ValueError("neither input_ids nor inputs_embeds are given")
        embeddings = self.get_input_embeddings()(input_ids)
        if placeholders is None:
            placeholders = true_indices(input_ids == self.config.audio_token_id)
        if audio_features is not None:
            features = audio_features
        elif input_values is None:
            features = embeddings.new_zeros(0, embeddings.shape[-1])
        else:
            features = self.audio_features(input_values, audio_length)
        if len(placeholders) != len(features):
            raise ValueError(
                f"input_ids hold {len(placeholders)} audio placeholders, "
                f"but the clips give {len(features)} features"
            )
        there = features.to(embeddings.device, embeddings.dtype)
        return embeddings.flatten(0, 1).index_copy(0, placeholders, there).view_as(embeddings)

    def prefix_ids(self, ids: Tensor, apart: Tensor | None = None) -> Tensor:
        """Return ids by which a shared prefix is found: unique negative ones in the place of audio.

        Args:
            ids: `[batch, tokens]`.
            apart: `[batch, tokens]`, true where nothing is to be shared either.

        Returns:
            `[batch, tokens]`.
        """
        unique = -2 - torch.arange(ids.numel(), device=ids.device).view_as(ids)
        is_audio = ids == self.config.audio_token_id
        return torch.where(is_audio if apart is None else is_audio | apart, unique, ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_length: Tensor | list[int] | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = False,
        audio_features: Tensor | None = None,
        plan: LossPlan | None = None,
        **kwargs: Any,
    ) -> MiDashengLMOutput:
        """Compute the loss, the logits, or both.

        Args:
            input_ids: `[batch, tokens]`.
            attention_mask: `[batch, tokens]`, 0 at the padding on the left.
            input_values: `[clips, longest]` samples at 16 kHz.
            audio_length: `[clips]` in samples, a tensor or numbers; all have the longest if not given.
            labels: `[batch, tokens]`, -100 where a token is not supervised; shifted here.
            inputs_embeds: fused embeddings in place of ids and audio.
            logits_to_keep: only the last so many tokens' logits (0: all).
            num_items_in_batch: divides the summed loss, if not the number of its supervised tokens.
            return_logits: give the whole logits although labels are given.
            audio_features: `[audio tokens, hidden_size]`, as of `audio_features`, in place of clips.
            plan: of ids, mask and labels, as of `plan_loss`, on this device; made here if not given.
            kwargs: passed on to the decoder; positions and a cache do not go with labels.
        """
        if labels is not None and plan is None:
            ids = input_ids if inputs_embeds is None else None
            made = self.plan_loss(ids, attention_mask, labels, is_training=self.decoder.training)
            plan = made.to(labels.device, non_blocking=True)
        if inputs_embeds is None:
            placeholders = None if plan is None else plan.placeholders
            inputs_embeds = self.fuse(input_ids, input_values, audio_length, audio_features, placeholders)
        loss = None
        if plan is not None:
            if unheeded := {*UNHEEDED} & {name for name, value in kwargs.items() if value is not None}:
                raise ValueError(f"labels do not go with {min(unheeded)}")
            loss = self._mean_loss(inputs_embeds, plan, num_items_in_batch)
            if not return_logits:
                return MiDashengLMOutput(loss=loss)
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "return_dict": True}
        outputs = dict(self.decoder.model(**{**kwargs, **inputs}))
        states = outputs.pop("last_hidden_state")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return MiDashengLMOutput(loss=loss, logits=self.decoder.lm_head(states[:, kept]), **outputs)

    def plan_loss(
        self, ids: Tensor | None, mask: Tensor | None, labels: Tensor, *, is_training: bool
    ) -> LossPlan:
        """Plan a loss without padding, and in the last layer at supervised tokens only, on the CPU.

        Args:
            ids: `[batch, tokens]` that the embeddings come from; None if not known.
            mask: `[batch, tokens]`, 0 at padding.
            labels: `[batch, tokens]`.
            is_training: dropout acts where there is some, and every sequence is computed by itself.
        """
        following = functional.pad(labels.cpu()[:, 1:], (0, 1), value=IGNORE_INDEX)
        supervised = following != IGNORE_INDEX
        real = torch.ones_like(supervised) if mask is None else mask.cpu().bool()
        supervised = supervised & real
        # Tokens after a sequence's last supervised one, the end of the chat's turn, change nothing.
        needed = real & ((supervised.flip(1).cumsum(1).flip(1) > 0) | ~supervised.any())
        prefix_ids, placeholders = None, torch.zeros(0, dtype=torch.int64)
        if ids is not None:
            ids = ids.cpu()
            shares_prefix = not (is_training and can_drop(self.decoder.model))
            placeholders = true_indices(ids == self.config.audio_token_id)
            prefix_ids = self.prefix_ids(ids, supervised) if shares_prefix else None
        packing = PackingPlan.of(needed, supervised, prefix_ids)
        return LossPlan(packing, following[supervised], placeholders)

    def _mean_loss(self, embeddings: Tensor, plan: LossPlan, divisor: int | Tensor | None) -> Tensor:
        """Average the cross entropy of embeddings `[batch, tokens, hidden_size]` over a plan's targets.

        The sum is divided by `divisor` where one is given. More than one slice of logits does not exist at
        once: the backward pass makes each slice again.
        """
        states, targets = packed_states(self.decoder.model, embeddings, plan.packing), plan.targets
        head: Any = self.decoder.lm_head
        smoothing = self.label_smoothing if self.training else 0.0
        is_linear = type(head) is nn.Linear
        if is_linear and head.bias is None and not head.weight.requires_grad:
            # Where a `device_map` spreads the layers, the head may be elsewhere.
            states, targets = states.to(head.weight.device), targets.to(head.weight.device)
            total = head_loss(states, head.weight, targets, smoothing)
        else:
            size = slice_size(len(targets), self.config.text_config.vocab_size)
            slices = zip(states.split(size), targets.split(size), strict=True)
            parts = [checkpoint(self._summed_loss, s, t, smoothing, use_reentrant=False) for s, t in slices]
            total = torch.stack(parts).sum()
        return total / (max(len(targets), 1) if divisor is None else divisor)

    def _summed_loss(self, states: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Sum the cross entropy of states `[tokens, hidden_size]` under a head of any kind."""
        logits = self.decoder.lm_head(states).float()
        targets = targets.to(logits.device)
        return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_length: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers' decoder does, but return the new tokens only, `[batch, new tokens]`.

        As there, keywords count before `generation_config`, and that before the model's own settings.
        """
        if inputs_embeds is None:
            inputs_embeds = self.fuse(input_ids, input_values, audio_length)
        settings = copy.deepcopy(kwargs.pop("generation_config", None) or GenerationConfig())
        settings.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        others = settings.update(**kwargs)
        return self.decoder.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, generation_config=settings, **others
        )
