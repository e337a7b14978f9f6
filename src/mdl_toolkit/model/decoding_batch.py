"""Decode a batch whose sequences come when a slot is free and leave when their answer is complete.

transformers' `generate` decodes every sequence of a batch until the longest answer is complete, and copies
all keys and values to add a token. Here each sequence has a slot in one key-value store, at its own length.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mdl_toolkit.model.constants import MOST_LOGITS
from mdl_toolkit.model.kernels.norms import rms_norm
from mdl_toolkit.model.packed_decoder import packed_states
from mdl_toolkit.model.packing import PackingPlan

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
        # Keys and values of each layer, `[2, slots, key heads, capacity, head_dim]`.
        self._stores: list[Tensor] = []
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
            prefix_ids: `[sequences, longest]`, as of `PackingPlan.of`; None to share no prefix.

        Returns:
            Logits for each sequence's next token, `[sequences, vocabulary]`.
        """
        count, longest = embeddings.shape[:2]
        first, ends = len(self), torch.tensor(lengths).unsqueeze(1)
        max_length = max(max_length, longest)
        self._reserve(longest, max_length)

        def keep(number: int, k: Tensor, v: Tensor) -> None:
            if number == len(self._stores):
                capacity = min(longest + GROWTH, max_length)
                shape = (2, max(slots, count), k.shape[1], capacity, k.shape[3])
                self._stores.append(k.new_zeros(shape))
            for store, new in zip(self._stores[number], (k, v), strict=True):
                store[first : first + count, :, : k.shape[2]] = new

        columns = torch.arange(longest)
        made = PackingPlan.of(columns < ends, columns == ends - 1, prefix_ids)
        plan = made.to(embeddings.device, non_blocking=True)
        states = packed_states(self._decoder.model, embeddings, plan, keep)
        self.lengths += lengths
        logits: Tensor = self._decoder.lm_head(states)
        return logits

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Add a token to every sequence.

        Args:
            ids: `[sequences]`.

        Returns:
            Logits for each sequence's next token, `[sequences, vocabulary]`.
        """
        longest, device = max(self.lengths) + 1, ids.device
        x = self._decoder.model.embed_tokens(ids)
        self._reserve(longest)
        ends = torch.tensor(self.lengths).to(device, non_blocking=True)
        sequences, rotary = torch.arange(len(self), device=device), self._rotary(x, ends)
        mask = None
        if min(self.lengths) + 1 < longest:
            mask = _additive(torch.arange(longest, device=device) <= ends[:, None, None, None], x.dtype)
        for layer, (keys, values) in zip(self._layers, self._stores, strict=True):
            q, k, v = layer.queries_keys_values(x, *rotary)
            keys[sequences, :, ends], values[sequences, :, ends] = k.to(keys.dtype), v.to(keys.dtype)
            used = (slice(len(self)), slice(None), slice(longest))
            x = layer.finish(x, _attend(q.unsqueeze(2), keys[used], values[used], mask).flatten(1))
        self.lengths = [length + 1 for length in self.lengths]
        return self._head(x)

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
            for store in self._stores:
                store[:, hole] = store[:, mover]
        # A mask hides what a sequence leaves from the next one, but NaN.
        for store in self._stores:
            store[:, left : len(self)] = 0
        # All places are as long as the longest sequence was.
        if not left:
            self._stores.clear()
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
        device, sequences, width = self._stores[0].device, len(self), max(self.lengths)
        flat = [(id_, number, i) for number, ids in enumerate(continuations) for i, id_ in enumerate(ids)]
        ids, owner, offset = torch.tensor(flat, device=device).unbind(1)
        ends = torch.tensor(self.lengths, device=device)
        positions = ends.unsqueeze(1) + offset
        x = self._decoder.model.embed_tokens(ids.repeat(sequences))
        rotary = self._rotary(x, positions.flatten())
        before = torch.arange(width, device=device).expand(sequences, len(ids), width)
        own = ((owner.unsqueeze(1) == owner) & (offset.unsqueeze(1) >= offset)).expand(sequences, -1, -1)
        mask = _additive(torch.cat([before < ends[:, None, None], own], 2).unsqueeze(1), x.dtype)
        for layer, store in zip(self._layers, self._stores, strict=True):
            new = layer.queries_keys_values(x, *rotary)
            q, k, v = (part.unflatten(0, (sequences, -1)).transpose(1, 2) for part in new)
            keys, values = store[:, :sequences, :, :width]
            attended = _attend(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask)
            x = layer.finish(x, attended.transpose(1, 2).flatten(2).flatten(0, 1))
        return x.unflatten(0, (sequences, -1))

    def _rotary(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions `[tokens]`, each `[tokens, 1, head_dim]`."""
        cos, sin = self._decoder.model.rotary_emb(x, positions.unsqueeze(0))
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def _head(self, states: Tensor) -> Tensor:
        """Map states `[..., hidden_size]` to logits `[..., vocabulary]`."""
        logits: Tensor = self._decoder.lm_head(rms_norm(self._decoder.model.norm, states))
        return logits

    def _reserve(self, longest: int, most: int | None = None) -> None:
        """Make room for `longest` tokens a sequence and some more, `most` of them at most."""
        # Layer by layer, so that the whole is not there twice.
        for number, store in enumerate(self._stores):
            capacity = store.shape[3]
            if longest > capacity:
                grown = max(longest + GROWTH, capacity * 3 // 2)
                extra = (grown if most is None else min(grown, most)) - capacity
                self._stores[number] = functional.pad(store, (0, 0, 0, extra))


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
