"""The gate through whole fits: which tasks are set aside, and which are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from see_ray.config import Config, GateConfig
from see_ray.data.demo_tasks import DemoTask
from see_ray.errors import GateError
from see_ray.pipeline import Source, learn
from see_ray.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from tests.conftest import Fitted


@pytest.fixture
def strict(config: Config) -> Any:
    """The shared settings with the default limits, and held-out rows enough for them."""
    few = config.reconstruct.model_copy(update={"eval_share": 0.25, "max_eval_rows": 12})
    return config.model_copy(update={"gate": GateConfig(), "reconstruct": few})


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(name: Any, rows: Any) -> Any:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(str(path))

    return write


def live(config: Config) -> list[str]:
    return [ref.name for ref in ExpertStore.open(config.store.url).head().experts]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_poisoned_task_is_set_aside_and_can_be_forced(
    experts: Fitted, strict: Any, tasks: dict[str, DemoTask], written: Any
) -> None:
    """The queries of a live expert with other answers."""
    poison = written("poison", [{"prompt": row["prompt"], "response": "no"} for row in tasks["tickets"].train[:40]])
    store = ExpertStore.open(strict.store.url)
    before = store.head()
    with pytest.raises(GateError, match=r"it would take .* of tickets's"):
        learn(poison, strict)
    assert store.head() == before
    (aside,) = [manifest for manifest in store.experts() if manifest.name == "poison"]
    assert aside.gate == "set aside"
    assert any("tickets" in sentence for sentence in aside.gate_failed)
    assert aside.gate_failed[0] in store.read_text(aside.ref, "gate.md")
    assert not json.loads(store.read_text(aside.ref, "gate.json"))["passed"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_expert_that_fails_is_published_by_force_and_says_so(
    experts: Fitted, strict: Any, tasks: dict[str, DemoTask], written: Any
) -> None:
    poison = written("forced", [{"prompt": row["prompt"], "response": "no"} for row in tasks["tickets"].train[:40]])
    store = ExpertStore.open(strict.store.url)
    try:
        learned = learn(poison, strict, force=True)
        assert learned.manifest.gate == "forced"
        assert learned.manifest.gate_failed == learned.gate.failed != ()
        assert learned.sequence.forced
    finally:
        if "forced" in live(strict):
            store.remove("forced")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_null_adapter_is_set_aside(experts: Fitted, strict: Any, tasks: dict[str, DemoTask], written: Any) -> None:
    still = strict.model_copy(update={"fit": strict.fit.model_copy(update={"learning_rate": 1e-12})})
    with pytest.raises(GateError, match="it is null"):
        learn(written("null", tasks["contacts"].train[:24]), still)
    assert "null" not in live(strict)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_similar_task_of_other_wording_gets_in(
    experts: Fitted, strict: Any, tasks: dict[str, DemoTask], written: Any
) -> None:
    """Tickets again, but asked for the customer's mood."""
    moods = ["I am very angry. ", "Thanks for your help! "]
    rows = [
        {
            "prompt": f"How does this customer feel? Answer angry or friendly.\n{moods[number % 2]}"
            + row["prompt"].split("\n", 1)[1],
            "response": ("angry", "friendly")[number % 2],
        }
        for number, row in enumerate(tasks["tickets"].train[:40])
    ]
    store = ExpertStore.open(strict.store.url)
    try:
        learned = learn(written("moods", rows), strict)
        assert learned.gate.passed
        assert learned.manifest.gate == "passed"
    finally:
        if "moods" in live(strict):
            store.remove("moods")
