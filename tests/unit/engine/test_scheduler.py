"""What a step runs, without a model: the results of each step are made up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from see_ray.engine import scheduler as scheduler_module
from see_ray.engine.expert_registry import LoadedExpert
from see_ray.engine.forward_batch import DecisionRows
from see_ray.engine.interface import Expert, SamplingParams, Token
from see_ray.engine.kv_cache import MIN_SLOT_TOKENS, KVCache
from see_ray.engine.prefix_cache import CachedPrompt, DecisionRow, PrefixCache
from see_ray.engine.requests import GenerationRequest, PrefillRequest
from see_ray.engine.scheduler import MIN_PREFILL_CHUNK, ScheduledBatch, Scheduler
from see_ray.errors import ServingError
from see_ray.models.activation import Activation
from see_ray.models.prefix_kv import Prefix

ACCEPT, REFUSE, EOS = 7, 8, frozenset({2})


def kv(num_tokens: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values of one layer."""
    return ((torch.zeros(1, 1, num_tokens, 2), torch.zeros(1, 1, num_tokens, 2)),)


def loaded_expert(name: str, adapter: int, tokens: int | None = 1) -> LoadedExpert:
    expert = LoadedExpert(Expert(name, Path(name), Activation((5, 6), tokens, ACCEPT, REFUSE)))
    expert.adapter = adapter
    return expert


@pytest.fixture
def scheduler() -> Scheduler:
    kv_cache = KVCache(4 * MIN_SLOT_TOKENS, kv(1))
    scheduler = Scheduler(PrefixCache(1000), kv_cache, max_num_batched_tokens=64, on_stats=lambda name, value: None)
    for adapter, name in enumerate(("a", "b", "c"), start=1):
        scheduler.add_expert(loaded_expert(name, adapter))
    return scheduler


def add_prefill(
    scheduler: Scheduler, prompt: list[int], names: list[str | None], max_indicator_rows: int = 0
) -> PrefillRequest:
    cached = scheduler.prefix_cache.match(tuple(prompt), None)
    experts = [scheduler.experts.find(name) for name in names]
    request = PrefillRequest(cached, experts, max_indicator_rows, asyncio.get_running_loop().create_future())
    scheduler.add_prefill(request)
    return request


def add_generation(scheduler: Scheduler, name: str | None, max_tokens: int = 4) -> GenerationRequest:
    prompt = CachedPrompt((3, 4, 5), None, Prefix(kv(2), (2,)))
    rows = DecisionRows(2, (5,), (0,), torch.zeros(1, 1, 4), list(kv(1)))
    expert = scheduler.experts.find(name)
    decision = DecisionRow(rows, 0, None, answer_follows=expert is None)
    request = GenerationRequest(expert, prompt, decision, SamplingParams(max_tokens))
    scheduler.add_generation(request)
    return request


def execute(scheduler: Scheduler, batch: ScheduledBatch, token_id: int = 9) -> None:
    """What the model runner does, with made-up results."""
    for request in batch.waiting:
        slot = scheduler.kv_cache.allocate(request.max_length)
        if slot is None:
            break
        request.start(slot)
    for request in batch.running:
        request.next_step().slot.length += 1
        request.sample(torch.zeros(10), token_id, EOS)
    for chunk in batch.chunks:
        length = chunk.past.lengths[0] + len(chunk.token_ids)
        chunk.prefix = Prefix(kv(length), (length,))
    for decision in batch.decisions:
        decision.p_accept = [0.1 * row for row in range(len(decision.experts))]
    scheduler.process_outputs(batch)


async def test_a_long_prompt_is_prefilled_in_chunks_and_decided_on_with_the_last(scheduler: Scheduler) -> None:
    request = add_prefill(scheduler, list(range(100, 230)), ["a", "b"])
    lengths = []
    while not request.done.done():
        batch = scheduler.schedule()
        lengths.append(len(batch.chunks[0].token_ids))
        assert bool(batch.decisions) == (sum(lengths) == 129)
        execute(scheduler, batch)
    assert lengths == [64, 64, 1]
    assert set(request.prompt.decisions) == {"a", "b"}


async def test_experts_with_the_same_tokens_share_decision_rows_in_the_order_of_their_adapters(
    scheduler: Scheduler,
) -> None:
    scheduler.add_expert(loaded_expert("wide", 4, tokens=2))
    add_prefill(scheduler, [3, 4, 5, 6], ["c", "wide", "a", None])
    batch = scheduler.schedule()
    rows = [
        (decision.rows.prefix_length, decision.rows.token_ids, decision.rows.adapters) for decision in batch.decisions
    ]
    assert rows == [(3, (6,), (0, 1, 3)), (2, (5, 6), (4,))]


@pytest.mark.parametrize("others", [0, 1])
async def test_all_experts_run_their_indicators_only_where_nothing_else_runs(scheduler: Scheduler, others: int) -> None:
    for number in range(others):
        add_prefill(scheduler, [20 + number, 4, 5, 6], ["a"])
    request = add_prefill(scheduler, [3, 4, 5, 6], ["a", "b"], max_indicator_rows=16)
    batch = scheduler.schedule()
    execute(scheduler, batch)
    assert [row.answer_follows for row in request.prompt.decisions.values()] == [not others] * 2


async def test_requests_of_one_prompt_prefill_it_once(scheduler: Scheduler) -> None:
    first, second = (add_prefill(scheduler, [3, 4, 5, 6], [name]) for name in ("a", "b"))
    batch = scheduler.schedule()
    assert batch.prefills == [first]
    execute(scheduler, batch)
    batch = scheduler.schedule()
    assert batch.prefills == [second]
    assert batch.chunks[0].token_ids == ()


async def test_no_tiny_chunk_is_prefilled_beside_other_work(scheduler: Scheduler) -> None:
    first = add_prefill(scheduler, list(range(100, 100 + 64 - MIN_PREFILL_CHUNK + 2)), ["a"])
    second = add_prefill(scheduler, list(range(300, 400)), ["a"])
    assert scheduler.schedule().prefills == [first]
    scheduler.prefills.remove(first)
    assert scheduler.schedule().prefills == [second]


async def test_answers_take_turns_if_there_are_more_than_one_step_decodes(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_NUM_SEQS", 2)
    requests = [add_generation(scheduler, None) for _ in range(3)]
    execute(scheduler, scheduler.schedule())  # starts them
    decoded = []
    for _ in range(3):
        batch = scheduler.schedule()
        decoded.append([requests.index(request) for request in batch.running])
        execute(scheduler, batch)
    assert decoded == [[0, 1], [2, 0], [1, 2]]


async def test_an_answer_without_a_slot_waits_until_another_one_ends(scheduler: Scheduler) -> None:
    requests = [add_generation(scheduler, None, max_tokens=1) for _ in range(5)]
    execute(scheduler, scheduler.schedule())
    assert (scheduler.running, scheduler.waiting) == (requests[:4], requests[4:])
    execute(scheduler, scheduler.schedule())  # the first four end
    execute(scheduler, scheduler.schedule())
    assert (scheduler.running, scheduler.waiting) == (requests[4:], [])
    token, end = requests[0].outputs.get_nowait(), requests[0].outputs.get_nowait()
    assert isinstance(token, Token)
    assert token.id == 9
    assert end is None


async def test_a_removed_expert_is_released_when_its_last_answer_has_ended(scheduler: Scheduler) -> None:
    request = add_generation(scheduler, "a", max_tokens=2)
    expert = request.expert
    assert expert is not None
    execute(scheduler, scheduler.schedule())
    assert scheduler.remove_expert("a") == []
    assert not expert.released
    while scheduler.running:
        batch = scheduler.schedule()
        assert batch.released == []
        execute(scheduler, batch)
    assert scheduler.schedule().released == [expert]
    assert expert.released
    with pytest.raises(ServingError, match="a was unloaded"):
        scheduler.add_generation(request)


async def test_an_answer_starts_with_the_indicator_unless_it_follows_the_decision(scheduler: Scheduler) -> None:
    expert, generalist = add_generation(scheduler, "b"), add_generation(scheduler, None)
    execute(scheduler, scheduler.schedule())
    assert (expert.next_step().token_id, expert.next_step().adapter) == (ACCEPT, 2)
    assert generalist.next_step().adapter == 0


async def test_a_decision_of_an_expert_that_was_replaced_meanwhile_is_dropped(scheduler: Scheduler) -> None:
    request = add_prefill(scheduler, [3, 4, 5, 6], ["a"])
    batch = scheduler.schedule()
    scheduler.add_expert(loaded_expert("a", 9))
    execute(scheduler, batch)
    assert request.prompt.decisions == {}
    scheduler.schedule()
    with pytest.raises(ServingError, match="a was unloaded"):
        request.done.result()


async def test_a_step_that_fails_fails_its_requests_and_no_other(scheduler: Scheduler) -> None:
    waiting, other = add_generation(scheduler, None), None
    prefill = add_prefill(scheduler, [3, 4, 5, 6], ["a"])
    batch = scheduler.schedule()
    other = add_generation(scheduler, None)
    scheduler.process_outputs(batch, RuntimeError("out of memory"))
    assert isinstance(waiting.outputs.get_nowait(), RuntimeError)
    with pytest.raises(RuntimeError, match="out of memory"):
        prefill.done.result()
    assert scheduler.waiting == [other]
    scheduler.schedule()
    assert scheduler.prefills == []
