"""Say which tokens of a batch are computed and where attention finds them; move tensors there and back.

All of it follows from ids, masks and lengths alone. Made on the CPU, beside a device that computes, it makes
nobody wait.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Hold tensors, and other plans, that go to a device together."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """Copy the tensors to a device; accelerate calls this where layers are on several."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a plan with another tensor for each of its tensors."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                changed[field.name] = change(value) if isinstance(value, Tensor) else value.map(change)
        return replace(self, **changed)


@dataclass(frozen=True)
class TokenLayout(Plan):
    """Map packed tokens to sequences padded on the right, and back.

    Attributes:
        gather: index of each sequence's tokens, `[sequences, longest]`; any index at padding.
        scatter: index of each token in a flattened `gather`, `[tokens]`.
        duplicates: indices in a flattened `gather` of a shared prefix's tokens, in all sequences but the one
            that `scatter` has them from; None where no gradient comes from these.
    """

    gather: Tensor
    scatter: Tensor
    duplicates: Tensor | None

    def pad(self, x: Tensor) -> Tensor:
        """Lay `[tokens, ...]` out as `[sequences, longest, ...]`; padding holds arbitrary numbers."""
        padded: Tensor = _Pad.apply(x, self.gather, self.scatter, self.duplicates)
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        """Take the tokens `[tokens, ...]` out of `[sequences, longest, ...]`."""
        tokens: Tensor = _Unpad.apply(x, self.scatter)
        return tokens

    def select(self, tokens: Tensor) -> "TokenLayout":
        """Return the layout of some tokens `[selected]` alone; the others count as padding."""
        number = torch.zeros_like(self.scatter)
        number[tokens] = torch.arange(len(tokens), device=tokens.device)
        return TokenLayout(number[self.gather], self.scatter[tokens], None)


@dataclass(frozen=True)
class PackedTokens(TokenLayout):
    """Hold which tokens of a batch are computed, and where attention finds them.

    Attributes:
        source: index of each token in a flattened `[sequences, length]` batch, `[tokens]`.
        positions: of each token in its sequence, from 0, `[tokens]`.
    """

    source: Tensor
    positions: Tensor

    @staticmethod
    def of(mask: Tensor, prefix_ids: Tensor | None = None) -> "PackedTokens":
        """Pack the tokens that are true in a mask `[sequences, length]`.

        Sequences share a prefix with the same `prefix_ids`, `[sequences, length]`; negative ids are unique.
        """
        source = true_indices(mask)
        counts = mask.sum(1, keepdim=True)
        starts = counts.cumsum(0) - counts
        column = torch.arange(int(counts.max()), device=mask.device)
        is_real = column < counts
        gather = torch.where(is_real, starts + column, 0)
        positions = source % mask.shape[1]
        positions = positions - positions[gather[:, :1]].expand_as(gather)[is_real]
        if prefix_ids is None:
            return PackedTokens(gather, true_indices(is_real), gather.new_zeros(0), source, positions)
        # Keep one copy of each shared prefix.
        ids = prefix_ids.flatten()[source]
        keys = torch.where(ids < 0, ids, ids * mask.shape[1] + positions)
        owner = _owners(torch.where(is_real, keys[gather], -1), gather)
        is_own = (owner == gather) & is_real
        kept = is_own[is_real]
        number = (kept.cumsum(0) - 1).clamp_(0)
        duplicates = true_indices(is_real & ~is_own)
        return PackedTokens(number[owner], true_indices(is_own), duplicates, source[kept], positions[kept])


def true_indices(mask: Tensor) -> Tensor:
    """Return the indices at which a flattened mask is true, `[count]`."""
    return mask.flatten().nonzero().squeeze(1)


def _owners(keys: Tensor, gather: Tensor) -> Tensor:
    """Return `gather` with one sequence's tokens in place of the same prefix in other sequences.

    Sorted, sequences with the same prefix are neighbours; the first of them owns it.

    Args:
        keys: `[sequences, longest]`, equal where tokens are shared; negative where none is.
        gather: index of each token, `[sequences, longest]`.
    """
    width = max(1, int(((keys < 0).cumsum(1) == 0).sum(1).max()))
    head = keys[:, :width]
    order = torch.unique(head, dim=0, return_inverse=True)[1].argsort(stable=True)
    is_same_as_before = (head[order[1:]] == head[order[:-1]]).cumprod(1).bool()
    number = torch.arange(len(head), device=head.device).unsqueeze(1).repeat(1, width)
    number[1:].masked_fill_(is_same_as_before, 0)
    owner = torch.empty_like(head).index_copy_(0, order, order[number.cummax(0).values])
    return torch.cat([gather[:, :width].gather(0, owner), gather[:, width:]], 1)


@dataclass(frozen=True)
class PackingPlan(Plan):
    """Hold which tokens of a batch a decoder computes, and at which of them its last states are wanted.

    It follows from ids and lengths alone: made on the CPU, it makes no other device wait.

    Attributes:
        packed: the tokens.
        wanted: indices of those whose states are wanted among them, `[wanted]`.
        queries: where attention finds the wanted ones alone.
    """

    packed: PackedTokens
    wanted: Tensor
    queries: TokenLayout

    @staticmethod
    def of(needed: Tensor, wanted: Tensor, prefix_ids: Tensor | None = None) -> "PackingPlan":
        """Plan a batch.

        Args:
            needed: `[sequences, length]`, false at padding and where no wanted token follows.
            wanted: `[sequences, length]`, true where states are wanted; needed ones.
            prefix_ids: `[sequences, length]` ids of the tokens, negative and unique where they come from
                audio or states are wanted; None to share no prefix.
        """
        packed = PackedTokens.of(needed, prefix_ids)
        indices = true_indices(wanted.flatten().index_select(0, packed.source))
        return PackingPlan(packed, indices, packed.select(indices))


class _Pad(torch.autograd.Function):
    """Lay `[tokens, ...]` out as `[sequences, longest, ...]`; nobody reads what is padding.

    Gradients are taken at `scatter`, and those at the duplicates of a shared prefix are added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, scatter: Tensor, duplicates: Tensor | None) -> Tensor:
        ctx.save_for_backward(gather, scatter, duplicates)
        return x.index_select(0, gather.flatten()).unflatten(0, tuple(gather.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gather, scatter, duplicates = ctx.saved_tensors
        flat = gradient.flatten(0, 1)
        to_x = flat.index_select(0, scatter)
        if duplicates is not None and len(duplicates):
            # In float32 at least, as a GPU rounds each sum.
            wide = to_x.to(torch.promote_types(to_x.dtype, torch.float32))
            wide.index_add_(0, gather.flatten()[duplicates], flat.index_select(0, duplicates).to(wide.dtype))
            to_x = wide.to(to_x.dtype)
        return to_x, None, None, None


class _Unpad(torch.autograd.Function):
    """Take `[tokens, ...]` from `[sequences, longest, ...]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        to_x = gradient.new_zeros(ctx.shape)
        to_x.flatten(0, 1).index_copy_(0, ctx.saved_tensors[0], gradient)
        return to_x, None
