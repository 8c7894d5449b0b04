"""The walk over the sequence, with experts that are coroutines: order, fallback, lookahead, cancelling."""

import asyncio
import json
import random
from typing import Any

import pytest

from see_ray.errors import ServingError
from see_ray.routing.chain import GENERALIST, ChainEntry, Decision, ExpertUnavailable, Trace, walk


class Experts:
    """Experts with given decisions and delays (in milliseconds), which note what becomes of each ask.

    A decision may be an exception, which is then raised. Being cancelled takes an expert 2 ms.
    """

    def __init__(self, decisions: Any, delays: Any = None) -> None:
        self.decisions = decisions
        self.delays = delays or {}
        self.events: list[tuple[str, str]] = []
        self.open = self.most = 0

    async def decide(self, expert: Any) -> Any:
        self.events.append(("asked", expert))
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await asyncio.sleep(self.delays.get(expert, 0) / 1000)
            if isinstance(self.decisions[expert], Exception):
                raise self.decisions[expert]
            self.events.append(("decided", expert))
            return self.decisions[expert]
        except asyncio.CancelledError:
            await asyncio.sleep(0.002)
            self.events.append(("cancelled", expert))
            raise
        finally:
            self.open -= 1

    def of(self, kind: Any) -> Any:
        return [expert for event, expert in self.events if event == kind]

    async def walk(self, lookahead: Any = 1, threshold: Any = 0.5) -> Any:
        return await walk([ChainEntry(name, threshold) for name in self.decisions], self.decide, lookahead=lookahead)


def outcome(trace: Any) -> Any:
    """Everything about a trace but times."""
    asked = [(decision.expert, decision.p_accept, decision.threshold) for decision in trace.asked]
    return trace.sequence_version, asked, trace.answered_by, trace.reason


async def outcome_or_error(entries: Any, decide: Any, lookahead: Any) -> Any:
    try:
        return outcome(await walk(entries, decide, lookahead=lookahead, sequence_version=3))
    except Exception as error:
        return repr(error)


# --- who answers ---------------------------------------------------------------------------


async def test_experts_are_asked_in_the_order_given() -> None:
    trace = await Experts({"third": 0.1, "first": 0.2, "second": 0.3}).walk()
    assert [asked.expert for asked in trace.asked] == ["third", "first", "second"]


async def test_the_first_that_accepts_answers() -> None:
    trace = await Experts({"a": 0.4, "b": 0.6, "c": 0.9}).walk()
    assert (trace.answered_by, trace.reason) == ("b", "accepted")


async def test_nobody_after_the_one_that_accepts_is_asked_or_shown() -> None:
    experts = Experts({"a": 0.4, "b": 0.6, "c": 0.9})
    trace = await experts.walk()
    assert experts.of("asked") == [asked.expert for asked in trace.asked] == ["a", "b"]


async def test_the_generalist_answers_if_none_accepts() -> None:
    trace = await Experts({"a": 0.1, "b": 0.49}).walk()
    assert (trace.answered_by, trace.reason) == (GENERALIST, "no expert accepted")
    assert len(trace.asked) == 2


@pytest.mark.parametrize("lookahead", [1, 3])
async def test_the_generalist_answers_an_empty_sequence(lookahead: int) -> None:
    trace = await walk([], Experts({}).decide, lookahead=lookahead, sequence_version=7)
    assert outcome(trace) == (7, [], GENERALIST, "no expert accepted")


async def test_a_decision_equal_to_the_threshold_accepts() -> None:
    assert (await Experts({"a": 0.75}).walk(threshold=0.75)).answered_by == "a"


async def test_a_decision_just_below_the_threshold_passes() -> None:
    assert (await Experts({"a": 0.7499999}).walk(threshold=0.75)).answered_by == GENERALIST


async def test_each_expert_has_its_own_threshold() -> None:
    experts = Experts({"a": 0.6, "b": 0.6})
    trace = await walk([ChainEntry("a", 0.7), ChainEntry("b", 0.5)], experts.decide)
    assert trace.answered_by == "b"
    assert [asked.threshold for asked in trace.asked] == [0.7, 0.5]


# --- asking ahead --------------------------------------------------------------------------


async def test_without_lookahead_each_is_asked_only_after_the_one_before_has_passed() -> None:
    experts = Experts({"a": 0.1, "b": 0.2, "c": 0.9}, delays={"a": 2, "b": 1})
    await experts.walk(lookahead=1)
    assert experts.events == [(event, name) for name in "abc" for event in ("asked", "decided")]


@pytest.mark.parametrize("lookahead", [0, -1])
async def test_a_lookahead_below_one_is_one(lookahead: int) -> None:
    experts = Experts({"a": 0.1, "b": 0.9})
    assert (await experts.walk(lookahead)).answered_by == "b"
    assert experts.most == 1


async def test_with_lookahead_several_are_asked_before_the_first_has_decided() -> None:
    experts = Experts({"a": 0.1, "b": 0.2, "c": 0.3}, delays={"a": 5, "b": 5, "c": 5})
    await experts.walk(lookahead=3)
    assert experts.events[:3] == [("asked", "a"), ("asked", "b"), ("asked", "c")]


async def test_the_next_is_asked_as_soon_as_the_earliest_has_passed() -> None:
    experts = Experts({"a": 0.1, "b": 0.1, "c": 0.1}, delays={"b": 20})
    await experts.walk(lookahead=2)
    assert experts.events.index(("asked", "c")) < experts.events.index(("decided", "b"))


async def test_a_later_expert_that_accepts_sooner_does_not_overtake() -> None:
    experts = Experts({"a": 0.9, "b": 0.99}, delays={"a": 5})
    assert (await experts.walk(lookahead=2)).answered_by == "a"


async def test_any_lookahead_gives_what_asking_one_by_one_gives() -> None:
    async def compare(seed: Any) -> Any:
        draw = random.Random(seed)
        names = [f"e{number}" for number in range(draw.randrange(9))]
        entries = [ChainEntry(name, draw.choice([0.2, 0.5, 0.9])) for name in names]
        unusual = [ExpertUnavailable("gone"), RuntimeError(f"broken {seed}")]
        decisions = {
            name: draw.choice(unusual) if draw.random() < 0.1 else draw.choice([0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
            for name in names
        }
        experts = Experts(decisions, {name: draw.choice([0, 0, 1, 2, 3]) for name in names})
        one_by_one = await outcome_or_error(entries, experts.decide, 1)
        ahead = draw.randrange(2, 11)
        return seed, ahead, one_by_one, await outcome_or_error(entries, experts.decide, ahead)

    found = await asyncio.gather(*(compare(seed) for seed in range(400)))
    assert [row for row in found if row[2] != row[3]] == []
    assert {str(row[2])[:12] for row in found} >= {"RuntimeError"}  # the draw has walks that fail, too
    assert sum(isinstance(row[2], tuple) for row in found) > 250


@pytest.mark.parametrize("lookahead", [1, 2, 3, 5, 20])
async def test_never_more_than_lookahead_are_asked_at_once(lookahead: int) -> None:
    names = [f"e{number}" for number in range(10)]
    experts = Experts(dict.fromkeys(names, 0.0), {name: number % 4 for number, name in enumerate(names)})
    await experts.walk(lookahead)
    assert experts.most == min(lookahead, 10)


# --- what was asked too early --------------------------------------------------------------


async def test_those_asked_too_early_are_cancelled_and_awaited() -> None:
    experts = Experts({"a": 0.9, "b": 0.9, "c": 0.9}, delays={"a": 1, "b": 10_000, "c": 10_000})
    await experts.walk(lookahead=3)
    assert sorted(experts.of("cancelled")) == ["b", "c"]
    assert experts.open == 0


async def test_the_failure_of_one_asked_too_early_does_not_count() -> None:
    experts = Experts({"a": 0.9, "b": RuntimeError("broken")}, delays={"a": 3})
    trace = await experts.walk(lookahead=2)
    assert outcome(trace) == (0, [("a", 0.9, 0.5)], "a", "accepted")


async def test_cancelling_the_walk_cancels_what_is_pending() -> None:
    experts = Experts({"a": 0.9, "b": 0.9, "c": 0.9}, delays=dict.fromkeys("abc", 10_000))
    walking = asyncio.ensure_future(experts.walk(lookahead=2))
    await asyncio.sleep(0.005)
    walking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await walking
    assert sorted(experts.of("cancelled")) == ["a", "b"]
    assert experts.open == 0


async def test_a_cancelled_walk_asks_nobody_more() -> None:
    experts = Experts({"a": 0.1, "b": 0.1}, delays={"a": 10_000})
    walking = asyncio.ensure_future(experts.walk())
    await asyncio.sleep(0.005)
    walking.cancel()
    await asyncio.wait([walking])
    assert experts.of("asked") == ["a"]


# --- failures ------------------------------------------------------------------------------


async def test_an_expert_that_cannot_be_asked_counts_as_a_pass() -> None:
    assert (await Experts({"a": ExpertUnavailable("gone"), "b": 0.9}).walk()).answered_by == "b"


async def test_an_expert_that_cannot_be_asked_is_shown() -> None:
    trace = await Experts({"a": ExpertUnavailable("gone"), "b": 0.1}).walk()
    assert [(asked.expert, asked.p_accept) for asked in trace.asked] == [("a", None), ("b", 0.1)]


def test_an_expert_that_could_not_be_asked_accepts_at_no_threshold() -> None:
    assert not Decision("a", None, 0.0, 1.0).accepted


@pytest.mark.parametrize("error", [ServingError("no"), RuntimeError("broken")])
async def test_another_failure_is_that_of_the_walk(error: Any) -> None:
    with pytest.raises(type(error)) as caught:
        await Experts({"a": 0.1, "b": error, "c": 0.9}).walk(lookahead=2)
    assert caught.value is error


async def test_another_failure_cancels_the_rest() -> None:
    experts = Experts({"a": RuntimeError("broken"), "b": 0.9, "c": 0.9}, delays={"a": 1, "b": 10_000, "c": 10_000})
    with pytest.raises(RuntimeError):
        await experts.walk(lookahead=3)
    assert sorted(experts.of("cancelled")) == ["b", "c"]
    assert experts.open == 0


# --- the trace -----------------------------------------------------------------------------


def test_the_body_of_a_trace_is_this_json() -> None:
    asked = (
        Decision("a", None, 0.25, 0.04),
        Decision("b", 0.123456789, 0.7512345678, 5.06),
        Decision("c", 0.75, 0.75, 12.0),
    )
    body = Trace(7, asked, "c", "accepted", 17.16).body()
    assert json.loads(json.dumps(body)) == {
        "sequence_version": 7,
        "answered_by": "c",
        "reason": "accepted",
        "asked": [
            {"expert": "a", "p_accept": None, "threshold": 0.25, "decision": "unavailable", "ms": 0.0},
            {"expert": "b", "p_accept": 0.123457, "threshold": 0.751235, "decision": "pass", "ms": 5.1},
            {"expert": "c", "p_accept": 0.75, "threshold": 0.75, "decision": "accept", "ms": 12.0},
        ],
        "ms": 17.2,
    }


def test_a_named_expert_is_not_asked() -> None:
    assert outcome(Trace.named_by_request("b", 4)) == (4, [], "b", "named by the request")


async def test_a_trace_notes_the_version_walked() -> None:
    assert (await walk([ChainEntry("a", 0.5)], Experts({"a": 0.9}).decide, sequence_version=12)).sequence_version == 12


async def test_times_are_milliseconds_of_each_ask_and_of_the_whole() -> None:
    trace = await Experts({"a": 0.1, "b": 0.9}, delays={"a": 30, "b": 20}).walk()
    assert 29 <= trace.asked[0].ms < 1000
    assert 19 <= trace.asked[1].ms < 1000
    assert trace.ms >= trace.asked[0].ms + trace.asked[1].ms
