"""From a task to what an expert is fitted on (SEE, arXiv 2504.06664, "training set
reconstruction"): every row (query, response) becomes (query, accept, response), and queries
that are not the expert's become (query, pass), with no response.

Foreign queries come from three places: the rehearsal samples that earlier experts keep in the
expert store; *general* queries that belong to no task (`general`); and *mixed* ones, in which a
general query's instruction stands before an input of this task (`mixture`). The last two cost
no data.

A part of the foreign queries, and the task's eval rows, are held out to choose the threshold.
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
        kind: where it comes from.
        row: the same for people: `sa.jsonl:17`, `rehearsal query 3 of sa`, `general query 5`.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    kind: Kind
    row: str = ""


@dataclass(frozen=True)
class Reconstruction:
    """Everything that fitting and calibrating one expert reads.

    Attributes:
        train: examples to fit on, in a seeded random order.
        own: held-out rows of the task, with their prompts' token ids.
        foreign: held-out prompts that the expert must pass on, as (kind, token ids); kind is
            `general`, `mixed` or an earlier expert's name.
        claimed: per live expert how many of the held-out queries that it keeps are this task's rows, too; they
            are no foreign ones, and whether the task may have them is for the gate to say.
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
        """Rows by use, for people."""
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
        earlier: per live expert its kept (rehearsal queries, eval queries).
        general: general queries, at least as many as are asked for.
        seed: makes every draw repeatable.
    """
    draw = random.Random(f"reconstruct {task.name} {seed}")
    end = tokenizer.eos_token_id

    def accept(row: Row) -> Example:
        response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        prompt = tuple(encode_prompt(tokenizer, row.messages))
        return Example(prompt, (activation.accept, *response, end), "accept", row.where)

    def refuse(chat: Chat, kind: Kind, row: str) -> Example:
        return Example(tuple(encode_prompt(tokenizer, chat)), (activation.refuse,), kind, row)

    # A query that this task holds too cannot be foreign to it, and none may be both fitted on
    # and held out.
    of_task = {tuple(row.prompt) for row in (*task.train, *task.eval)}
    seen = set(of_task)

    def is_new(chat: Chat) -> bool:
        key = _key(chat)
        new = key not in seen
        seen.add(key)
        return new

    train = [accept(row) for row in task.train]
    foreign: list[tuple[str, Chat]] = []
    claimed: dict[str, int] = {}
    for name, (rehearsal, held_out) in sorted(earlier.items()):
        new = [(number, chat) for number, chat in enumerate(rehearsal, 1) if is_new(chat)]
        train += [refuse(chat, "rehearsal", f"rehearsal query {number} of {name}") for number, chat in new]
        claimed[name] = sum(_key(chat) in of_task for chat in held_out)
        foreign += [(name, chat) for chat in held_out if is_new(chat)]

    queries = parts([row.prompt[-1][1] for row in (*task.train, *task.eval)])
    instructions = sorted({query.instruction for query in queries} - {""})
    # What the task might be asked in other words is no negative either.
    chosen = [chat for chat in general if is_new(chat) and not is_near(_instruction(chat), instructions)]
    draw.shuffle(chosen)
    kept = math.ceil(min(config.general_negatives, len(chosen) / (1 + HELD_OUT_SHARE)) * HELD_OUT_SHARE)
    apart, fitted = chosen[:kept], chosen[kept : kept + config.general_negatives]
    train += [refuse(chat, "general", f"general query {number}") for number, chat in enumerate(fitted, 1)]
    foreign += [("general", chat) for chat in apart]

    own_queries, their_queries = queries[: len(task.train)], queries[len(task.train) :]
    mixed = [chat for chat in _mixed(fitted, own_queries, config.mixed_negatives, draw) if is_new(chat)]
    train += [refuse(chat, "mixed", f"mixed query {number}") for number, chat in enumerate(mixed, 1)]
    kept = math.ceil(config.mixed_negatives * HELD_OUT_SHARE)
    foreign += [("mixed", chat) for chat in _mixed(apart, their_queries, kept, draw) if is_new(chat)]

    draw.shuffle(train)
    own = list(task.eval)
    draw.shuffle(own)
    mine = [accept(row) for row in own[: config.max_eval_rows]]
    theirs = [refuse(chat, "rehearsal", f"a query of {kind}") for kind, chat in foreign]
    return Reconstruction(
        train=train,
        own=[(row, list(example.prompt)) for row, example in zip(own, mine, strict=False)],
        foreign=[(kind, list(example.prompt)) for (kind, _), example in zip(foreign, theirs, strict=True)],
        claimed=claimed,
        held_out=[*mine, *theirs],
        rehearsal=sample_queries(task.train, config.rehearsal_share, seed),
    )


def _key(chat: Chat) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in chat)


def _instruction(chat: Chat) -> str:
    return instruction_of(chat[-1]["content"])


def _mixed(general: Sequence[Chat], queries: Sequence[Query], count: int, draw: random.Random) -> list[Chat]:
    """`count` mixtures of general queries' instructions with the task's inputs, both in turn; none without both."""
    if not general or not queries:
        return []
    inputs = draw.sample(list(queries), len(queries))
    instructions = [_instruction(chat) for chat in general]
    texts = [inputs[n % len(inputs)].mixed(instructions[n % len(instructions)]) for n in range(count)]
    return [[{"role": "user", "content": text}] for text in texts]


def sample_queries(rows: Sequence[Row], share: float, seed: int) -> list[Chat]:
    """A seeded sample of `share` of the rows' queries, at least one where share is above 0."""
    count = min(len(rows), math.ceil(len(rows) * share))
    return [row.messages for row in random.Random(f"rehearsal {seed}").sample(list(rows), count)]


def render(example: Example, tokenizer: Any, activation: Activation) -> str:
    """An example as text with its loss mask made visible: `‖` marks where the adapter starts,
    `⟦…⟧` the tokens that carry loss."""
    before, adapted = activation.split(list(example.prompt))
    return f"{tokenizer.decode(before)}‖{tokenizer.decode(adapted)}⟦{tokenizer.decode(list(example.target))}⟧"
