"""From chunks of text to bodies and events; and merging several answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from see_ray.engine.detokenize import TextChunk
from see_ray.errors import RequestError
from see_ray.observability import metrics
from see_ray.routing.chain import Trace
from see_ray.serving.answer_stream import CHAT, COMPLETION, AnswerStream, ChoiceAccumulator, choice_chunks, merge
from see_ray.serving.openai_responses import SSE_DONE, Head
from see_ray.serving.request_stats import RequestStats

HEAD = Head(id="chatcmpl-1", model="see", created=1)


class Source:
    """Async generators of (name, number); knows which were closed."""

    def __init__(self) -> None:
        self.closed: set[str] = set()

    async def items(self, name: str, count: int, fail: bool = False) -> AsyncGenerator[tuple[str, int], None]:
        try:
            for number in range(count):
                await asyncio.sleep(0)
                yield name, number
            if fail:
                raise ValueError(name)
            await asyncio.sleep(0 if count < 100 else 100)
        finally:
            self.closed.add(name)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Counts reported to the metrics."""
    reported: list[tuple[str, float]] = []
    monkeypatch.setattr(metrics, "observe", lambda name, value, **labels: None)
    monkeypatch.setattr(metrics, "count", lambda name, value=1, **labels: reported.append((name, value)))
    return reported


async def answer(*texts: str, fail: Exception | None = None) -> AsyncGenerator[TextChunk, None]:
    for number, text in enumerate(texts, 1):
        last = number == len(texts) and fail is None
        yield TextChunk(text, number, "stop" if last else None)
    if fail is not None:
        raise fail


async def stream_of(*answers: AsyncGenerator[TextChunk, None], format: Any = CHAT) -> AnswerStream:
    chunks = merge([choice_chunks(answer, index, None, None) for index, answer in enumerate(answers)])
    stats = RequestStats(format.path, 0.0, Trace(7, (), "tickets", "accepted"), prompt_tokens=3)
    return AnswerStream(await anext(chunks), chunks, format, HEAD, stats)


async def events_of(stream: AnswerStream, include_usage: bool = False) -> list[dict[str, Any]]:
    events = [event async for event in stream.events(include_usage)]
    assert events.pop() == SSE_DONE
    return [json.loads(event.removeprefix("data: ")) for event in events]


# --- merging -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_all_items_come_in_the_order_of_their_source(source: Source, count: int) -> None:
    names = [str(number) for number in range(count)]
    items = [item async for item in merge([source.items(name, 20) for name in names])]
    assert {name: [n for other, n in items if other == name] for name in names} == {
        name: [*range(20)] for name in names
    }
    assert source.closed == set(names)


async def test_items_come_as_they_are_ready(source: Source) -> None:
    async def slow() -> AsyncGenerator[tuple[str, int], None]:
        await asyncio.sleep(0.05)
        yield "slow", 0

    items = [item async for item in merge([slow(), source.items("fast", 3)])]
    assert items == [("fast", 0), ("fast", 1), ("fast", 2), ("slow", 0)]


@pytest.mark.parametrize("count", [1, 3])
async def test_an_error_comes_through_and_closes_the_others(source: Source, count: int) -> None:
    others = [source.items(f"other{number}", 1000) for number in range(count - 1)]
    with pytest.raises(ValueError, match="bad"):
        async for _ in merge([source.items("bad", 3, fail=True), *others]):
            pass
    assert len(source.closed) == count


async def test_no_source_waits_for_another_that_always_has_items(source: Source) -> None:
    merged = merge([source.items(name, 1000) for name in ("a", "b")])
    names = [(await anext(merged))[0] for _ in range(20)]
    assert 5 < names.count("a") < 15
    await merged.aclose()


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_early_closes_all(source: Source, count: int) -> None:
    merged = merge([source.items(str(number), 1000) for number in range(count)])
    for _ in range(10 * count):
        await anext(merged)
    await merged.aclose()
    assert len(source.closed) == count


@pytest.mark.parametrize("count", [1, 3])
async def test_cancelling_a_reader_closes_all(source: Source, count: int) -> None:
    async def read() -> None:
        async for _ in merge([source.items(str(number), 100) for number in range(count)]):
            pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.2)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert len(source.closed) == count


async def test_the_first_item_may_be_read_in_another_task(source: Source) -> None:
    """As the ingress does: it reads one item before it returns the response, which is then sent by another task."""
    merged = merge([source.items("a", 5), source.items("b", 5)])
    first = await asyncio.create_task(anext(merged))
    rest = await asyncio.create_task(collect(merged))
    assert len([first, *rest]) == 10


async def collect(items: AsyncGenerator[Any, None]) -> list[Any]:
    return [item async for item in items]


# --- one body ------------------------------------------------------------------------------


async def test_a_body_has_all_answers_in_order(finished: list[tuple[str, float]]) -> None:
    body = await (await stream_of(answer("Hel", "lo"), answer("Good", " ", "day"))).body()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["Hello", "Good day"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 5
    assert body["see"]["answered_by"] == "tickets"
    assert ("see_completion_tokens_total", 5) in finished


async def test_a_completion_body_is_a_completions(finished: list[tuple[str, float]]) -> None:
    body = await (await stream_of(answer("Hello"), format=COMPLETION)).body()
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "Hello")


async def test_a_failed_answer_is_no_body(finished: list[tuple[str, float]]) -> None:
    stream = await stream_of(answer("Hel", fail=RequestError("no", 503)))
    with pytest.raises(RequestError):
        await stream.body()
    assert finished == []


def test_log_probabilities_of_all_chunks_are_joined() -> None:
    accumulator = ChoiceAccumulator()
    for text in ("a", "b"):
        logprobs = {"content": [{"token": text}], "refusal": None}
        accumulator.add(chunk_with(text, logprobs))
    assert accumulator.choice().logprobs == {"content": [{"token": "a"}, {"token": "b"}], "refusal": None}


def chunk_with(text: str, logprobs: dict[str, Any]) -> Any:
    from see_ray.serving.answer_stream import ChoiceChunk
    from see_ray.serving.openai_responses import Choice

    return ChoiceChunk(Choice(text, None, 0, logprobs), 1)


# --- events --------------------------------------------------------------------------------


async def test_the_first_event_of_each_answer_has_the_trace(finished: list[tuple[str, float]]) -> None:
    events = await events_of(await stream_of(answer("a", "b", "c"), answer("d", "e")))
    first = {event["choices"][0]["index"]: event for event in reversed(events)}
    assert all("see" in first[index] for index in (0, 1))
    assert sum("see" in event for event in events) == 2
    assert ("see_completion_tokens_total", 5) in finished


async def test_usage_is_the_last_event_where_it_is_requested(finished: list[tuple[str, float]]) -> None:
    *_, last = await events_of(await stream_of(answer("a", "b")), include_usage=True)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 5)


async def test_a_failure_within_a_stream_is_its_last_event(finished: list[tuple[str, float]]) -> None:
    *events, last = await events_of(await stream_of(answer("a", "b", fail=RequestError("gone", 503, "server_error"))))
    assert len(events) == 2
    assert last["error"]["message"] == "gone"
    assert ("see_completion_tokens_total", 2) in finished


async def test_a_client_that_goes_away_closes_the_answer(finished: list[tuple[str, float]]) -> None:
    closed = []

    async def endless() -> AsyncGenerator[TextChunk, None]:
        try:
            for number in range(1, 1000):
                yield TextChunk("x", number)
        finally:
            closed.append(True)

    events = (await stream_of(endless())).events(False)
    for _ in range(3):
        await anext(events)
    await events.aclose()
    assert closed == [True]
    assert ("see_completion_tokens_total", 3) in finished
