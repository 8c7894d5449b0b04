"""What a fit tells: where it stands while it runs, and what it did in the end."""

from __future__ import annotations

from dataclasses import dataclass

RESULT = "result.json"
"""What worker 0 leaves beside the adapter for the driver: summary and held-out decisions."""


@dataclass(frozen=True)
class Progress:
    """Where a fit stands, as its workers tell it.

    Attributes:
        phase: `starting`, `prefix` (reading prefixes), `fit` (taking steps), `held-out` (deciding on
            held-out prompts) or `saving`.
        done, total: batches or steps of this phase.
        loss: of the last step; None outside `fit`.
        tokens_per_s: prompt and response tokens of the examples seen, per second since start.
        waiting: while starting, what the workers need and what is free.
    """

    phase: str
    done: int
    total: int
    loss: float | None = None
    tokens_per_s: float | None = None
    waiting: str = ""


@dataclass(frozen=True)
class FitSummary:
    """What a fit did; saved as `fit.json` beside the adapter."""

    steps: int
    examples: int
    tokens: int
    seconds: float
    tokens_per_s: float
    first_loss: float
    last_loss: float
    losses: list[float]
    kv_hit_rate: float
    padding_share: float
    workers: int
    zero_stage: int
    dtype: str
