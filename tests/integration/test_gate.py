"""The gate: who may join the sequence. Decisions and losses come from real small fits where a test says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from see_ray.admission.calibrate import calibrate
from see_ray.admission.gate import Evidence, judge
from see_ray.config import GateConfig
from see_ray.data.demo_tasks import general_questions
from see_ray.errors import GateError
from see_ray.fit.report import Comparison
from see_ray.models.activation import encode_prompt
from see_ray.pipeline import Source, learn
from see_ray.store.expert_store import ExpertStore

BASE = ("tiny", "f" * 64)
BETTER = Comparison(rows=32, expert_loss=0.5, generalist_loss=2.0, change=9.0, seconds=1.0)
LIMITS = GateConfig()


def evidence(own, foreign, *, claimed=None, comparison=BETTER, rate=0.01, live=BASE) -> Evidence:
    return Evidence(calibrate(own, foreign, rate), own, foreign, claimed or {}, comparison, BASE, live)


def good(**changes) -> Evidence:
    """Of an expert that passes: far from 50 queries of sa, and from 20 general ones."""
    return evidence([0.99] * 40, [("sa", 0.01)] * 50 + [("general", 0.02)] * 20, **changes)


def failed(found: Evidence, limits=LIMITS) -> list[tuple[str, str]]:
    return [(finding.limit, finding.about) for finding in judge(found, limits).findings if not finding.passed]


# --- each limit --------------------------------------------------------------------------------


def test_an_expert_that_keeps_to_all_limits_passes():
    verdict = judge(good(), LIMITS)
    assert verdict.passed
    assert {finding.limit for finding in verdict.findings} == {"base_model", "taken", "own_accepted", "gain", "change"}


def test_the_first_expert_has_nobody_to_take_from():
    found = evidence([0.99] * 40, [("general", 0.02)] * 20, live=None)
    assert [finding.limit for finding in judge(found, LIMITS).findings].count("taken") == 0
    assert judge(found, LIMITS).passed


def test_an_expert_may_not_take_an_older_ones_queries():
    # A rate of 20 % lets them through: the gate looks at each older expert apart.
    foreign = [("sa", 0.99)] * 10 + [("sa", 0.01)] * 40 + [("general", 0.01)] * 50
    found = evidence([0.99] * 40, foreign, rate=0.2)
    assert failed(found) == [("taken", "sa")]
    (sentence,) = judge(found, LIMITS).failed
    assert "20 % of sa's 50 kept queries (at most 5 %" in sentence


def test_of_few_kept_queries_a_single_one_may_be_taken():
    foreign = [("sa", 0.99)] + [("sa", 0.01)] * 7 + [("general", 0.01)] * 92
    assert failed(evidence([0.999] * 40, foreign, rate=0.05)) == []


def test_rows_that_an_older_expert_has_kept_count_as_taken():
    assert failed(good(claimed={"sa": 40})) == [("taken", "sa")]
    assert "40 of them are rows of this task, too" in judge(good(claimed={"sa": 40}), LIMITS).failed[0]


def test_an_expert_that_cannot_tell_its_own_queries_from_foreign_ones_fails():
    own = [0.9 + 0.002 * number for number in range(40)]
    found = evidence(own, [("sa", p) for p in own] + [("general", 0.01)] * 20)
    assert failed(found) == [("own_accepted", "")]
    assert "75 % of sa's queries" in judge(found, LIMITS).failed[0]


def test_an_over_accepting_expert_is_told_what_it_takes():
    found = evidence([0.99] * 40, [("general", 0.99)] * 20 + [("mixed", 0.995)] * 8)
    assert failed(found) == [("own_accepted", "")]
    assert "100 % of the general queries, 100 % of the mixed queries" in judge(found, LIMITS).failed[0]


@pytest.mark.parametrize(("loss", "passes"), [(1.98, True), (2.0, False), (3.0, False)])
def test_an_expert_must_be_better_than_the_generalist(loss, passes):
    found = good(comparison=replace(BETTER, expert_loss=loss))
    assert failed(found) == ([] if passes else [("gain", "")])


def test_a_null_adapter_fails():
    found = good(comparison=replace(BETTER, expert_loss=2.0, change=1e-6))
    assert failed(found) == [("gain", ""), ("change", "")]
    assert "it is null" in judge(found, LIMITS).failed[1]


def test_an_expert_for_another_base_model_fails():
    found = good(live=("other", "0" * 64))
    assert failed(found) == [("base_model", "")]
    assert "but the live experts to other (000000000000)" in judge(found, LIMITS).failed[0]


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({"max_taken": 1.0}, {"claimed": {"sa": 40}}),
        ({"min_gain": -9.0}, {"comparison": replace(BETTER, expert_loss=3.0)}),
        ({"min_change": 0.0}, {"comparison": replace(BETTER, change=0.0)}),
    ],
)
def test_limits_are_settings(limits, found):
    assert failed(good(**found))
    assert not failed(good(**found), GateConfig(**limits))


def test_the_report_is_for_programs_and_for_people(tmp_path):
    verdict = judge(good(claimed={"sa": 40}), LIMITS)
    verdict.write(tmp_path)
    report = json.loads((tmp_path / "gate.json").read_text())
    assert report["passed"] is False
    assert [(f["limit"], f["found"], f["allowed"]) for f in report["findings"] if not f["passed"]] == [
        ("taken", pytest.approx(40 / 90), 0.05)
    ]
    text = (tmp_path / "gate.md").read_text()
    assert f"- **failed**: {verdict.failed[0]}" in text
    assert text.count("- kept: ") == len(report["findings"]) - 1


# --- on decisions of real experts --------------------------------------------------------------


@pytest.fixture(scope="module")
def decisions(engine, tokenizer, tasks):
    """P(accept) of the expert tickets for queries of each kind."""
    texts = {name: [row["prompt"] for row in task.test[:24]] for name, task in tasks.items()}
    texts["general"] = general_questions()[-12:]
    chats = {kind: [[{"role": "user", "content": text}] for text in some] for kind, some in texts.items()}
    return {
        kind: engine.decide_batch([encode_prompt(tokenizer, chat) for chat in some], "tickets")
        for kind, some in chats.items()
    }


def test_a_real_expert_takes_nothing_from_one_of_another_task(decisions):
    foreign = [(kind, p) for kind in ("dates", "general") for p in decisions[kind]]
    assert ("taken", "dates") not in failed(evidence(decisions["tickets"], foreign))


def test_a_copy_of_an_older_task_fails_on_real_decisions(decisions):
    """An expert that was fitted on the same kind of queries as a live one."""
    own, kept = decisions["tickets"][:12], decisions["tickets"][12:]
    foreign = [("older", p) for p in kept] + [("general", p) for p in decisions["general"]]
    assert failed(evidence(own, foreign)) == [("own_accepted", "")]
    assert "of older's queries" in judge(evidence(own, foreign), LIMITS).failed[0]


# --- through a whole fit -----------------------------------------------------------------------


@pytest.fixture
def strict(config):
    """The shared settings with the default limits, and held-out rows enough for them."""
    few = config.reconstruct.model_copy(update={"eval_share": 0.25, "max_eval_rows": 12})
    return config.model_copy(update={"gate": LIMITS, "reconstruct": few})


@pytest.fixture
def written(tmp_path):
    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(str(path))

    return write


def live(config) -> list[str]:
    return [ref.name for ref in ExpertStore.open(config.store.url).head().experts]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_poisoned_task_is_set_aside_and_can_be_forced(experts, strict, tasks, written):
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
def test_an_expert_that_fails_is_published_by_force_and_says_so(experts, strict, tasks, written):
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
def test_a_null_adapter_is_set_aside(experts, strict, tasks, written):
    still = strict.model_copy(update={"fit": strict.fit.model_copy(update={"learning_rate": 1e-12})})
    with pytest.raises(GateError, match="it is null"):
        learn(written("null", tasks["contacts"].train[:24]), still)
    assert "null" not in live(strict)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_similar_task_of_other_wording_gets_in(experts, strict, tasks, written):
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
