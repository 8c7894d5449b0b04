"""Rehearsal rows that the models write themselves: SSR (self-synthesized rehearsal, arXiv 2402.01830).

    a few rows of an old task ─► base model, in context ─► new inputs ─► latest adapter ─► their outputs
                                                              └► clusters; of each, the most typical input is kept

As in the paper, the base model writes instances in context, the latest adapter writes the outputs again, and a diverse
subset is kept. The instruction that all rows of a task begin with is copied, not generated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.evaluate.baselines.routers import embed

SHOTS = 3
"""Rows shown in one context."""
DEMONSTRATIONS = 10
"""Rows of an old task that are kept to be shown: the real data that the method needs."""
OVERSAMPLING = 3
"""Inputs generated for each one that is kept: many repeat, or do not end."""
TEMPERATURE = 0.9
MAX_INPUT_TOKENS = 160

Generate = Callable[[list[str], int], list[str]]
"""Continues texts with the base model, sampled with a seed."""


def synthesize_inputs(task: Task, count: int, generate: Generate, seed: int) -> list[str]:
    """At most `count` user turns like those of a task, each the most typical of a cluster.

    Args:
        task: its first training rows are the demonstrations.
        count: number of inputs.
        generate: samples from the base model.
        seed: of every draw.
    """
    demonstrations = [row.prompt[-1][1] for row in task.train[:DEMONSTRATIONS]]
    instruction = common_start(demonstrations)
    draw = random.Random(f"synthesis {task.name} {seed}")
    contexts = []
    for _ in range(OVERSAMPLING * count):
        shots = draw.sample(demonstrations, min(SHOTS, len(demonstrations)))
        listed = "".join(f"\n\nInput: {text[len(instruction) :].strip()}" for text in shots)
        contexts.append(f"{instruction.strip()}{listed}\n\nInput:".strip())
    generated = (text.partition("\n\n")[0].partition("Input:")[0].strip() for text in generate(contexts, seed))
    seen = set(demonstrations)
    inputs = []
    for text in generated:
        user_turn = instruction + text
        if len(text) >= 2 and user_turn not in seen:
            seen.add(user_turn)
            inputs.append(user_turn)
    return diverse(inputs, count, seed)


def common_start(texts: Sequence[str]) -> str:
    """The common prefix of all texts, up to the end of a line: a task's instruction, if it has only one."""
    first, last = min(texts), max(texts)  # every text in between shares the common prefix of these two
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("\n", 0, length) + 1]


def diverse(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """At most `count` texts, each the nearest to the centre of its cluster (k-means on sentence embeddings)."""
    if len(texts) <= count:
        return list(texts)
    from sklearn.cluster import KMeans

    vectors = embed(texts)
    clusters = KMeans(count, n_init=1, random_state=seed).fit(vectors)
    distances = clusters.transform(vectors)
    nearest = [min(range(len(texts)), key=lambda text: distances[text, cluster]) for cluster in range(count)]
    return [texts[index] for index in dict.fromkeys(nearest)]


def as_rows(prompts: Sequence[str], answers: Sequence[str], task: Task) -> list[Row]:
    """Synthesized rows of a task, without those whose answer is empty."""
    return [
        Row((("user", prompt),), answer, f"synthesized row {number} of {task.name}")
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
        if answer.strip()
    ]
