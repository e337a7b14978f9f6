"""Compute the decoder's states for the loss, over the real positions of a batch and nothing else.

All positions of all rows lie in one row, `[positions, hidden_size]`. Only attention sees rows, padded on the
right: causal attention needs no mask then. The last layer goes on with the positions that are asked for.
A position depends on what comes before it and on nothing else, so words with which several rows begin, as
with a system prompt, are computed once for all of them.
The layers are transformers' own, with their weights; plain operations that pass over a tensor several times
are functions with a gradient of their own here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


@dataclass(frozen=True)
class Places:
    """Hold where attention finds positions.

    Attributes:
        gather: positions of each row from the left, `[rows, longest]`; any one where there is none.
        scatter: place of each position in a flattened `gather`, `[positions]`.
        again: places in a flattened `gather` where a position stands that `scatter` finds elsewhere; None
            where nobody reads these.
    """

    gather: Tensor
    scatter: Tensor
    again: Tensor | None

    def places_of(self, only: Tensor) -> "Places":
        """Return the places of these positions alone; where there was another, there is any one."""
        number = torch.zeros_like(self.scatter)
        number[only] = torch.arange(len(only), device=only.device)
        return Places(number[self.gather], self.scatter[only], None)


@dataclass(frozen=True)
class Rows(Places):
    """Hold which positions there are, and where attention finds them.

    Attributes:
        real: place of each position in a flattened `[rows, length]` batch, `[positions]`.
        columns: how far each position is from the beginning of its row, `[positions]`.
    """

    real: Tensor
    columns: Tensor

    @staticmethod
    def of(mask: Tensor, words: Tensor | None = None) -> "Rows":
        """Return the positions that are true in `[rows, length]`.

        Rows share those up to which they have the same `words`, `[rows, length]`; negative ones are unique.
        """
        real = _places(mask)
        counts = mask.sum(1, keepdim=True)
        starts = counts.cumsum(0) - counts
        place = torch.arange(int(counts.max()), device=mask.device)
        there = place < counts
        gather = torch.where(there, starts + place, 0)
        columns = real % mask.shape[1]
        columns = columns - columns[gather[:, :1]].expand_as(gather)[there]
        rows = Rows(gather, _places(there), gather.new_zeros(0), real, columns)
        return rows if words is None else rows._sharing(words.flatten()[real], there, mask.shape[1])

    def _sharing(self, words: Tensor, there: Tensor, length: int) -> "Rows":
        """Share prefixes of equal `words` `[positions]`; `there` is true where `gather` has a position."""
        found = torch.where(words < 0, words, words * length + self.columns)
        read = _by_owners(torch.where(there, found[self.gather], -1), self.gather)
        own = (read == self.gather) & there
        kept = own[there]
        number = (kept.cumsum(0) - 1).clamp_(0)
        return Rows(number[read], _places(own), _places(there & ~own), self.real[kept], self.columns[kept])


def _places(mask: Tensor) -> Tensor:
    """Return where a mask is true, when it is flattened."""
    return mask.flatten().nonzero().squeeze(1)


def _by_owners(words: Tensor, gather: Tensor) -> Tensor:
    """Return positions of rows, with one row's own in place of those of a shared prefix in others.

    Sorted, rows with the same beginning are neighbours; the first of them owns it.

    Args:
        words: `[rows, longest]`, negative where nothing is to be shared.
        gather: position of each, `[rows, longest]`.
    """
    until = max(1, int(((words < 0).cumsum(1) == 0).sum(1).max()))
    head = words[:, :until]
    order = torch.unique(head, dim=0, return_inverse=True)[1].argsort(stable=True)
    # With the neighbour before.
    alike = (head[order[1:]] == head[order[:-1]]).cumprod(1)
    number = torch.arange(len(head), device=head.device).unsqueeze(1).repeat(1, until)
    number[1:].masked_fill_(alike.bool(), 0)
    owner = torch.empty_like(head).index_copy_(0, order, order[number.cummax(0).values])
    return torch.cat([gather[:, :until].gather(0, owner), gather[:, until:]], 1)


class PackedLayer(nn.Module):
    """Compute a decoder layer of transformers, also for positions of several rows in one."""

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Tensor:
        """Map `[positions, hidden_size]` with `rows`, and whatever transformers does without."""
        if rows is None:
            plain: Tensor = super().forward(hidden_states, *args, **kwargs)
            return plain
        return self._packed(hidden_states, rows, *args, **kwargs)

    def _packed(self, x: Tensor, rows: Rows, cos: Tensor, sin: Tensor, only: Tensor | None) -> Tensor:
        """Compute the layer; `cos`, `sin` `[positions, 1, head_dim]`, `only` the positions to go on with."""
        found = self._attended(normed(self.input_layernorm, x), rows, cos, sin, only)
        if only is not None:
            x = x.index_select(0, only)
        x = x + self.self_attn.o_proj(found)
        gate, up = together(normed(self.post_attention_layernorm, x), self.mlp.gate_proj, self.mlp.up_proj)
        return x + self.mlp.down_proj(gated(self.mlp.act_fn, gate, up))

    def _attended(self, x: Tensor, rows: Rows, cos: Tensor, sin: Tensor, only: Tensor | None) -> Tensor:
        attention = self.self_attn
        q, k, v = self._asked(x, cos, sin, only)
        asking = Places(rows.gather, rows.scatter, None) if only is None else rows.places_of(only)
        dropout = attention.attention_dropout if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        placed = _placed(q, asking), _placed(k, rows), _placed(v, rows)
        words = (part.transpose(1, 2) for part in placed)
        out, _ = attend(attention, *words, None, dropout=dropout, scaling=attention.scaling, is_causal=True)
        return _Taken.apply(out.flatten(2), asking.scatter)

    def _asked(
        self, x: Tensor, cos: Tensor, sin: Tensor, only: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries of `only`, keys and values of all positions: `[positions, heads, head_dim]`."""
        attention, turn = self.self_attn, (cos, sin)
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        if only is None:
            q, k, v = together(x, *layers)
        else:
            q, (k, v) = layers[0](x.index_select(0, only)), together(x, *layers[1:])
            turn = cos.index_select(0, only), sin.index_select(0, only)
        q, k, v = (part.view(len(part), -1, attention.head_dim) for part in (q, k, v))
        if hasattr(attention, "q_norm"):
            q, k = normed(attention.q_norm, q), normed(attention.k_norm, k)
        return _Rotated.apply(q, *turn), _Rotated.apply(k, cos, sin), v


def _placed(x: Tensor, places: Places) -> Tensor:
    """Lay `[positions, ...]` out as `[rows, longest, ...]`; places that nobody reads hold anything."""
    found: Tensor = _Placed.apply(x, places.gather, places.scatter, places.again)
    return found


class PackedQwen2Layer(PackedLayer, Qwen2DecoderLayer):
    """Compute a layer of Qwen2."""


class PackedQwen3Layer(PackedLayer, Qwen3DecoderLayer):
    """Compute a layer of Qwen3."""


PACKED = {Qwen2DecoderLayer: PackedQwen2Layer, Qwen3DecoderLayer: PackedQwen3Layer}


def can_pack(config: Any) -> bool:
    """Tell whether a decoder of this configuration attends to all that came before, by torch."""
    return config._attn_implementation == "sdpa" and set(config.layer_types) == {"full_attention"}


def is_random(model: Any) -> bool:
    """Tell whether something is dropped in a decoder, so that each row is to be computed by itself."""
    if not model.training:
        return False
    drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in model.modules())
    return drops or bool(model.config.attention_dropout)


def packed_states(
    model: Any, embeddings: Tensor, needed: Tensor, wanted: Tensor, words: Tensor | None = None
) -> Tensor:
    """Return the decoder's last states at the wanted positions alone, `[wanted, hidden_size]`, row after row.

    Args:
        model: transformers' decoder without its head; its layers are packed ones.
        embeddings: `[rows, length, hidden_size]`.
        needed: `[rows, length]`, false at padding and where nothing wanted follows.
        wanted: `[rows, length]`, true where states are wanted; needed ones.
        words: `[rows, length]` ids that the embeddings come from, negative and unique where they come from
            something else or states are wanted; None to compute each row by itself.
    """
    rows = Rows.of(needed, words)
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    cos, sin = (
        part[0].index_select(0, rows.columns).unsqueeze(1)
        for part in model.rotary_emb(embeddings, columns.unsqueeze(0))
    )
    x = embeddings.flatten(0, 1).index_select(0, rows.real)
    only = wanted.flatten().index_select(0, rows.real).nonzero().squeeze(1)
    *others, last = model.layers
    for layer in others:
        x = layer(x, cos, sin, None, rows=rows)
    # Attention would have no query.
    if not len(only):
        return normed(model.norm, last(x, cos, sin, None, rows=rows)).index_select(0, only)
    return normed(model.norm, last(x, cos, sin, only, rows=rows))


# --- parts of a layer ----------------------------------------------------------------------------------


def together(x: Tensor, *layers: Any) -> Sequence[Tensor]:
    """Compute linear layers of one input; in one go, where they can."""
    found: Sequence[Tensor] | None = None
    if hasattr(layers[0], "together"):
        found = layers[0].together(x, layers)
    return [layer(x) for layer in layers] if found is None else found


def normed(norm: Any, x: Tensor) -> Tensor:
    """Compute an RMS norm of Qwen of `[..., width]`."""
    if norm.weight.requires_grad:
        return norm(x)
    return _Normed.apply(x, norm.weight, norm.variance_epsilon)


def gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Compute activation(gate) * up."""
    if not isinstance(activation, nn.SiLU | SiLUActivation):
        return activation(gate) * up
    return _Gated.apply(gate, up)


class _Normed(torch.autograd.Function):
    """Compute x / sqrt(mean(x^2) + eps), rounded to the dtype of x, times a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return _times(weight, (wide * scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        to_normed = (gradient * weight).float()
        wide = x.float() * scale
        share = torch.linalg.vecdot(to_normed, wide).unsqueeze(-1).div_(-x.shape[-1])
        return to_normed.addcmul_(wide, share).mul_(scale).to(x.dtype), None, None


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply them, in place where the product's dtype is that of `x`."""
    return x.mul_(weight) if weight.dtype == x.dtype else weight * x


class _Gated(torch.autograd.Function):
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


class _Rotated(torch.autograd.Function):
    """Rotate: x cos + (-second half of x, first half of x) sin; both halves of cos and sin are the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    found = x * cos
    found[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-sign)
    found[..., half:].addcmul_(x[..., :half], sin[..., :half], value=sign)
    return found


class _Placed(torch.autograd.Function):
    """Lay `[positions, ...]` out as `[rows, longest, ...]`; nobody reads what is padding.

    Gradients are taken from `scatter`, and added to from the places `again`, if anyone reads these.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, scatter: Tensor, again: Tensor | None) -> Tensor:
        ctx.save_for_backward(gather, scatter, again)
        return x.index_select(0, gather.flatten()).unflatten(0, tuple(gather.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gather, scatter, again = ctx.saved_tensors
        flat = gradient.flatten(0, 1)
        found = flat.index_select(0, scatter)
        if again is not None and len(again):
            # In float32 at least, as a GPU rounds each sum.
            wide = found.to(torch.promote_types(found.dtype, torch.float32))
            wide.index_add_(0, gather.flatten()[again], flat.index_select(0, again).to(wide.dtype))
            found = wide.to(found.dtype)
        return found, None, None, None


class _Taken(torch.autograd.Function):
    """Take `[positions, width]` from `[rows, longest, width]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found = gradient.new_zeros(ctx.shape)
        found.flatten(0, 1).index_copy_(0, ctx.saved_tensors[0], gradient)
        return found, None
