"""Decode a batch whose rows come when a place is free and leave when their answer is complete.

transformers' `generate` decodes every row of a batch until the longest answer is complete, and copies all
keys and values to add a position. Here each row has a place in one store of keys and values, at its own
length; the layers are transformers' own, called one by one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from mdl_toolkit.model.constants import MOST_LOGITS
from mdl_toolkit.model.packed_decoder import Rows

# Cosines and sines, each `[rows or 1, positions, head size]`.
Rotary = tuple[Tensor, Tensor]
# Positions by which the store grows, at least.
GROWTH = 64
# Tokens of choices that are scored together.
TOKENS_AT_ONCE = 512


class DecodingBatch:
    """Hold the rows that are being answered together.

    Attributes:
        lengths: positions of each row so far.
    """

    def __init__(self, decoder: Any) -> None:
        """Start without rows.

        Args:
            decoder: the causal language model of a MiDashengLM, with or without adapters.
        """
        self._decoder = decoder
        self._layers: list[Any] = list(decoder.model.layers)
        # Keys and values, each `[places, heads, capacity, head size]`.
        self._stores: list[tuple[Tensor, Tensor]] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    # --- rows come, go on, and leave ---

    @torch.inference_mode()
    def admit(
        self, embeddings: Tensor, lengths: Sequence[int], places: int, need: int, words: Tensor | None = None
    ) -> Tensor:
        """Take in rows behind those that are here; padding is not computed, and a common beginning once.

        Args:
            embeddings: `[rows, longest, hidden_size]`, padded on the right.
            lengths: positions of each.
            places: most rows that will be here at once.
            need: most positions that one of these rows will ever have.
            words: `[rows, longest]`, as of `Rows.of`; None to compute each row by itself.

        Returns:
            Logits for each row's next token, `[rows, vocabulary]`.
        """
        first, ends = len(self), torch.tensor(lengths, device=embeddings.device).unsqueeze(1)
        rows = Rows.of(torch.arange(embeddings.shape[1], device=ends.device) < ends, words)
        x = embeddings.flatten(0, 1)[rows.real].unsqueeze(0)
        rotary = self._rotary(x, rows.columns.unsqueeze(0))
        *lower, top = enumerate(self._layers)
        for number, layer in lower:
            q, k, v = (_spread(part, rows) for part in _project(layer, x, rotary))
            self._store(number, k, v, first, places, need)
            x = _finish(layer, x, _collected(_attend_causally(layer, q, k, v), rows))
        self.lengths += lengths
        number, layer = top
        k, v = (_spread(part, rows) for part in _keys_values(layer, layer.input_layernorm(x), rotary))
        self._store(number, k, v, first, places, need)
        last = rows.gather.gather(1, ends - 1)
        return self._answered(layer, x[0, last], (rotary[0][0, last], rotary[1][0, last]), ends - 1, k, v)

    def _answered(self, layer: Any, x: Tensor, rotary: Rotary, place: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute the last layer at each row's last `place` `[rows, 1]`: `[rows, 1, hidden_size]`."""
        q = _queries(layer, layer.input_layernorm(x), rotary)
        seen = _seen(place, torch.arange(k.shape[2], device=x.device), _window(layer))
        return self._head(_finish(layer, x, _attend(q, k, v, _additive(seen, q.dtype)))[:, 0])

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Add a token to every row.

        Args:
            ids: `[rows]`.

        Returns:
            Logits for each row's next token, `[rows, vocabulary]`.
        """
        self._make_room(max(self.lengths) + 1)
        device = ids.device
        x = self._decoder.model.embed_tokens(ids.unsqueeze(1))
        ends = torch.tensor(self.lengths, device=device)
        rows = torch.arange(len(self), device=device)
        rotary, masks = self._rotary(x, ends.unsqueeze(1)), self._masks(ends, x.dtype)
        for number, layer in enumerate(self._layers):
            q, k, v = _project(layer, x, rotary)
            keys, values = self._stores[number]
            keys[rows, :, ends], values[rows, :, ends] = k[:, :, 0], v[:, :, 0]
            seen = (slice(len(self)), slice(None), slice(max(self.lengths) + 1))
            x = _finish(layer, x, _attend(q, keys[seen], values[seen], masks[_window(layer)]))
        self.lengths = [length + 1 for length in self.lengths]
        return self._head(x[:, 0])

    @torch.inference_mode()
    def release(self, places: Sequence[int]) -> list[int]:
        """Let rows go; the last ones move into their places.

        Returns:
            For each place now, the place in which its row was before.
        """
        gone, left = {*places}, len(self) - len(places)
        holes = [place for place in range(left) if place in gone]
        movers = [place for place in range(left, len(self)) if place not in gone]
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
            for keys, values in self._stores:
                keys[hole], values[hole] = keys[mover], values[mover]
        self.lengths = [self.lengths[place] for place in order]
        return order

    # --- choices ---

    @torch.inference_mode()
    def score(self, logits: Tensor, choices: Sequence[Sequence[int]]) -> Tensor:
        """Return each choice's log-probability as the continuation of each row; the rows stay as they are.

        Args:
            logits: of each row's next token, as `admit` gave them.
            choices: the tokens of each, at least one.

        Returns:
            `[rows, choices]` float32.
        """
        device = logits.device
        scores = logits.float().log_softmax(-1)[:, torch.tensor([c[0] for c in choices], device=device)]
        for part in _parts(choices):
            states = self._continue([choices[owner][:-1] for owner in part])
            targets = torch.tensor([token for owner in part for token in choices[owner][1:]], device=device)
            owners = torch.tensor([owner for owner in part for _ in choices[owner][1:]], device=device)
            scores.index_add_(1, owners, self._log_probabilities(states, targets))
        return scores

    def _log_probabilities(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probability of each target at its state, `[rows, tokens]`."""
        at_once = max(1, MOST_LOGITS // (len(states) * self._decoder.config.vocab_size))
        parts = []
        for some, wanted in zip(states.split(at_once, 1), targets.split(at_once), strict=True):
            logits = self._head(some).float()
            places = wanted.expand(len(states), -1).unsqueeze(2)
            parts.append(logits.gather(2, places).squeeze(2) - logits.logsumexp(-1))
        return torch.cat(parts, 1)

    def _continue(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Return states of continuations, each seeing its row and itself: `[rows, tokens, hidden_size]`."""
        device, rows, width = self._stores[0][0].device, len(self), max(self.lengths)
        ids, owner, offset = _laid_out(pieces, device)
        ends = torch.tensor(self.lengths, device=device)
        x = self._decoder.model.embed_tokens(ids).expand(rows, -1, -1)
        positions = ends.unsqueeze(1) + offset
        rotary = self._rotary(x, positions)
        before = torch.arange(width, device=device).expand(rows, len(ids), width)
        own = ((owner.unsqueeze(1) == owner) & (offset.unsqueeze(1) >= offset)).expand(rows, -1, -1)
        is_there = torch.cat([before < ends[:, None, None], own], 2)
        places = torch.cat([before, positions.unsqueeze(1).expand(-1, len(ids), -1)], 2)
        for number, layer in enumerate(self._layers):
            window = _window(layer)
            seen = is_there if window is None else is_there & (places > positions.unsqueeze(2) - window)
            q, k, v = _project(layer, x, rotary)
            keys, values = (store[:rows, :, :width] for store in self._stores[number])
            mask = _additive(seen.unsqueeze(1), q.dtype)
            x = _finish(layer, x, _attend(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask))
        return x

    def _rotary(self, x: Tensor, positions: Tensor) -> Rotary:
        cos, sin = self._decoder.model.rotary_emb(x, positions.to(x.device))
        return cos, sin

    def _head(self, states: Tensor) -> Tensor:
        logits: Tensor = self._decoder.lm_head(self._decoder.model.norm(states))
        return logits

    def _masks(self, ends: Tensor, dtype: torch.dtype) -> dict[int | None, Tensor | None]:
        """Return, by window, what each row's new token sees: `[rows, 1, 1, positions]` or None (all)."""
        longest = max(self.lengths) + 1
        place, last = torch.arange(longest, device=ends.device), ends.unsqueeze(1)
        masks: dict[int | None, Tensor | None] = {}
        for window in {_window(layer) for layer in self._layers}:
            is_all = min(self.lengths) + 1 == longest and (window is None or longest <= window)
            masks[window] = None if is_all else _additive(_seen(last, place, window), dtype)
        return masks

    # --- the store ---

    def _store(self, number: int, k: Tensor, v: Tensor, first: int, places: int, need: int) -> None:
        rows, heads, width, size = k.shape
        if len(self._stores) == number:
            shape = (max(places, rows), heads, min(width + GROWTH, max(need, width)), size)
            self._stores.append((k.new_zeros(shape), v.new_zeros(shape)))
        capacity = self._stores[number][0].shape[2]
        if width > capacity:
            self._grow(number, min(max(width + GROWTH, capacity * 3 // 2), max(need, width)))
        for store, new in zip(self._stores[number], (k, v), strict=True):
            store[first : first + rows, :, :width] = new

    def _make_room(self, need: int) -> None:
        if need > (capacity := self._stores[0][0].shape[2]):
            for number in range(len(self._stores)):
                self._grow(number, max(need + GROWTH, capacity * 3 // 2))

    def _grow(self, number: int, capacity: int) -> None:
        keys, values = self._stores[number]
        shape = (*keys.shape[:2], capacity, keys.shape[3])
        larger = keys.new_zeros(shape), values.new_zeros(shape)
        for new, old in zip(larger, (keys, values), strict=True):
            new[:, :, : old.shape[2]] = old
        self._stores[number] = larger


# --- one layer -----------------------------------------------------------------------------------------


def _project(layer: Any, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each `[rows, heads, positions, head size]`."""
    normed = layer.input_layernorm(x)
    return _queries(layer, normed, rotary), *_keys_values(layer, normed, rotary)


def _queries(layer: Any, normed: Tensor, rotary: Rotary) -> Tensor:
    return _turned(_heads(layer, normed, "q"), rotary)


def _keys_values(layer: Any, normed: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    return _turned(_heads(layer, normed, "k"), rotary), _heads(layer, normed, "v")


def _heads(layer: Any, normed: Tensor, name: str) -> Tensor:
    attention = layer.self_attn
    split = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    # Qwen3 has two.
    norm = getattr(attention, f"{name}_norm", None)
    return (split if norm is None else norm(split)).transpose(1, 2)


def _spread(x: Tensor, rows: Rows) -> Tensor:
    """Lay `[1, heads, positions, head size]` of several rows out as `[rows, heads, longest, head size]`."""
    return x[0].index_select(1, rows.gather.flatten()).unflatten(1, tuple(rows.gather.shape)).transpose(0, 1)


def _collected(x: Tensor, rows: Rows) -> Tensor:
    """Undo `_spread`."""
    return x.transpose(0, 1).flatten(1, 2).index_select(1, rows.scatter).unsqueeze(0)


def _turned(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate by the angles of the positions (RoFormer, arXiv 2104.09864)."""
    cos, sin = rotary
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def _finish(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Compute the rest of a layer; `attended` as `[rows, heads, positions, head size]`."""
    x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _attend_causally(layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend among a row's own positions; no earlier one sees padding on the right."""
    window, width = _window(layer), q.shape[2]
    if window is None or width <= window:
        groups = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    place = torch.arange(width, device=q.device)
    return _attend(q, k, v, _additive(_seen(place.unsqueeze(0), place, window), q.dtype))


def _seen(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Tell whether positions `[rows, queries]` see positions `[keys]`: `[rows, 1, queries, keys]`."""
    behind = query[:, None, :, None] - key
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _window(layer: Any) -> int | None:
    """Return how far back a layer sees; None for everything."""
    return getattr(layer.self_attn, "sliding_window", None)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with the query heads that share a key head as further queries of it: no copy of keys.

    Args:
        q: `[rows, heads, queries, head size]`.
        k: `[rows, key heads, keys, head size]`.
        v: likewise.
        mask: `[rows or 1, 1, queries, keys]`, added to the scores.
    """
    groups = q.shape[1] // k.shape[1]
    together = q.reshape(q.shape[0], k.shape[1], groups * q.shape[2], q.shape[3])
    if mask is not None and q.shape[2] > 1:
        mask = mask.repeat(1, 1, groups, 1)
    return functional.scaled_dot_product_attention(together, k, v, attn_mask=mask).reshape(q.shape)


def _parts(choices: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Return the numbers of choices of more than one token, about `TOKENS_AT_ONCE` tokens together."""
    part: list[int] = []
    for owner, choice in enumerate(choices):
        if len(choice) > 1:
            part.append(owner)
        if sum(len(choices[owner]) - 1 for owner in part) >= TOKENS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def _laid_out(pieces: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lay pieces side by side: tokens, the piece that each is of, and its place there, each `[tokens]`."""
    flat = [(token, owner, i) for owner, piece in enumerate(pieces) for i, token in enumerate(piece)]
    return tuple(torch.tensor(flat, device=device).unbind(1))  # type: ignore[return-value]
