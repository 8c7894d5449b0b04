"""What a fit tells: where it stands while it runs, and what it did in the end."""

from __future__ import annotations

from dataclasses import dataclass

RESULT = "result.json"
"""What worker 0 leaves beside the adapter for the driver: summary, held-out decisions, comparison."""


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
class Comparison:
    """The fitted adapter beside the base model alone, on held-out rows of the task.

    Attributes:
        rows: how many were read; at most `fit_step.COMPARED_ROWS`.
        expert_loss: mean loss of a response token with the adapter, behind the accept indicator.
        generalist_loss: the same of the base model alone, which writes no indicator.
        change: the most that the adapter changes a row's log odds of accept against pass.
        seconds: what reading them took.
    """

    rows: int
    expert_loss: float
    generalist_loss: float
    change: float
    seconds: float


@dataclass(frozen=True)
class FitSummary:
    """What a fit did; saved as `fit.json` beside the adapter.

    Attributes:
        steps: optimizer steps taken.
        examples: accept and pass examples.
        tokens: prompt and response tokens of all examples read, all epochs together.
        seconds: of prefixes, steps, looks at held-out rows and checkpoints, over all starts.
        setup_seconds: from the last worker's start to its first prefix.
        tokens_per_s: `tokens` over `seconds`.
        losses, indicator_losses, response_losses: of each step.
        evaluations: of each look at the held-out rows: step, own_accuracy, foreign_accuracy (at
            P(accept) 0.5), response_loss.
        fewest_reads, most_reads: how often the least and the most read example was read; both are the
            number of epochs unless the fit stopped early.
        resumed: times it went on from a checkpoint.
        kv_store_gb: bound of the memory for kept prefixes; kv_hit_rate: share of prefixes found there.
        padding_share: share of padding among the tokens of the steps' forward passes.
        memory_gb: the most that worker 0 used.
    """

    steps: int
    examples: int
    tokens: int
    seconds: float
    setup_seconds: float
    tokens_per_s: float
    first_loss: float
    last_loss: float
    losses: list[float]
    indicator_losses: list[float]
    response_losses: list[float]
    evaluations: list[dict[str, float]]
    fewest_reads: int
    most_reads: int
    resumed: int
    stopped_early: bool
    kv_store_gb: float
    kv_hit_rate: float
    padding_share: float
    memory_gb: float
    workers: int
    zero_stage: int
    dtype: str
