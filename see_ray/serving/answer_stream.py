"""From the text of a request's answers to an OpenAI response: a whole body, or server-sent events.

TextChunk of each answer ──► choice_chunks ──┐
                             choice_chunks ──┼─► merge ──► AnswerStream ──► body() or events()
                             …             ──┘
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from see_ray.engine.detokenize import TextChunk, token_texts
from see_ray.engine.interface import TokenText
from see_ray.serving.http_errors import as_request_error
from see_ray.serving.openai_responses import (
    SSE_DONE,
    Choice,
    Head,
    Json,
    chat_body,
    chat_chunk,
    chat_logprobs,
    completion_body,
    completion_chunk,
    completion_logprobs,
    error_body,
    sse,
    usage_body,
    usage_chunk,
)
from see_ray.serving.request_stats import RequestStats

T = TypeVar("T")


@dataclass(frozen=True)
class EndpointFormat:
    """How an endpoint formats an answer; one for chats, one for completions.

    Attributes:
        path: of the endpoint.
        id_prefix: of an answer's id.
        body: makes the whole body, as `chat_body`.
        chunk: makes one event of a stream, as `chat_chunk`.
        logprobs: makes the log-probabilities of a choice from tokens as text; the number is the length of the text
            before them.
    """

    path: str
    id_prefix: Literal["chatcmpl", "cmpl"]
    body: Callable[..., Json]
    chunk: Callable[..., Json]
    logprobs: Callable[[list[tuple[TokenText, list[TokenText]]], int], Json]


CHAT = EndpointFormat(
    "/v1/chat/completions", "chatcmpl", chat_body, chat_chunk, lambda tokens, _: chat_logprobs(tokens)
)
COMPLETION = EndpointFormat("/v1/completions", "cmpl", completion_body, completion_chunk, completion_logprobs)


class ChoiceChunk(NamedTuple):
    """A part of one answer; `num_tokens` are those of this answer so far."""

    choice: Choice
    num_tokens: int


async def choice_chunks(
    answer: AsyncGenerator[TextChunk, None], index: int, tokenizer: Any, logprobs: Callable[..., Json] | None
) -> AsyncGenerator[ChoiceChunk, None]:
    """The chunks of a request's answer number `index`; with `logprobs`, of its `EndpointFormat`, they hold
    log-probabilities."""
    length = 0
    async with aclosing(answer):
        async for chunk in answer:
            body = logprobs(token_texts(chunk.tokens, tokenizer), length) if logprobs else None
            yield ChoiceChunk(Choice(chunk.text, chunk.finish_reason, index, body), chunk.num_tokens)
            length += len(chunk.text)


def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of several async generators, as they come. If one raises, or the result is closed, all are closed."""
    return sources[0] if len(sources) == 1 else _merge(sources)


async def _merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    # Not aiostream.stream.merge, which prefers the first source as long as that has items, does not close sources that
    # it has not started, and takes twice the time. Not anyio's task groups: the ingress reads the first item in another
    # task than the rest.
    pending = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = pending.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                item = task.result()
                pending[asyncio.ensure_future(anext(source))] = source
                yield item
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for source in sources:
            await source.aclose()


class ChoiceAccumulator:
    """One answer, assembled from its chunks."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._choices: list[Choice] = []

    def add(self, chunk: ChoiceChunk) -> None:
        """Append a chunk."""
        self._choices.append(chunk.choice)
        self.num_tokens = chunk.num_tokens

    def choice(self) -> Choice:
        """The answer as it is so far; there must be at least one chunk."""
        last = self._choices[-1]
        parts = [choice.logprobs for choice in self._choices if choice.logprobs is not None]
        logprobs = {
            key: [item for part in parts for item in part[key]] if isinstance(value, list) else value
            for key, value in (parts[0].items() if parts else ())
        }
        return Choice("".join(c.text for c in self._choices), last.finish_reason, last.index, logprobs or None)


class AnswerStream:
    """All answers to one request, of which the first chunk has arrived.

    Args:
        first: the first chunk.
        rest: all others; closed at the end.
        format: of the request's endpoint.
        head: fields of the body, or of every event.
        stats: of the request; records the end of the answers.
    """

    def __init__(
        self,
        first: ChoiceChunk,
        rest: AsyncGenerator[ChoiceChunk, None],
        format: EndpointFormat,
        head: Head,
        stats: RequestStats,
    ):
        self._first, self._rest = first, rest
        self._format, self._head, self._stats = format, head, stats

    async def body(self) -> Json:
        """The whole response; `see` in it is the trace."""
        answers = {self._first.choice.index: ChoiceAccumulator()}
        answers[self._first.choice.index].add(self._first)
        async with aclosing(self._rest):
            async for chunk in self._rest:
                answers.setdefault(chunk.choice.index, ChoiceAccumulator()).add(chunk)
        num_tokens = sum(answer.num_tokens for answer in answers.values())
        self._stats.finished(num_tokens)
        return self._format.body(
            choices=[answers[index].choice() for index in sorted(answers)],
            usage=self._usage(num_tokens),
            see=self._stats.trace.body(),
            **self._head,
        )

    async def events(self, include_usage: bool) -> AsyncGenerator[str, None]:
        """The response as server-sent events. A failure is the last event before the end of the stream."""
        num_tokens: dict[int, int] = {}  # by answer
        try:
            async with aclosing(self._rest):
                event = self._event(self._first, num_tokens)
                yield sse(event)
                async for chunk in self._rest:
                    event = self._event(chunk, num_tokens)
                    yield sse(event)
            if include_usage:
                total = sum(num_tokens.values())
                yield sse(usage_chunk(event, self._usage(total)))
        except Exception as error:
            yield sse(error_body(as_request_error(error)))
        finally:
            self._stats.finished(sum(num_tokens.values()))
        yield SSE_DONE

    def _event(self, chunk: ChoiceChunk, num_tokens: dict[int, int]) -> Json:
        """One event; the first of each answer carries the trace."""
        is_first = chunk.choice.index not in num_tokens
        num_tokens[chunk.choice.index] = chunk.num_tokens
        return self._format.chunk(chunk.choice, see=self._stats.trace.body() if is_first else None, **self._head)

    def _usage(self, completion_tokens: int) -> Json:
        return usage_body(prompt_tokens=self._stats.prompt_tokens, completion_tokens=completion_tokens)
