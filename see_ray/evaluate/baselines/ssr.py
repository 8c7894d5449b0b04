"""Rehearsal rows that the models write themselves: SSR (self-synthesized rehearsal, arXiv 2402.01830).

    a few rows of an old task ─► base model, in context ─► new inputs ─► latest adapter ─► their outputs
                                                              └► clusters, the most typical of each kept

As in the paper: the base model writes instances in context, the latest model refines the outputs, and a diverse
part is kept. The instruction that all rows of a task begin with is not written again but copied.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.evaluate.baselines.routers import embed

SHOWN = 3
"""Rows in one context."""
DEMONSTRATIONS = 10
"""Rows of a task that are kept to be shown; the method needs that much real data."""
SURPLUS = 3
"""Inputs that are drawn for each one that is wanted: many repeat or never end."""
HOT = 0.9
"""Temperature of drawing."""
LONGEST = 160
"""Tokens of a written input."""

Write = Callable[[list[str], int], list[str]]
"""Continues texts with the base model, drawn with a seed."""


def inputs(task: Task, wanted: int, write: Write, seed: int) -> list[str]:
    """User turns like those of a task, at most `wanted`, the most typical of as many clusters.

    Args:
        task: its first training rows are shown.
        wanted: how many.
        write: draws from the base model.
        seed: of every draw.
    """
    shown = [row.prompt[-1][1] for row in task.train[:DEMONSTRATIONS]]
    instruction = common_start(shown)
    draw = random.Random(f"synthesis {task.name} {seed}")
    contexts = []
    for _ in range(SURPLUS * wanted):
        some = draw.sample(shown, min(SHOWN, len(shown)))
        listed = "".join(f"\n\nInput: {text[len(instruction) :].strip()}" for text in some)
        contexts.append(f"{instruction.strip()}{listed}\n\nInput:".strip())
    written = (text.partition("\n\n")[0].partition("Input:")[0].strip() for text in write(contexts, seed))
    known = set(shown)
    found = []
    for text in written:
        whole = instruction + text
        if len(text) >= 2 and whole not in known:
            known.add(whole)
            found.append(whole)
    return diverse(found, wanted, seed)


def common_start(texts: Sequence[str]) -> str:
    """What all texts begin with, up to a line's end: the instruction, where a task has only one."""
    first, last = min(texts), max(texts)  # in alphabetical order, all others begin as these two do
    alike = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first.rfind("\n", 0, alike) + 1]


def diverse(texts: Sequence[str], wanted: int, seed: int) -> list[str]:
    """As many texts, each nearest to the centre of its cluster (k-means on sentence embeddings)."""
    if len(texts) <= wanted:
        return list(texts)
    from sklearn.cluster import KMeans

    vectors = embed(texts)
    clusters = KMeans(wanted, n_init=1, random_state=seed).fit(vectors)
    distances = clusters.transform(vectors)
    best = [min(range(len(texts)), key=lambda text: distances[text, cluster]) for cluster in range(wanted)]
    return [texts[number] for number in dict.fromkeys(best)]


def rows_of(prompts: Sequence[str], answers: Sequence[str], task: Task) -> list[Row]:
    """Synthesized rows; what was answered with nothing is dropped."""
    return [
        Row((("user", prompt),), answer, f"synthesized row {number} of {task.name}")
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
        if answer.strip()
    ]
