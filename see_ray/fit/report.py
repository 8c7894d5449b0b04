"""What a fit reports: its progress while it runs, and a summary at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

RESULT_FILE = "result.json"
"""File beside the adapter in which rank 0 sends a `Fitted` to the driver, as JSON."""


@dataclass(frozen=True)
class Progress:
    """Progress of a fit.

    Attributes:
        phase: `starting`, `prefix` (reading prefixes), `fit` (optimizer steps), `held-out` (deciding on held-out
            prompts) or `saving`.
        done, total: batches or steps of this phase.
        loss: of the last step; None outside `fit`.
        tokens_per_s: prompt and response tokens of the examples read, per second since the start.
        waiting: while starting, what the workers need and what is free.
    """

    phase: str
    done: int
    total: int
    loss: float | None = None
    tokens_per_s: float | None = None
    waiting: str = ""


Report = Callable[[Progress], object]
"""Called with the progress of a phase."""


@dataclass(frozen=True)
class Comparison:
    """The fitted adapter compared with the base model alone, on held-out rows of the task.

    Attributes:
        rows: how many were read; at most `held_out.COMPARED_ROWS`.
        expert_loss: mean loss of a response token with the adapter, after the accept indicator, in nats.
        generalist_loss: the same of the base model alone, which writes no indicator.
        change: the most that the adapter changes a row's log odds of accept against pass.
        seconds: that reading them took.
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
        seconds: of prefixes, steps, evaluations and checkpoints, over all starts.
        setup_seconds: from the last worker's start to its first prefix.
        tokens_per_s: `tokens` over `seconds`.
        first_loss, last_loss: of the first and the last step.
        losses, indicator_losses, response_losses: of each step.
        evaluations: on held-out rows, oldest first: step, own_accuracy, foreign_accuracy (at P(accept) 0.5),
            response_loss.
        fewest_reads, most_reads: how often the least and the most read example was read; both are the
            number of epochs unless the fit stopped early.
        resumed: times it resumed from a checkpoint.
        stopped_early: whether `fit.early_stopping_patience` ended it.
        kv_store_gb: most memory for kept prefixes.
        kv_hit_rate: share of prefixes that were kept and not read again.
        padding_share: share of padding among the tokens of the steps' forwards.
        memory_gb: the most that rank 0 used.
        workers: number of ranks.
        zero_stage: of DeepSpeed.
        dtype: of the base model.
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


@dataclass(frozen=True)
class Fitted:
    """What a fit gives besides the adapter.

    Attributes:
        summary: what it did.
        decisions: P(accept) of each held-out row.
        comparison: with the base model alone on those of them that are the task's own; None without any.
    """

    summary: FitSummary
    decisions: list[float]
    comparison: Comparison | None = None

    def write(self, folder: Path) -> None:
        """Write `RESULT_FILE` to a folder."""
        (folder / RESULT_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Fitted:
        """Read what `write` wrote."""
        data = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        comparison = Comparison(**data["comparison"]) if data["comparison"] else None
        return Fitted(FitSummary(**data["summary"]), data["decisions"], comparison)
