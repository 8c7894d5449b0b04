"""General queries: pass examples that belong to no task and need no data.

A chat model that continues its chat template from the start of the user's turn writes what users ask. By itself it
writes chat; but most queries of a task are an instruction and an input. So every second query starts with the first
words of an instruction (`You are given`, `Classify the`, …). Both kinds are sampled once for each base model and seed,
and kept in the cache; a file can be given instead.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from see_ray.config import BaseModelConfig, ReconstructConfig
from see_ray.errors import ConfigError
from see_ray.models.activation import user_turn_start
from see_ray.models.base_model import BaseModel, load_model, load_tokenizer
from see_ray.models.cache import cache_dir, write_atomically

Chat = list[dict[str, str]]

LONGEST_QUERY = 48
"""Most tokens of a general query."""

MOST_AT_ONCE = 128
"""Most general queries that are sampled in one batch."""

HELD_OUT_SHARE = 0.5
"""General and mixed queries that are held out for calibration, as a share of those that are fitted on."""

OPENINGS = (
    "In this task, you", "You are given a", "Given the following", "Your task is to", "Classify the", "Write a",
    "Read the following", "Determine whether", "Translate the", "Answer the", "You will be given", "Generate a",
    "Identify the", "Given a", "Summarize the", "Rewrite the", "Extract the", "In this task, you are given",
    "List the", "Decide whether", "Find the", "Convert the", "Given two", "Explain the", "Choose the", "Complete the",
    "Correct the", "Create a", "Fill in", "Sort the", "Compare the", "Describe the", "Here is a", "Based on the",
    "Label the", "Detect", "Paraphrase the", "Count the", "Predict the", "Replace the", "Which of", "Is the following",
    "Edit the", "Turn the", "For the given", "Analyze the", "Provide a", "Construct a", "Calculate the", "Format the",
)  # fmt: skip
"""First words of instructions; every second general query starts with the next of them."""

_SENTENCE_END = re.compile(r"[.!?:](?=\s|$)")


def needed_general(config: ReconstructConfig) -> int:
    """How many general queries are needed: those to fit on and those held out."""
    return config.general_negatives + math.ceil(config.general_negatives * HELD_OUT_SHARE)


def read_general_file(path: Path) -> list[Chat]:
    """General queries from JSONL of `{"prompt": …}` or `{"messages": […]}`.

    Raises:
        ConfigError: the file cannot be read, or a line has neither form.
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
    """The file of the cache that holds the sampled general queries of a base model."""
    return cache_dir(config) / "general" / f"{base.fingerprint[:12]}-{seed}-opened.jsonl"


def write_cache(path: Path, chats: Sequence[Chat]) -> None:
    """Write general queries as JSONL; a reader finds all of them or none."""
    write_atomically(path, "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def sample_general(
    base: BaseModel,
    config: BaseModelConfig,
    count: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Chat]:
    """`count` different queries that the base model writes as a user would, from the cache as far as it has them.

    Queries without and with an opening alternate, so that the first n have as many of each. They are sampled at
    temperature 1 from the 50 likeliest tokens, up to 48 tokens. A query without an opening that does not end by then is
    dropped; one with an opening is cut after its last whole sentence. Duplicates are dropped.

    Args:
        base, config: the base model, and how to load it.
        count: of queries.
        seed: of sampling; part of the cache file's name.
        on_progress: called with (done, total) after each batch.

    Raises:
        ConfigError: the base model does not write such queries.
    """
    path = general_cache(base, config, seed)
    chats = read_general_file(path) if path.is_file() else []
    if len(chats) >= count:
        return chats[:count]
    import torch

    tokenizer = load_tokenizer(base)
    model = load_model(base, config, "cuda" if torch.cuda.is_available() else "cpu")
    start = user_turn_start(tokenizer)
    texts = [chat[0]["content"] for chat in chats]
    free, opened, seen = texts[::2], texts[1::2], set(texts)
    half, rounds = math.ceil(count / 2), 0
    openings = _in_turn(len(opened))
    torch.manual_seed(seed * 1000 + len(chats))
    while len(free) < half or len(opened) < half:
        rounds += 1
        if rounds > 12 + 8 * math.ceil(count / MOST_AT_ONCE):
            raise ConfigError(
                f"{base.name} wrote only {len(free) + len(opened)} of {count} general queries from its chat template; "
                "it may be no chat model: give reconstruct.general_negatives_file, or lower "
                "reconstruct.general_negatives"
            )
        begun = [""] * _batch(half - len(free)) + [next(openings) for _ in range(_batch(half - len(opened)))]
        for opening, (text, ended) in zip(begun, _continue(model, tokenizer, start, begun), strict=True):
            query = text if ended else _whole_sentences(text) if opening else ""
            if len(query) >= 8 and query != opening and query not in seen:
                seen.add(query)
                (opened if opening else free).append(query)
        on_progress(min(len(free), half) + min(len(opened), half), 2 * half)
    pairs = zip(free[:half], opened[:half], strict=True)
    chats = [[{"role": "user", "content": text}] for pair in pairs for text in pair]
    write_cache(path, chats)
    return chats[:count]


def _batch(missing: int) -> int:
    """Batch size for so many queries that are missing: about a quarter of those sampled are dropped."""
    return min(MOST_AT_ONCE // 2, math.ceil(1.5 * missing) + 2) if missing > 0 else 0


def _in_turn(first: int) -> Iterator[str]:
    number = first
    while True:
        yield OPENINGS[number % len(OPENINGS)]
        number += 1


def _continue(model: Any, tokenizer: Any, start: str, begun: Sequence[str]) -> list[tuple[str, bool]]:
    """Sample the rest of user turns that begin with the given texts, as (whole turn, whether the turn ended)."""
    import torch

    rows = [tokenizer(start + text, add_special_tokens=False)["input_ids"] for text in begun]
    width = max(map(len, rows))
    # Padded on the left, since generation continues on the right.
    ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in rows])
    present = torch.arange(width)[None, :] >= width - torch.tensor([len(row) for row in rows])[:, None]
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=present.long().to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=50,
            max_new_tokens=LONGEST_QUERY,
            pad_token_id=tokenizer.eos_token_id,
        )
    turns = []
    for text, row in zip(begun, written[:, width:].tolist(), strict=True):
        ended = tokenizer.eos_token_id in row
        rest = row[: row.index(tokenizer.eos_token_id)] if ended else row
        turns.append(((text + tokenizer.decode(rest, skip_special_tokens=True)).strip(), ended))
    return turns


def _whole_sentences(text: str) -> str:
    """A text cut after its last whole sentence; empty if it has none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""
