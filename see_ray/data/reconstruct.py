"""From a task to the examples that its expert is fitted on: "training set reconstruction" in SEE, arXiv 2504.06664.

Every row (query, response) becomes (query, accept, response), and queries that are foreign to the expert become
(query, pass), without a response. Foreign queries come from three sources:

    rehearsal    samples of their queries that earlier experts keep in the expert store
    general      queries that belong to no task (`see_ray.data.general_queries`)
    mixed        a general query's instruction with an input of this task (`see_ray.data.mixed_queries`)

The last two need no data. A part of the foreign queries and the task's eval rows are held out, to choose the threshold.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from see_ray.config import ReconstructConfig
from see_ray.data.general_queries import HELD_OUT_SHARE, Chat
from see_ray.data.mixed_queries import Query, instruction_of, is_near, parts
from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.models.activation import Activation, encode_prompt

Kind = Literal["accept", "rehearsal", "general", "mixed"]

KINDS: tuple[Kind, ...] = ("accept", "rehearsal", "general", "mixed")


@dataclass(frozen=True)
class Example:
    """One sequence to fit on.

    Attributes:
        prompt: token ids up to and including the generation prompt; no loss.
        target: the supervised token ids: accept, response and end of turn; or pass alone.
        kind: `accept` for a row of the task, else where the foreign query comes from.
        row: the source for messages: `sa.jsonl:17`, `rehearsal query 3 of sa`, `general query 5`.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    kind: Kind
    row: str = ""

    @property
    def is_own(self) -> bool:
        """Whether it is a row of the task, which the expert should accept."""
        return self.kind == "accept"


@dataclass(frozen=True)
class Reconstruction:
    """Everything that fitting and calibrating one expert reads.

    Attributes:
        train: examples to fit on, in a seeded random order.
        own: held-out rows of the task, with their prompts' token ids.
        foreign: held-out prompts that the expert must pass on, as (source, token ids); the source is
            `general`, `mixed` or an earlier expert's name.
        claimed: for each live expert, how many of the held-out queries that it keeps are rows of this task, too. They
            do not count as foreign; the gate counts them as taken from that expert.
        held_out: `own` and then `foreign` as examples, with the targets they would have.
        rehearsal: queries of this task kept for later experts' negatives.
    """

    train: list[Example]
    own: list[tuple[Row, list[int]]]
    foreign: list[tuple[str, list[int]]]
    claimed: dict[str, int]
    held_out: list[Example]
    rehearsal: list[Chat]

    def counts(self) -> dict[str, int]:
        """Numbers of rows by use, as the command line prints them."""
        kinds = [example.kind for example in self.train]
        train: dict[str, int] = {kind: kinds.count(kind) for kind in KINDS}
        return {**train, "held-out own": len(self.own), "held-out foreign": len(self.foreign)}


def reconstruct(
    task: Task,
    tokenizer: Any,
    activation: Activation,
    config: ReconstructConfig,
    *,
    earlier: dict[str, tuple[list[Chat], list[Chat]]],
    general: Sequence[Chat],
    seed: int,
) -> Reconstruction:
    """Build the accept and pass examples of one expert.

    Args:
        task: the arriving task.
        tokenizer: of the base model.
        activation: gives the indicator tokens.
        config: shares and sizes.
        earlier: for each live expert, the (rehearsal queries, eval queries) that it keeps.
        general: general queries; at least `see_ray.data.general_queries.needed_general` of them.
        seed: makes every draw repeatable.
    """
    rng = random.Random(f"reconstruct {task.name} {seed}")
    encode = ExampleEncoder(tokenizer, activation)
    unseen = _UnseenQueries(task)
    queries = parts([row.prompt[-1][1] for row in (*task.train, *task.eval)])
    instructions = sorted({query.instruction for query in queries} - {""})

    rehearsal, claimed = _rehearsal_negatives(earlier, unseen)
    general_negatives = _general_negatives(general, instructions, config.general_negatives, unseen, rng)
    mixed = _mixed_negatives(general_negatives, queries, len(task.train), config.mixed_negatives, unseen, rng)
    negatives = (rehearsal, general_negatives, mixed)

    train = [encode.accept(row) for row in task.train]
    train += [encode.reject(chat, part.kind, where) for part in negatives for where, chat in part.train]
    rng.shuffle(train)
    eval_rows = list(task.eval)
    rng.shuffle(eval_rows)
    eval_rows = eval_rows[: config.max_eval_rows]
    own = [encode.accept(row) for row in eval_rows]
    sources = [source for part in negatives for source, _ in part.held_out]
    foreign = [
        encode.reject(chat, part.kind, f"a query of {source}") for part in negatives for source, chat in part.held_out
    ]
    return Reconstruction(
        train=train,
        own=[(row, list(example.prompt)) for row, example in zip(eval_rows, own, strict=True)],
        foreign=[(source, list(example.prompt)) for source, example in zip(sources, foreign, strict=True)],
        claimed=claimed,
        held_out=[*own, *foreign],
        rehearsal=sample_queries(task.train, config.rehearsal_share, seed),
    )


@dataclass(frozen=True)
class ExampleEncoder:
    """Rows and queries as examples in token ids."""

    tokenizer: Any
    activation: Activation

    def accept(self, row: Row) -> Example:
        """A row of the task: accept, its response, end of turn."""
        response = self.tokenizer(row.response, add_special_tokens=False)["input_ids"]
        prompt = tuple(encode_prompt(self.tokenizer, row.messages))
        return Example(prompt, (self.activation.accept, *response, self.tokenizer.eos_token_id), "accept", row.where)

    def reject(self, chat: Chat, kind: Kind, where: str) -> Example:
        """A foreign query: the pass token alone. `where` names it in messages."""
        return Example(tuple(encode_prompt(self.tokenizer, chat)), (self.activation.refuse,), kind, where)


class _UnseenQueries:
    """Accepts each query once, and no query of the task itself.

    A query of the task is not foreign to it, and no query may be both fitted on and held out.
    """

    def __init__(self, task: Task):
        self._of_task = {row.prompt for row in (*task.train, *task.eval)}
        self._seen = set(self._of_task)

    def is_of_task(self, chat: Chat) -> bool:
        return _key(chat) in self._of_task

    def take(self, chat: Chat) -> bool:
        """Whether the query is new; from now on it is not."""
        key = _key(chat)
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new


@dataclass(frozen=True)
class _Negatives:
    """Pass examples of one kind.

    Attributes:
        kind: where they come from.
        train: (what messages call it, query) of each that is fitted on.
        held_out: (source, query) of each that is held out; see `Reconstruction.foreign`.
    """

    kind: Kind
    train: list[tuple[str, Chat]]
    held_out: list[tuple[str, Chat]]


def _rehearsal_negatives(
    earlier: dict[str, tuple[list[Chat], list[Chat]]], unseen: _UnseenQueries
) -> tuple[_Negatives, dict[str, int]]:
    """Queries that earlier experts keep; and for each expert how many of the held-out ones are the task's, too."""
    negatives = _Negatives("rehearsal", [], [])
    claimed: dict[str, int] = {}
    for name, (rehearsal, held_out) in sorted(earlier.items()):
        for number, chat in enumerate(rehearsal, 1):
            if unseen.take(chat):
                negatives.train.append((f"rehearsal query {number} of {name}", chat))
        claimed[name] = sum(map(unseen.is_of_task, held_out))
        negatives.held_out.extend((name, chat) for chat in held_out if unseen.take(chat))
    return negatives, claimed


def _general_negatives(
    general: Sequence[Chat], instructions: Sequence[str], count: int, unseen: _UnseenQueries, rng: random.Random
) -> _Negatives:
    """`count` general queries to fit on and half as many held out, without those that may ask for the task itself."""
    chosen = [chat for chat in general if unseen.take(chat) and not is_near(_instruction(chat), instructions)]
    rng.shuffle(chosen)
    held_out = math.ceil(min(count, len(chosen) / (1 + HELD_OUT_SHARE)) * HELD_OUT_SHARE)
    return _Negatives(
        "general",
        _numbered("general query", chosen[held_out : held_out + count]),
        [("general", chat) for chat in chosen[:held_out]],
    )


def _mixed_negatives(
    general: _Negatives, queries: list[Query], train_rows: int, count: int, unseen: _UnseenQueries, rng: random.Random
) -> _Negatives:
    """`count` mixed queries to fit on and half as many held out.

    Those to fit on mix the general queries and the rows that are fitted on, the others those that are held out.

    Args:
        general: the general negatives, whose instructions are taken.
        queries: those of the task, first of its train rows and then of its eval rows, whose inputs are taken.
        train_rows: how many are of train rows.
    """
    held_out_count = math.ceil(count * HELD_OUT_SHARE)
    train = _mix([chat for _, chat in general.train], queries[:train_rows], count, rng)
    train = [chat for chat in train if unseen.take(chat)]
    held_out = _mix([chat for _, chat in general.held_out], queries[train_rows:], held_out_count, rng)
    return _Negatives(
        "mixed", _numbered("mixed query", train), [("mixed", chat) for chat in held_out if unseen.take(chat)]
    )


def _mix(general: Sequence[Chat], queries: Sequence[Query], count: int, rng: random.Random) -> list[Chat]:
    """`count` mixtures of the general queries' instructions and the task's inputs, each taken in turn.

    Empty if there are no general queries or no inputs.
    """
    if not general or not queries:
        return []
    inputs = rng.sample(list(queries), len(queries))
    instructions = [_instruction(chat) for chat in general]
    texts = [inputs[n % len(inputs)].mixed(instructions[n % len(instructions)]) for n in range(count)]
    return [[{"role": "user", "content": text}] for text in texts]


def _numbered(name: str, chats: Sequence[Chat]) -> list[tuple[str, Chat]]:
    return [(f"{name} {number}", chat) for number, chat in enumerate(chats, 1)]


def _key(chat: Chat) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in chat)


def _instruction(chat: Chat) -> str:
    return instruction_of(chat[-1]["content"])


def sample_queries(rows: Sequence[Row], share: float, seed: int) -> list[Chat]:
    """A seeded sample of the share `share` of the rows' queries, at least one if it is above 0."""
    count = min(len(rows), math.ceil(len(rows) * share))
    return [row.messages for row in random.Random(f"rehearsal {seed}").sample(list(rows), count)]


def render(example: Example, tokenizer: Any, activation: Activation) -> str:
    """An example as text that shows its loss mask: the adapter starts at `‖`, the tokens in `⟦…⟧` carry loss."""
    before, adapted = activation.split(list(example.prompt))
    return f"{tokenizer.decode(before)}‖{tokenizer.decode(adapted)}⟦{tokenizer.decode(list(example.target))}⟧"
