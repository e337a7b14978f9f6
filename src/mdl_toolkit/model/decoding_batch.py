"""Decode a batch whose sequences come when a slot is free and leave when their answer is complete.

transformers' `generate` decodes every sequence of a batch until the longest answer is complete, and copies
all keys and values to add a token. Here each sequence has a slot in one key-value store, at its own length;
the layers are transformers' own, called one by one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from mdl_toolkit.model.constants import MOST_LOGITS
from mdl_toolkit.model.packed_decoder import PackedTokens

# Cosines and sines, each `[sequences or 1, tokens, head_dim]`.
Rotary = tuple[Tensor, Tensor]
# Tokens by which the key-value store grows, at least.
GROWTH = 64
# Tokens of choices that are scored in one pass.
TOKENS_AT_ONCE = 512


class DecodingBatch:
    """Hold the keys and values of the sequences that are being answered.

    Attributes:
        lengths: tokens of each sequence so far.
    """

    def __init__(self, decoder: Any) -> None:
        """Start without sequences.

        Args:
            decoder: the causal language model of a MiDashengLM, with or without adapters.
        """
        self._decoder = decoder
        self._layers: list[Any] = list(decoder.model.layers)
        # Keys and values of each layer, each `[slots, key heads, capacity, head_dim]`.
        self._stores: list[tuple[Tensor, Tensor]] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    # --- sequences come, go on, and leave ---

    @torch.inference_mode()
    def admit(
        self,
        embeddings: Tensor,
        lengths: Sequence[int],
        slots: int,
        max_length: int,
        prefix_ids: Tensor | None = None,
    ) -> Tensor:
        """Take in sequences behind those that are here, without padding and with shared prefixes once.

        Args:
            embeddings: `[sequences, longest, hidden_size]`, padded on the right.
            lengths: tokens of each.
            slots: most sequences that will be here at once.
            max_length: most tokens that one of these sequences will ever have.
            prefix_ids: `[sequences, longest]`, as of `PackedTokens.of`; None to share no prefix.

        Returns:
            Logits for each sequence's next token, `[sequences, vocabulary]`.
        """
        first, ends = len(self), torch.tensor(lengths, device=embeddings.device).unsqueeze(1)
        packed = PackedTokens.of(torch.arange(embeddings.shape[1], device=ends.device) < ends, prefix_ids)
        x = embeddings.flatten(0, 1)[packed.source].unsqueeze(0)
        rotary = self._rotary(x, packed.positions.unsqueeze(0))
        *lower, top = enumerate(self._layers)
        for number, layer in lower:
            q, k, v = (_pad(part, packed) for part in _project(layer, x, rotary))
            self._store(number, k, v, first, slots, max_length)
            # Undo the padding.
            attended = _attend_causally(layer, q, k, v).transpose(0, 1).flatten(1, 2)
            attended = attended.index_select(1, packed.scatter).unsqueeze(0)
            x = _finish(layer, x, attended)
        self.lengths += lengths
        # The last layer goes on with each sequence's last token alone, `[sequences, 1, ...]`.
        number, layer = top
        k, v = (_pad(part, packed) for part in _keys_values(layer, layer.input_layernorm(x), rotary))
        self._store(number, k, v, first, slots, max_length)
        last = packed.gather.gather(1, ends - 1)
        x = x[0, last]
        q = _queries(layer, layer.input_layernorm(x), (rotary[0][0, last], rotary[1][0, last]))
        seen = _seen(ends - 1, torch.arange(k.shape[2], device=x.device), _window(layer))
        return self._head(_finish(layer, x, _attend(q, k, v, _additive(seen, q.dtype)))[:, 0])

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Add a token to every sequence.

        Args:
            ids: `[sequences]`.

        Returns:
            Logits for each sequence's next token, `[sequences, vocabulary]`.
        """
        longest, capacity = max(self.lengths) + 1, self._stores[0][0].shape[2]
        if longest > capacity:
            for number in range(len(self._stores)):
                self._grow(number, max(longest + GROWTH, capacity * 3 // 2))
        device = ids.device
        x = self._decoder.model.embed_tokens(ids.unsqueeze(1))
        ends = torch.tensor(self.lengths, device=device)
        sequences = torch.arange(len(self), device=device)
        rotary, positions = self._rotary(x, ends.unsqueeze(1)), torch.arange(longest, device=device)
        # By window; None where every sequence sees all of the store.
        masks: dict[int | None, Tensor | None] = {}
        for window in {_window(layer) for layer in self._layers}:
            sees_all = min(self.lengths) + 1 == longest and (window is None or longest <= window)
            seen = None if sees_all else _seen(ends.unsqueeze(1), positions, window)
            masks[window] = None if seen is None else _additive(seen, x.dtype)
        for number, layer in enumerate(self._layers):
            q, k, v = _project(layer, x, rotary)
            keys, values = self._stores[number]
            keys[sequences, :, ends], values[sequences, :, ends] = k[:, :, 0], v[:, :, 0]
            used = (slice(len(self)), slice(None), slice(longest))
            x = _finish(layer, x, _attend(q, keys[used], values[used], masks[_window(layer)]))
        self.lengths = [length + 1 for length in self.lengths]
        return self._head(x[:, 0])

    @torch.inference_mode()
    def release(self, slots: Sequence[int]) -> list[int]:
        """Remove sequences, and move the last ones into their slots.

        Returns:
            For each slot now, the slot in which its sequence was before.
        """
        removed, left = {*slots}, len(self) - len(slots)
        holes = [slot for slot in range(left) if slot in removed]
        movers = [slot for slot in range(left, len(self)) if slot not in removed]
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
            for keys, values in self._stores:
                keys[hole], values[hole] = keys[mover], values[mover]
        self.lengths = [self.lengths[slot] for slot in order]
        return order

    # --- choices ---

    @torch.inference_mode()
    def score(self, logits: Tensor, choices: Sequence[Sequence[int]]) -> Tensor:
        """Compute each choice's log-probability as the continuation of each sequence; these stay as they are.

        Args:
            logits: of each sequence's next token, as `admit` gave them.
            choices: the tokens of each, at least one.

        Returns:
            `[sequences, choices]` float32.
        """
        device = logits.device
        scores = logits.float().log_softmax(-1)[:, torch.tensor([c[0] for c in choices], device=device)]
        for group in _group_choices(choices):
            states = self._continue([choices[number][:-1] for number in group])
            targets = torch.tensor([id_ for number in group for id_ in choices[number][1:]], device=device)
            numbers = torch.tensor([number for number in group for _ in choices[number][1:]], device=device)
            scores.index_add_(1, numbers, self._log_probabilities(states, targets))
        return scores

    def _log_probabilities(self, states: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probability of targets `[tokens]` at states `[sequences, tokens, hidden_size]`.

        Returns:
            `[sequences, tokens]` float32.
        """
        size = max(1, MOST_LOGITS // (len(states) * self._decoder.config.vocab_size))
        parts = []
        for part, ids in zip(states.split(size, 1), targets.split(size), strict=True):
            logits = self._head(part).float()
            chosen = logits.gather(2, ids.expand(len(states), -1).unsqueeze(2)).squeeze(2)
            parts.append(chosen - logits.logsumexp(-1))
        return torch.cat(parts, 1)

    def _continue(self, continuations: Sequence[Sequence[int]]) -> Tensor:
        """Compute states of continuations, each seeing its sequence and itself.

        Returns:
            `[sequences, tokens of all continuations, hidden_size]`.
        """
        device, sequences, width = self._stores[0][0].device, len(self), max(self.lengths)
        flat = [(id_, number, i) for number, ids in enumerate(continuations) for i, id_ in enumerate(ids)]
        ids, owner, offset = torch.tensor(flat, device=device).unbind(1)
        ends = torch.tensor(self.lengths, device=device)
        x = self._decoder.model.embed_tokens(ids).expand(sequences, -1, -1)
        positions = ends.unsqueeze(1) + offset
        rotary = self._rotary(x, positions)
        before = torch.arange(width, device=device).expand(sequences, len(ids), width)
        own = ((owner.unsqueeze(1) == owner) & (offset.unsqueeze(1) >= offset)).expand(sequences, -1, -1)
        is_visible = torch.cat([before < ends[:, None, None], own], 2)
        key_positions = torch.cat([before, positions.unsqueeze(1).expand(-1, len(ids), -1)], 2)
        for number, layer in enumerate(self._layers):
            seen, window = is_visible, _window(layer)
            if window is not None:
                seen = seen & (key_positions > positions.unsqueeze(2) - window)
            q, k, v = _project(layer, x, rotary)
            keys, values = (store[:sequences, :, :width] for store in self._stores[number])
            mask = _additive(seen.unsqueeze(1), q.dtype)
            x = _finish(layer, x, _attend(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask))
        return x

    def _rotary(self, x: Tensor, positions: Tensor) -> Rotary:
        """Return the rotary embedding of positions `[sequences or 1, tokens]`."""
        cos, sin = self._decoder.model.rotary_emb(x, positions.to(x.device))
        return cos, sin

    def _head(self, states: Tensor) -> Tensor:
        """Map states `[..., hidden_size]` to logits `[..., vocabulary]`."""
        logits: Tensor = self._decoder.lm_head(self._decoder.model.norm(states))
        return logits

    # --- the key-value store ---

    def _store(self, number: int, k: Tensor, v: Tensor, first: int, slots: int, max_length: int) -> None:
        """Store a layer's keys and values of new sequences, from slot `first` on."""
        sequences, heads, width, head_dim = k.shape
        if len(self._stores) == number:
            shape = (max(slots, sequences), heads, min(width + GROWTH, max(max_length, width)), head_dim)
            self._stores.append((k.new_zeros(shape), v.new_zeros(shape)))
        capacity = self._stores[number][0].shape[2]
        if width > capacity:
            self._grow(number, min(max(width + GROWTH, capacity * 3 // 2), max(max_length, width)))
        for store, new in zip(self._stores[number], (k, v), strict=True):
            store[first : first + sequences, :, :width] = new

    def _grow(self, number: int, capacity: int) -> None:
        """Make room for longer sequences in a layer's store."""
        keys, values = self._stores[number]
        shape = (*keys.shape[:2], capacity, keys.shape[3])
        larger = keys.new_zeros(shape), values.new_zeros(shape)
        for new, old in zip(larger, (keys, values), strict=True):
            new[:, :, : old.shape[2]] = old
        self._stores[number] = larger


# --- one layer -----------------------------------------------------------------------------------------


def _project(layer: Any, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values, each `[sequences, heads, tokens, head_dim]`."""
    normed = layer.input_layernorm(x)
    return _queries(layer, normed, rotary), *_keys_values(layer, normed, rotary)


def _queries(layer: Any, normed: Tensor, rotary: Rotary) -> Tensor:
    """Compute rotated queries, `[sequences, heads, tokens, head_dim]`."""
    return _rotate(_heads(layer, normed, "q"), rotary)


def _keys_values(layer: Any, normed: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Compute rotated keys, and values, each `[sequences, key heads, tokens, head_dim]`."""
    return _rotate(_heads(layer, normed, "k"), rotary), _heads(layer, normed, "v")


def _heads(layer: Any, normed: Tensor, name: str) -> Tensor:
    """Project to q, k or v, and split into heads; Qwen3 normalises q and k."""
    attention = layer.self_attn
    split = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (split if norm is None else norm(split)).transpose(1, 2)


def _pad(x: Tensor, packed: PackedTokens) -> Tensor:
    """Lay `[1, heads, tokens, head_dim]` of all sequences out as `[sequences, heads, longest, head_dim]`."""
    gather = packed.gather
    return x[0].index_select(1, gather.flatten()).unflatten(1, tuple(gather.shape)).transpose(0, 1)


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate by the angles of the positions (RoFormer, arXiv 2104.09864)."""
    cos, sin = rotary
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def _finish(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Compute a layer from attention's output `[sequences, heads, tokens, head_dim]` on."""
    x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _attend_causally(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within sequences that are padded on the right, which no earlier token sees."""
    window, width = _window(layer), q.shape[2]
    if window is None or width <= window:
        groups = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    positions = torch.arange(width, device=q.device)
    return _attend(q, k, v, _additive(_seen(positions.unsqueeze(0), positions, window), q.dtype))


def _seen(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Tell which key positions `[keys]` query positions `[sequences, queries]` see.

    Returns:
        `[sequences, 1, queries, keys]`.
    """
    distance = query[:, None, :, None] - key
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _window(layer: Any) -> int | None:
    """Return the tokens that a layer's sliding window spans; None for all."""
    return getattr(layer.self_attn, "sliding_window", None)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores: 0 where a key is seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with the query heads that share a key head as further queries of it: no copy of keys.

    Args:
        q: `[sequences, heads, queries, head_dim]`.
        k: `[sequences, key heads, keys, head_dim]`.
        v: likewise.
        mask: `[sequences or 1, 1, queries, keys]`, added to the scores.
    """
    groups = q.shape[1] // k.shape[1]
    grouped = q.reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
    if mask is not None and q.shape[2] > 1:
        mask = mask.repeat(1, 1, groups, 1)
    return functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


def _group_choices(choices: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the numbers of choices of more than one token, in groups of about `TOKENS_AT_ONCE` tokens."""
    group: list[int] = []
    for number, choice in enumerate(choices):
        if len(choice) > 1:
            group.append(number)
        if sum(len(choices[each]) - 1 for each in group) >= TOKENS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
