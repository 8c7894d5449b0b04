"""Reports of runs: figures and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from loadtest.generator import Outcome
from loadtest.report import ClusterSample, Run, per_second, quantile, summary_table, write_run


def test_a_run_is_summed_up_and_written(tmp_path: Path) -> None:
    outcomes = [Outcome(0.5, "a", 0, 200, 1.0, "a"), Outcome(1.5, "a", 0, 429, 0.01, "", 3), Outcome(2, "a", 0, 0, 9)]
    run = Run("step", "fixed", 4, outcomes, [ClusterSample(float(n), 1, {"a": 2}) for n in range(5)])
    summary = run.summary()
    assert (summary["offered"], summary["served"], summary["refused"], summary["failed"]) == (3, 1, 1, 1)
    assert (summary["replica_seconds"], summary["node_seconds"]) == (8, 4)
    assert [row["served"] for row in per_second(run)] == [0, 1, 0, 0, 0]
    write_run(run, tmp_path / "fixed-step")
    assert {path.name for path in tmp_path.iterdir()} == {
        "fixed-step.csv", "fixed-step.outcomes.csv", "fixed-step.png"}  # fmt: skip
    assert json.loads(json.dumps(summary)) == summary


def test_a_quantile_is_a_value_that_was_there() -> None:
    values = [3.0, 1.0, 2.0]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([], 0.5)) == (2.0, 3.0, None)
    high = quantile(values, 0.95)
    assert high is not None
    assert Counter(values)[high] == 1


def test_summaries_are_a_table_of_markdown_without_columns_that_nobody_has() -> None:
    assert summary_table([{"policy": "quick", "served": 3, "p50_s": None}, {"policy": "zero"}]).splitlines() == [
        "| policy | served | p50_s |",
        "|--------|--------|-------|",
        "| quick  | 3      |       |",
        "| zero   |        |       |",
    ]
