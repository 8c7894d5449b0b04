"""Keys and values of recent prompts, and the experts' decision rows on them.

Between a decision and its answer, and for prompts that share a beginning (the turns of a chat, a system prompt), keys
and values are found here instead of being computed again. Memory is bounded; the least recently used prompt is evicted
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from see_ray.engine.forward_batch import DecisionRows
from see_ray.models.prefix_kv import Prefix

MIN_SHARED_TOKENS = 8
"""Fewest tokens that two prompts must share for one to start from the other's keys and values."""


@dataclass(frozen=True)
class DecisionRow:
    """One expert's row after a prompt, or the generalist's.

    Attributes:
        rows: the rows that ran together.
        index: of this one among them.
        p_accept: the decision; None for the generalist.
        answer_follows: whether the token sampled after the row is the first of the answer. An expert's row has to end
            with its accept indicator for that, the generalist's with the prompt.
    """

    rows: DecisionRows
    index: int
    p_accept: float | None
    answer_follows: bool

    @property
    def last_hidden(self) -> Tensor:
        """[hidden size], of the row's last token."""
        return self.rows.hidden[self.index, -1]


@dataclass(eq=False)
class CachedPrompt:
    """A prompt, as far as it was prefilled.

    Attributes:
        token_ids: the whole prompt.
        owner: the expert whose adapter applies to the prompt (full form); None: no adapter.
        prefix: keys and values of its first tokens; at most all but the last, which decision rows run.
        decisions: rows after the prompt by expert name; None is the generalist.
        ref_count: requests that use it. It is not evicted before they end.
    """

    token_ids: tuple[int, ...]
    owner: str | None
    prefix: Prefix
    decisions: dict[str | None, DecisionRow] = field(default_factory=dict)
    ref_count: int = 0

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are known."""
        return self.prefix.lengths[0]

    @property
    def num_uncached(self) -> int:
        """Tokens to prefill before decision rows can run."""
        return len(self.token_ids) - 1 - self.num_cached

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values take memory, those of decision rows included."""
        rows = {id(decision.rows): decision.rows for decision in self.decisions.values()}
        return self.num_cached + sum(shared_rows.num_tokens for shared_rows in rows.values())


@dataclass
class PrefixCache:
    """Recent prompts, least recently used first.

    Attributes:
        capacity: most tokens of prompts that no request uses; the most recent one is kept in any case.
        queries: tokens of all prompts that were looked up.
        hits: those of them whose keys and values were found.
    """

    capacity: int
    queries: int = 0
    hits: int = 0
    _prompts: OrderedDict[tuple[str | None, tuple[int, ...]], CachedPrompt] = field(default_factory=OrderedDict)

    def __iter__(self) -> Iterator[CachedPrompt]:
        return iter(list(self._prompts.values()))

    def match(self, token_ids: tuple[int, ...], owner: str | None) -> CachedPrompt:
        """The entry of a prompt. A new one starts with the longest prefix that it shares with another entry."""
        prompt = self._prompts.get((owner, token_ids))
        if prompt is None:
            prompt = CachedPrompt(token_ids, owner, self._longest_shared_prefix(token_ids, owner))
            self._prompts[owner, token_ids] = prompt
        self.queries += len(token_ids) - 1
        self.hits += prompt.num_cached
        self._prompts.move_to_end((owner, token_ids))
        return prompt

    def insert(self, token_ids: tuple[int, ...], owner: str | None, prefix: Prefix) -> None:
        """Add keys and values of a prompt that were computed elsewhere."""
        prompt = self._prompts.setdefault((owner, token_ids), CachedPrompt(token_ids, owner, prefix))
        if prompt.num_cached < prefix.lengths[0]:
            prompt.prefix = prefix

    def evict(self) -> None:
        """Remove the least recently used prompts that no request uses, until the others fit `capacity`."""
        unused = [prompt for prompt in self._prompts.values() if prompt.ref_count == 0]
        num_tokens = sum(prompt.num_tokens for prompt in unused)
        for prompt in unused[:-1]:
            if num_tokens <= self.capacity:
                break
            num_tokens -= prompt.num_tokens
            del self._prompts[prompt.owner, prompt.token_ids]

    def invalidate(self, expert: str) -> None:
        """Remove everything that was computed with an expert's adapter."""
        for key, prompt in list(self._prompts.items()):
            prompt.decisions.pop(expert, None)
            if prompt.owner == expert:
                del self._prompts[key]

    def clear(self) -> None:
        """Remove all prompts."""
        self._prompts.clear()

    def _longest_shared_prefix(self, token_ids: tuple[int, ...], owner: str | None) -> Prefix:
        longest, length = None, MIN_SHARED_TOKENS - 1
        for prompt in self._prompts.values():
            limit = min(prompt.num_cached, len(token_ids) - 1)
            # Compare the tokens that it has to share at least before looking for the first difference.
            if prompt.owner == owner and limit > length and prompt.token_ids[: length + 1] == token_ids[: length + 1]:
                shared = next((i for i in range(limit) if prompt.token_ids[i] != token_ids[i]), limit)
                if shared > length:
                    longest, length = prompt, shared
        return longest.prefix.cut(length) if longest else Prefix((), (0,))
