"""From a task to what an expert is fitted on (SEE, arXiv 2504.06664, "training set
reconstruction"): every row (query, response) becomes (query, accept, response), and queries
that are not the expert's become (query, pass), with no response.

Foreign queries come from two places: the rehearsal samples that earlier experts keep in the
expert store, and *general* queries that belong to no task. The latter cost no data: a chat
model that continues its own template from the start of the user's turn writes what users ask.
They are sampled once per base model and kept in the cache; a file can be given instead.

A part of the foreign queries, and the task's eval rows, are held out to choose the threshold.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from see_ray.activation import Activation, encode_prompt, user_turn_start
from see_ray.base_model import BaseModel, cache_dir, load_model, load_tokenizer
from see_ray.config import BaseModelConfig, ReconstructConfig
from see_ray.errors import ConfigError
from see_ray.task import Row, Task

Chat = list[dict[str, str]]

LONGEST_QUERY = 48
"""Tokens after which a sampled general query is given up."""

MOST_AT_ONCE = 128
"""General queries that are sampled in one batch."""

HELD_OUT_SHARE = 0.25
"""Share of the general queries held out for calibration."""


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
    kind: Literal["accept", "rehearsal", "general"]
    row: str = ""


@dataclass(frozen=True)
class Reconstruction:
    """Everything that fitting and calibrating one expert reads.

    Attributes:
        train: examples to fit on, in a seeded random order.
        own: held-out rows of the task, with their prompts' token ids.
        foreign: held-out prompts that the expert must pass on, as (kind, token ids); kind is
            `general` or an earlier expert's name.
        held_out: `own` and then `foreign` as examples, with the targets they would have.
        rehearsal: queries of this task kept for later experts' negatives.
    """

    train: list[Example]
    own: list[tuple[Row, list[int]]]
    foreign: list[tuple[str, list[int]]]
    held_out: list[Example]
    rehearsal: list[Chat]

    def counts(self) -> dict[str, int]:
        """Rows by use, for people."""
        kinds = [example.kind for example in self.train]
        train = {kind: kinds.count(kind) for kind in ("accept", "rehearsal", "general")}
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

    def refuse(chat: Chat, kind: Literal["rehearsal", "general"], row: str) -> Example:
        return Example(tuple(encode_prompt(tokenizer, chat)), (activation.refuse,), kind, row)

    # A query that this task holds too cannot be foreign to it, and none may be both fitted on
    # and held out.
    seen = {tuple(row.prompt) for row in (*task.train, *task.eval)}

    def is_new(chat: Chat) -> bool:
        key = tuple((turn["role"], turn["content"]) for turn in chat)
        new = key not in seen
        seen.add(key)
        return new

    train = [accept(row) for row in task.train]
    foreign: list[tuple[str, list[int]]] = []
    for name, (rehearsal, held_out) in sorted(earlier.items()):
        new = [(number, chat) for number, chat in enumerate(rehearsal, 1) if is_new(chat)]
        train += [refuse(chat, "rehearsal", f"rehearsal query {number} of {name}") for number, chat in new]
        foreign += [(name, encode_prompt(tokenizer, chat)) for chat in held_out if is_new(chat)]
    chosen = [chat for chat in general if is_new(chat)]
    draw.shuffle(chosen)
    kept = math.ceil(config.general_negatives * HELD_OUT_SHARE)
    negatives = enumerate(chosen[: config.general_negatives], 1)
    train += [refuse(chat, "general", f"general query {number}") for number, chat in negatives]
    foreign += [
        ("general", encode_prompt(tokenizer, chat))
        for chat in chosen[config.general_negatives : config.general_negatives + kept]
    ]
    draw.shuffle(train)
    own = list(task.eval)
    draw.shuffle(own)
    mine = [accept(row) for row in own[: config.max_eval_rows]]
    theirs = [Example(tuple(ids), (activation.refuse,), "rehearsal", f"a query of {kind}") for kind, ids in foreign]
    return Reconstruction(
        train=train,
        own=[(row, list(example.prompt)) for row, example in zip(own, mine, strict=False)],
        foreign=foreign,
        held_out=[*mine, *theirs],
        rehearsal=sample_queries(task.train, config.rehearsal_share, seed),
    )


def sample_queries(rows: Sequence[Row], share: float, seed: int) -> list[Chat]:
    """A seeded sample of `share` of the rows' queries, at least one where share is above 0."""
    count = min(len(rows), math.ceil(len(rows) * share))
    return [row.messages for row in random.Random(f"rehearsal {seed}").sample(list(rows), count)]


def render(example: Example, tokenizer: Any, activation: Activation) -> str:
    """An example as text with its loss mask made visible: `‖` marks where the adapter starts,
    `⟦…⟧` the tokens that carry loss."""
    before, adapted = activation.split(list(example.prompt))
    return f"{tokenizer.decode(before)}‖{tokenizer.decode(adapted)}⟦{tokenizer.decode(list(example.target))}⟧"


# --- general queries ------------------------------------------------------------------------


def needed_general(config: ReconstructConfig) -> int:
    """General queries to have at hand: those to fit on and those held out."""
    return config.general_negatives + math.ceil(config.general_negatives * HELD_OUT_SHARE)


def read_general_file(path: Path) -> list[Chat]:
    """General queries from JSONL of `{"prompt": …}` or `{"messages": […]}`.

    Raises:
        ConfigError: the file cannot be read, or a line is neither.
    """
    chats: list[Chat] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read reconstruct.general_negatives_file {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            chat = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
            chat = [{"role": turn["role"], "content": turn["content"]} for turn in chat]
            if not chat or not all(isinstance(text, str) for turn in chat for text in turn.values()):
                raise ValueError("roles and contents must be text")
            chats.append(chat)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f'{path}:{number}: expected {{"prompt": …}} or {{"messages": […]}}') from error
    return chats


def general_cache(base: BaseModel, config: BaseModelConfig, seed: int) -> Path:
    """Where sampled general queries of a base model are kept."""
    return cache_dir(config) / "general" / f"{base.fingerprint[:12]}-{seed}.jsonl"


def sample_general(
    base: BaseModel,
    config: BaseModelConfig,
    count: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Chat]:
    """`count` different queries that the base model writes as a user would; cached.

    Sampled at temperature 1 among the 50 likeliest tokens, from the chat template up to the
    user's words. A query that does not end within 48 tokens, or is a copy of another, is dropped.
    """
    path = general_cache(base, config, seed)
    chats = read_general_file(path) if path.is_file() else []
    if len(chats) >= count:
        return chats[:count]
    import torch

    tokenizer = load_tokenizer(base)
    model = load_model(base, config, "cuda" if torch.cuda.is_available() else "cpu")
    start = tokenizer(user_turn_start(tokenizer), add_special_tokens=False, return_tensors="pt").to(model.device)
    width, seen = start["input_ids"].shape[1], {chat[0]["content"] for chat in chats}
    rounds = 0
    torch.manual_seed(seed * 1000 + len(chats))
    while len(chats) < count:
        rounds += 1
        batch = min(MOST_AT_ONCE, math.ceil(1.5 * (count - len(chats))) + 4)  # about a quarter are dropped
        if rounds > 12 + 8 * math.ceil(count / MOST_AT_ONCE):
            raise ConfigError(
                f"{base.name} wrote only {len(chats)} of {count} general queries from its chat template; it may be no "
                "chat model: give reconstruct.general_negatives_file, or lower reconstruct.general_negatives"
            )
        with torch.inference_mode():
            written = model.generate(
                **start, do_sample=True, temperature=1.0, top_k=50, max_new_tokens=LONGEST_QUERY,
                num_return_sequences=batch, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        for row in written[:, width:].tolist():
            if tokenizer.eos_token_id not in row:
                continue
            text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)], skip_special_tokens=True).strip()
            if len(text) >= 8 and text not in seen:
                seen.add(text)
                chats.append([{"role": "user", "content": text}])
        on_progress(min(len(chats), count), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{random.getrandbits(32):08x}.tmp")
    temporary.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    temporary.replace(path)
    return chats[:count]
