"""What has been read of which prompt, kept for a while.

Between a decision and its answer, and for prompts that begin alike (the turns of a chat, a system prompt), the
keys and values of a prompt's tokens are found here instead of being computed again. The memory is bounded; what
was not used for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from see_ray.engine.forward_batch import DecisionRows
from see_ray.models.prefix_kv import Prefix

WORTH = 8
"""Tokens that two prompts must have in common for one to begin with what the other has read."""


@dataclass(frozen=True)
class Row:
    """Where somebody goes on from a prompt: a row of a branch.

    Attributes:
        p_accept: the decision; None for the generalist.
        fed: whether the row's last token is followed by the answer: an expert's accept indicator, or the
            prompt's own last token for the generalist.
    """

    branch: DecisionRows
    number: int
    p_accept: float | None
    fed: bool

    @property
    def last(self) -> Tensor:
        """Hidden state of its last token."""
        return self.branch.hidden[self.number, -1]


@dataclass(eq=False)
class Prompt:
    """A prompt and what has been read of it.

    Attributes:
        ids: the whole prompt.
        owner: the expert whose adapter applied while it was read (full form); None: the base model.
        prefix: keys and values of its first tokens, at most all but the last one.
        rows: who went on from it, by name; None is the generalist.
        users: requests that still need it.
    """

    ids: tuple[int, ...]
    owner: str | None
    prefix: Prefix
    rows: dict[str | None, Row] = field(default_factory=dict)
    users: int = 0

    @property
    def left(self) -> int:
        """Tokens still to be read before anybody can go on from here."""
        return len(self.ids) - 1 - self.prefix.lengths[0]

    @property
    def size(self) -> int:
        """Tokens whose keys and values it holds."""
        branches = {id(row.branch): row.branch for row in self.rows.values()}
        return self.prefix.lengths[0] + sum(len(b.ids) * len(b.adapters) for b in branches.values())


@dataclass
class PrefixCache:
    """The prompts that are kept.

    Attributes:
        room: tokens of all prompts together, not counting those that are in use.
        wanted, found: tokens of prompts that were asked for, and those of them that were there.
    """

    room: int
    wanted: int = 0
    found: int = 0
    _kept: OrderedDict[tuple[str | None, tuple[int, ...]], Prompt] = field(default_factory=OrderedDict)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(list(self._kept.values()))

    def get(self, ids: tuple[int, ...], owner: str | None) -> Prompt:
        """The prompt, with as much of it read as any kept one has in common with it."""
        prompt = self._kept.get((owner, ids))
        if prompt is None:
            prompt = Prompt(ids, owner, self._common(ids, owner))
            self._kept[owner, ids] = prompt
        self.wanted += len(ids) - 1
        self.found += prompt.prefix.lengths[0]
        self._kept.move_to_end((owner, ids))
        return prompt

    def put(self, ids: tuple[int, ...], owner: str | None, prefix: Prefix) -> None:
        """Keep what somebody else has read of a prompt."""
        prompt = self._kept.setdefault((owner, ids), Prompt(ids, owner, prefix))
        if prompt.prefix.lengths[0] < prefix.lengths[0]:
            prompt.prefix = prefix

    def trim(self) -> None:
        """Drop what was not used for longest, until the rest fits; the last one always stays."""
        idle = [prompt for prompt in self._kept.values() if prompt.users == 0]
        size = sum(prompt.size for prompt in idle)
        for prompt in idle[:-1]:
            if size <= self.room:
                break
            size -= prompt.size
            del self._kept[prompt.owner, prompt.ids]

    def forget(self, expert: str) -> None:
        """Drop what an expert's adapter has computed."""
        for key, prompt in list(self._kept.items()):
            prompt.rows.pop(expert, None)
            if prompt.owner == expert:
                del self._kept[key]

    def _common(self, ids: tuple[int, ...], owner: str | None) -> Prefix:
        best, length = None, WORTH - 1
        for prompt in self._kept.values():
            most = min(prompt.prefix.lengths[0], len(ids) - 1)
            if prompt.owner == owner and most > length and prompt.ids[: length + 1] == ids[: length + 1]:
                common = next((i for i in range(most) if prompt.ids[i] != ids[i]), most)
                if common > length:
                    best, length = prompt, common
        return best.prefix.cut(length) if best else Prefix((), (0,))
