"""Compute the decoder's states for the loss over the real tokens of a batch, without padding.

All tokens of all sequences are packed into one, `[tokens, hidden_size]`. Only attention sees sequences,
padded on the right: causal attention needs no mask then. The last layer goes on with supervised tokens alone.
A token's states depend on what comes before it and on nothing else, so a prefix that several sequences
share, such as a system prompt, is computed once for all of them.
The layers are transformers' own, with their weights; plain operations that pass over a tensor several times
are functions with a gradient of their own here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from mdl_toolkit.model.kernels.norms import rms_norm
from mdl_toolkit.model.packing import PackedTokens, PackingPlan, TokenLayout


class PackedLayer(nn.Module):
    """Compute a decoder layer of transformers, also over packed tokens."""

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed: PackedTokens | None = None,
        queries: TokenLayout | None = None,
        keep: Callable[[Tensor, Tensor], None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the layer, as transformers' layer does unless `packed` says where tokens are.

        Args:
            hidden_states: `[tokens, hidden_size]` if packed.
            args: if packed, the cosines and sines of the rotary embedding, each `[tokens, 1, head_dim]`, and
                the indices of the tokens to go on with, None for all.
            packed: where the tokens are.
            queries: where the tokens to go on with are, if not all do.
            keep: is given the padded keys and values.
            kwargs: for transformers' layer.

        Returns:
            `[tokens or selected, hidden_size]` if packed.
        """
        if packed is None:
            plain: Tensor = super().forward(hidden_states, *args, **kwargs)
            return plain
        x, (cos, sin, selected) = hidden_states, args
        whole = TokenLayout(packed.gather, packed.scatter, None)
        attended = self._attend(x, packed, queries or whole, cos, sin, selected, keep)
        return self.finish(x if selected is None else x.index_select(0, selected), attended)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Compute the layer from attention's output `[tokens, heads * head_dim]` on."""
        x = x + self.self_attn.o_proj(attended)
        normed = rms_norm(self.post_attention_layernorm, x)
        gate, up = linear_group(normed, self.mlp.gate_proj, self.mlp.up_proj)
        return x + self.mlp.down_proj(gated_linear_unit(self.mlp.act_fn, gate, up))

    # Not in line: what is made here is to be freed before the MLP.
    def _attend(
        self,
        x: Tensor,
        packed: PackedTokens,
        queries: TokenLayout,
        cos: Tensor,
        sin: Tensor,
        selected: Tensor | None,
        keep: Any,
    ) -> Tensor:
        """Attend within sequences: `[tokens, hidden_size]` to `[tokens or selected, heads * head_dim]`."""
        attention = self.self_attn
        q, k, v = self.queries_keys_values(x, cos, sin, selected)
        dropout = attention.attention_dropout if self.training else 0.0
        heads_first = [part.transpose(1, 2) for part in (queries.pad(q), packed.pad(k), packed.pad(v))]
        if keep is not None:
            keep(*heads_first[1:])
        out, _ = sdpa_attention_forward(
            attention, *heads_first, None, dropout=dropout, scaling=attention.scaling, is_causal=True
        )
        return queries.unpad(out.flatten(2))

    def queries_keys_values(
        self, x: Tensor, cos: Tensor, sin: Tensor, selected: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of the selected tokens, keys and values of all: `[tokens, heads, head_dim]`."""
        x = rms_norm(self.input_layernorm, x)
        attention, angles = self.self_attn, (cos, sin)
        q_proj, k_proj, v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        if selected is None:
            q, k, v = linear_group(x, q_proj, k_proj, v_proj)
        else:
            q, (k, v) = q_proj(x.index_select(0, selected)), linear_group(x, k_proj, v_proj)
            angles = cos.index_select(0, selected), sin.index_select(0, selected)
        q, k, v = (part.view(len(part), -1, attention.head_dim) for part in (q, k, v))
        if hasattr(attention, "q_norm"):
            q, k = rms_norm(attention.q_norm, q), rms_norm(attention.k_norm, k)
        return rotate(q, *angles), rotate(k, cos, sin), v


class PackedQwen2Layer(PackedLayer, Qwen2DecoderLayer):
    """Compute a layer of Qwen2."""


class PackedQwen3Layer(PackedLayer, Qwen3DecoderLayer):
    """Compute a layer of Qwen3."""


PACKED_LAYERS = {Qwen2DecoderLayer: PackedQwen2Layer, Qwen3DecoderLayer: PackedQwen3Layer}


def can_drop(model: Any) -> bool:
    """Tell whether a decoder drops activations at random while it is trained, so that no prefix is shared."""
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())
    return drops or bool(model.config.attention_dropout)


def packed_states(
    model: Any,
    embeddings: Tensor,
    plan: PackingPlan,
    keep: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Compute the decoder's last states at the wanted tokens alone, `[wanted, hidden_size]`.

    Args:
        model: transformers' decoder without its head; its layers are packed ones.
        embeddings: `[sequences, length, hidden_size]`.
        plan: of the batch, on the device of the embeddings.
        keep: is given the number of each layer and its keys and values, each
            `[sequences, key heads, longest, head_dim]`.
    """
    packed, wanted = plan.packed, plan.wanted
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    cos, sin = (
        part[0].index_select(0, packed.positions).unsqueeze(1)
        for part in model.rotary_emb(embeddings, columns.unsqueeze(0))
    )
    x = embeddings.flatten(0, 1).index_select(0, packed.source)
    *others, last = [
        partial(layer, packed=packed, keep=keep and partial(keep, n)) for n, layer in enumerate(model.layers)
    ]
    for layer in others:
        x = layer(x, cos, sin, None)
    # Without a wanted token attention would have no query.
    x = last(x, cos, sin, wanted, queries=plan.queries) if len(wanted) else last(x, cos, sin, None)[:0]
    # Where a `device_map` spreads the layers, it may be elsewhere.
    return rms_norm(model.norm, x.to(model.norm.weight.device))


# --- parts of a layer ----------------------------------------------------------------------------------


def linear_group(x: Tensor, *layers: Any) -> Sequence[Tensor]:
    """Compute linear layers of the same input `[..., in]`, in one go where they can: each `[..., out]`."""
    outputs: Sequence[Tensor] | None = None
    if hasattr(layers[0], "forward_group"):
        outputs = layers[0].forward_group(x, layers)
    return [layer(x) for layer in layers] if outputs is None else outputs


def gated_linear_unit(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Compute activation(gate) * up, all `[..., intermediate_size]`."""
    if not isinstance(activation, nn.SiLU | SiLUActivation):
        return activation(gate) * up
    return _SwiGLU.apply(gate, up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[tokens, heads, head_dim]` by the angles of a rotary embedding, `[tokens, 1, head_dim]`."""
    rotated: Tensor = _Rotate.apply(x, cos, sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """Compute x * cos + rotate_half(x) * sin; plain autograd fills gradients of halves with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return x * cos + rotate_half(x) * sin

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        to_plain, to_rotated = ((gradient * each).to(ctx.dtype) for each in ctx.saved_tensors)
        first, second = to_rotated.chunk(2, -1)
        return to_plain.add_(torch.cat([second, first.neg()], -1)), None, None


class _SwiGLU(torch.autograd.Function):
    """Compute silu(gate) * up; silu(gate) is computed again rather than kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_up = functional.silu(gate).mul_(gradient)
        to_gate = gradient * up
        return torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate), to_up
