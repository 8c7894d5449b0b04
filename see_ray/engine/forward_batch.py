"""One forward pass of the engine: tokens of many requests as one sequence.

Three kinds of work share it, each token with the adapter that applies to it:

    PrefillChunk   some tokens of a prompt, over those that were read before
    DecisionRows   rows that go on from one place of a prompt, each with another adapter: N experts' decisions.
             They attend to the prompt's keys and values where these stand; nothing is copied N times.
    DecodeStep     one more token of an answer, over its slot

All tokens go through the linear layers, where the time is spent, as one packed sequence; only attention,
registered with transformers as a function of its own, sees them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from see_ray.engine.kernels import kernels
from see_ray.engine.kv_cache import KVCacheBlock, Slot, joined
from see_ray.engine.lora import AdapterBank
from see_ray.errors import ServingError
from see_ray.models.attention_override import run_packed
from see_ray.models.prefix_kv import Prefix

MOST_SCORES = 1 << 26
"""Attention scores of branches that are held at the same time (256 MB in float32)."""


@dataclass(eq=False)
class DecisionRows:
    """Rows that see the first tokens of a prompt and then their own.

    Attributes:
        seen: tokens of the prompt that they see.
        ids: the tokens of each row, the same for all.
        adapters: the adapter slot of each row.
        hidden: [rows, tokens, hidden size] after the pass.
        layers: the tokens' (key, value) in each layer, [rows, heads, tokens, head size], after the pass.
    """

    seen: int
    ids: tuple[int, ...]
    adapters: tuple[int, ...]
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class PrefillChunk:
    """Tokens of a prompt, over those read before.

    Attributes:
        past: one row's keys and values of what was read before.
        ids: tokens to read now; may be empty if there are branches.
        adapter: the adapter slot that applies to them.
        branches: what goes on from here.
        prefix: keys and values of both, after the pass.
    """

    past: Prefix
    ids: tuple[int, ...]
    adapter: int = 0
    branches: tuple[DecisionRows, ...] = ()
    prefix: Prefix = field(default_factory=lambda: Prefix((), (0,)))

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.ids) + sum(len(branch.ids) * len(branch.adapters) for branch in self.branches)


@dataclass(eq=False)
class DecodeStep:
    """One more token of an answer; its slot has grown by it after the pass.

    Attributes:
        token: to be read.
        adapter: the adapter slot that applies to it.
        slot: where the answer's keys and values are.
        hidden: [hidden size] after the pass.
    """

    token: int
    adapter: int
    slot: Slot
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))


def run(model: Any, bank: AdapterBank, reads: Sequence[PrefillChunk], steps: Sequence[DecodeStep]) -> None:
    """Run one pass; what it gives stands in `reads` and `steps` afterwards."""
    work = _Work(reads, steps, model.device)
    with bank.applied(work.adapters), kernels(model, len(work.ids)):
        hidden = run_packed(model, work.ids, torch.tensor(work.positions, device=model.device), work)
    work.finish(hidden)


class _Work:
    """Where each packed token belongs."""

    def __init__(self, reads: Sequence[PrefillChunk], steps: Sequence[DecodeStep], device: Any):
        self._reads, self._steps, self._device = reads, steps, device
        self.ids = [step.token for step in steps]
        self.positions = [step.slot.length for step in steps]
        self.adapters = [step.adapter for step in steps]
        self._made: list[list[tuple[Tensor, Tensor]]] = [[] for _ in reads]
        for read in reads:
            start = read.past.lengths[0]
            self.ids += read.ids
            self.positions += range(start, start + len(read.ids))
            self.adapters += [read.adapter] * len(read.ids)
            for branch in read.branches:
                self.ids += branch.ids * len(branch.adapters)
                self.positions += [*range(branch.seen, branch.seen + len(branch.ids))] * len(branch.adapters)
                self.adapters += [slot for slot in branch.adapters for _ in branch.ids]
        shelves: dict[int, list[int]] = {}
        for number, step in enumerate(steps):
            shelves.setdefault(id(step.slot.shelf), []).append(number)
        self._groups = [_Group.of([steps[n].slot for n in numbers], numbers, device) for numbers in shelves.values()]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if unknown:
            raise ServingError(f"the embedded engine does not know this model's attention ({', '.join(unknown)})")
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        window = kwargs.get("sliding_window")
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for group in self._groups:
            group.attend(module.layer_idx, query, key, value, scale, window, out)
        start = len(self._steps)
        for read, made in zip(self._reads, self._made, strict=True):
            stop = start + len(read.ids)
            past = [read.past.layers[module.layer_idx]] if read.past.layers else None
            if read.ids:
                new = [(key[None, :, start:stop], value[None, :, start:stop])]
                made += (layer := joined(past, new))
                q = query[None, :, start:stop]
                mask = _causal(len(read.ids), read.past.lengths[0], window, self._device)
                out[start:stop] = sdpa_attention_forward(module, q, *layer[0], mask, scaling=scale)[0][0]
            else:
                made += past or []
            for branch in read.branches:
                start, stop = stop, stop + len(branch.ids) * len(branch.adapters)
                rows, parts = len(branch.adapters), (query[:, start:stop], key[:, start:stop], value[:, start:stop])
                q, k, v = (part.unflatten(1, (rows, len(branch.ids))).transpose(0, 1) for part in parts)
                branch.layers.append((k.clone(), v.clone()))  # not views, which would keep the whole pass
                seen = tuple(kept[0, :, : branch.seen] for kept in made[-1]) if made else None
                out[start:stop] = _branch_attention(q, k, v, seen, scale, window).flatten(0, 1)
            start = stop
        return out

    def finish(self, hidden: Tensor) -> None:
        for number, step in enumerate(self._steps):
            step.hidden = hidden[number]
            step.slot.length += 1
        start = len(self._steps)
        for read, made in zip(self._reads, self._made, strict=True):
            read.prefix = Prefix(tuple(made), (read.past.lengths[0] + len(read.ids),))
            start += len(read.ids)
            for branch in read.branches:
                stop = start + len(branch.ids) * len(branch.adapters)
                branch.hidden = hidden[start:stop].clone().unflatten(0, (len(branch.adapters), len(branch.ids)))
                start = stop


@dataclass
class _Group:
    """Steps whose slots are on one shelf: which packed tokens, in which rows, after how many tokens each."""

    shelf: KVCacheBlock
    tokens: Tensor
    rows: Tensor
    lengths: Tensor
    first: int
    last: int
    longest: int
    alone: tuple[int, int, int] | None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(slots: Sequence[Slot], tokens: Sequence[int], device: Any) -> _Group:
        rows, lengths = [slot.row for slot in slots], [slot.length for slot in slots]
        return _Group(
            slots[0].shelf,
            torch.tensor(tokens, device=device),
            torch.tensor(rows, device=device),
            torch.tensor(lengths, device=device),
            min(rows),
            max(rows) + 1,
            max(lengths) + 1,
            (tokens[0], rows[0], lengths[0]) if len(slots) == 1 else None,
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, out: Tensor
    ) -> None:
        """Writes the keys and values into the slots, and into `out` what the tokens see."""
        keys, values = self.shelf.layers[layer]
        if self.alone:
            self._attend_alone(*self.alone, keys, values, query, key, value, scale, window, out)
            return
        keys[self.rows, :, self.lengths] = key[:, self.tokens].transpose(0, 1)
        values[self.rows, :, self.lengths] = value[:, self.tokens].transpose(0, 1)
        # Rows between that take no step now are computed, too, on whatever stands there: cheaper than a copy.
        among, rows, heads = self.rows - self.first, self.last - self.first, keys.shape[1]
        q = query.new_zeros(rows, *query.shape[::2])
        q[among] = query[:, self.tokens].transpose(0, 1)
        # The heads that share keys stand as queries beside each other: nothing is repeated.
        q = q.unflatten(1, (heads, -1))
        k, v = (t[self.first : self.last, :, : self.longest] for t in (keys, values))
        mask = self._mask(window, rows, among, query.dtype)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out[self.tokens] = attended.flatten(1, 2)[among]

    @staticmethod
    def _attend_alone(
        token: int, row: int, length: int, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor,
        scale: float, window: int | None, out: Tensor,
    ) -> None:  # fmt: skip
        """One answer's step: its keys end where it stands, so there is nothing to mask."""
        keys[row, :, length] = key[:, token]
        values[row, :, length] = value[:, token]
        start = 0 if window is None else max(0, length + 1 - window)
        k, v = keys[None, row, :, start : length + 1], values[None, row, :, start : length + 1]
        q = query[None, :, token].unflatten(1, (keys.shape[1], -1))
        out[token] = scaled_dot_product_attention(q, k, v, scale=scale)[0].flatten(0, 1)

    def _mask(self, window: int | None, rows: int, among: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, longest], to be added to the scores: a mask of truth values is turned into one by each layer."""
        if window not in self._masks:
            stop = self.lengths.new_ones(rows)
            stop[among] = self.lengths + 1
            place = torch.arange(self.longest, device=stop.device)[None, :]
            seen = place < stop[:, None]
            if window is not None:
                seen &= place >= stop[:, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=stop.device).masked_fill_(~seen, float("-inf"))
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


def _causal(new: int, past: int, window: int | None, device: Any) -> Tensor | None:
    """[1, 1, new, past + new]; None where SDPA's own causal mask is the same."""
    if past == 0 and (window is None or new <= window):
        return None
    distance = torch.arange(past, past + new, device=device)[:, None] - torch.arange(past + new, device=device)[None, :]
    seen = distance >= 0
    return (seen if window is None else seen & (distance < window))[None, None]


def _branch_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: tuple[Tensor, ...] | None, scale: float, window: int | None
) -> Tensor:
    """Rows that attend to one prompt and to their own tokens; the two are merged by their log-sum-exp
    (as cascade attention does), so that the prompt is one matrix product for all rows.

    Args:
        query: [rows, heads, tokens, head size].
        key, value: [rows, key heads, tokens, head size], the rows' own.
        seen: the prompt's (key, value), [key heads, prompt tokens, head size].

    Returns:
        [rows, tokens, heads, head size].
    """
    rows, heads, tokens, size = query.shape
    shared = key.shape[1]
    q = query.reshape(rows, shared, heads // shared, tokens, size)
    if tokens == 1:  # it sees itself: its weight is one, its sum is its score
        of_own = value[:, :, None].expand(-1, -1, heads // shared, -1, -1)
        sum_own = (q * key[:, :, None]).sum(-1, dtype=torch.float32) * scale
    else:
        place = torch.arange(tokens, device=query.device)
        distance = place[:, None] - place[None, :]
        visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = torch.matmul(q.float() * scale, key[:, :, None].float().transpose(-1, -2))
        scores = scores.masked_fill_(~visible, float("-inf"))
        sum_own = scores.logsumexp(-1)
        of_own = torch.matmul((scores - sum_own[..., None]).exp_(), value[:, :, None].float())
    if seen is not None and seen[0].shape[1]:
        flat = q.permute(1, 2, 0, 3, 4).flatten(1, 3)  # [key heads, heads that share them x rows x tokens, head size]
        of_seen, sum_seen = _over_prefix(flat, seen[0], seen[1], tokens, scale, window)
        of_seen, sum_seen = (
            part.unflatten(1, (heads // shared, rows, tokens)).transpose(0, 2).transpose(1, 2)
            for part in (of_seen, sum_seen)
        )
        of_own = torch.lerp(of_own.float(), of_seen.float(), torch.sigmoid(sum_seen - sum_own)[..., None])
    return of_own.to(query.dtype).reshape(rows, heads, tokens, -1).transpose(1, 2)


def _over_prefix(
    query: Tensor, key: Tensor, value: Tensor, tokens: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """What rows see of the prompt before them.

    Args:
        query: [key heads, queries, head size]; the last dimension of the queries is the row's token, of `tokens`.
        key, value: [key heads, prompt tokens, head size].

    Returns:
        [key heads, queries, head size], and the logarithm of the sum of the scores' exponentials, [key heads, queries].
    """
    length = key.shape[1]
    if query.device.type == "cpu" and (window is None or window >= length + tokens):
        # What scaled_dot_product_attention calls on a CPU, but it keeps the sums to itself.
        made, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], scale=scale
        )
        return made[0], sums[0].reshape(query.shape[:2])
    most = max(1, MOST_SCORES // (query.shape[0] * length * tokens)) * tokens
    made, sums = [], []
    for part in query.split(most, dim=1):
        scores = torch.matmul(part * scale, key.transpose(1, 2)).float()
        if window is not None:
            place = torch.arange(part.shape[1], device=query.device)[:, None] % tokens
            away = length + place - torch.arange(length, device=query.device)[None, :]
            scores = scores.masked_fill(away >= window, -1e30)
        sums.append(scores.logsumexp(-1))
        made.append(torch.matmul(scores.softmax(-1).to(value.dtype), value))
    return torch.cat(made, dim=1), torch.cat(sums, dim=1)
