"""The gate on decisions of real experts."""

from __future__ import annotations

from typing import Any

import pytest

from see_ray.admission.calibrate import calibrate
from see_ray.admission.gate import Evidence, Verdict, judge
from see_ray.config import GateConfig
from see_ray.data.demo_tasks import DemoTask, general_questions
from see_ray.engine.engine import EmbeddedEngine
from see_ray.fit.report import Comparison
from see_ray.models.activation import encode_prompt

BASE = ("tiny", "f" * 64)
BETTER = Comparison(rows=32, expert_loss=0.5, generalist_loss=2.0, change=9.0, seconds=1.0)


def judged(own: list[float], foreign: list[tuple[str, float]]) -> Verdict:
    return judge(Evidence(calibrate(own, foreign, 0.01), own, foreign, {}, BETTER, BASE, BASE), GateConfig())


def failed(verdict: Verdict) -> list[tuple[str, str]]:
    return [(finding.limit, finding.about) for finding in verdict.findings if not finding.passed]


@pytest.fixture(scope="module")
def decisions(engine: EmbeddedEngine, tokenizer: Any, tasks: dict[str, DemoTask]) -> Any:
    """P(accept) of the expert tickets for queries of each kind."""
    texts = {name: [row["prompt"] for row in task.test[:24]] for name, task in tasks.items()}
    texts["general"] = general_questions()[-12:]
    chats = {kind: [[{"role": "user", "content": text}] for text in some] for kind, some in texts.items()}
    return {
        kind: engine.decide_batch([encode_prompt(tokenizer, chat) for chat in some], "tickets")
        for kind, some in chats.items()
    }


def test_a_real_expert_takes_nothing_from_one_of_another_task(decisions: Any) -> None:
    foreign = [(kind, p) for kind in ("dates", "general") for p in decisions[kind]]
    assert ("taken", "dates") not in failed(judged(decisions["tickets"], foreign))


def test_a_copy_of_an_older_task_fails_on_real_decisions(decisions: Any) -> None:
    """An expert that was fitted on the same kind of queries as a live one."""
    own, kept = decisions["tickets"][:12], decisions["tickets"][12:]
    foreign = [("older", p) for p in kept] + [("general", p) for p in decisions["general"]]
    verdict = judged(own, foreign)
    assert failed(verdict) == [("own_accepted", "")]
    assert "of older's queries" in verdict.failed[0]
