"""Bodies of OpenAI responses: answers, chunks of a stream, errors, models.

    chat_body, completion_body        -> a whole answer
    chat_chunk, completion_chunk      -> one event of a stream, encoded by `sse`; the stream ends with SSE_DONE
    error_body, models_body           -> errors, and the list of models

Each returns a dict of JSON types.
Formats: https://platform.openai.com/docs/api-reference/chat, /completions, /models.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

from see_ray.engine.interface import TokenText
from see_ray.errors import RequestError

Json = dict[str, Any]


def usage_body(*, prompt_tokens: int, completion_tokens: int) -> Json:
    """OpenAI's `usage` object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


@dataclass(frozen=True)
class ModelEntry:
    """An entry of `GET /v1/models`.

    Attributes:
        created: Unix time, in seconds.
        root: the base model.
        parent: the model id that this one derives from, or None.
    """

    id: str
    created: int
    root: str
    parent: str | None = None


def new_id(kind: Literal["chatcmpl", "cmpl"]) -> str:
    """A new id of a chat completion or a completion."""
    return f"{kind}-{uuid.uuid4().hex}"


class Head(TypedDict):
    """Fields of an answer's body, or of all its chunks."""

    id: str
    model: str
    created: int


@dataclass(frozen=True)
class Choice:
    """One answer, or a chunk of one, of which the last has a finish reason.

    Attributes:
        index: number of the answer among those to one request.
        logprobs: from `chat_logprobs` or `completion_logprobs`.
    """

    text: str
    finish_reason: str | None = None
    index: int = 0
    logprobs: Json | None = None


def chat_logprobs(tokens: Iterable[tuple[TokenText, Sequence[TokenText]]]) -> Json:
    """The `logprobs` of a chat choice, from its tokens, each with the likeliest tokens at its position."""

    def entry(token: TokenText) -> Json:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}

    content = [entry(token) | {"top_logprobs": [entry(other) for other in top]} for token, top in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Iterable[tuple[TokenText, Sequence[TokenText]]], offset: int) -> Json:
    """The `logprobs` of a completion choice; `offset` is the number of characters of the answer before its tokens."""
    body: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, top in tokens:
        body["tokens"].append(token.text)
        body["token_logprobs"].append(token.logprob)
        body["top_logprobs"].append({other.text: other.logprob for other in top})
        body["text_offset"].append(offset)
        offset += len(token.text)
    return body


def chat_body(*, choices: Iterable[Choice], usage: Json, see: Json, **head: Unpack[Head]) -> Json:
    """Body of a chat response; `see` is the trace."""
    choice_bodies = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return {**head, "object": "chat.completion", "choices": choice_bodies, "usage": usage, "see": see}


def chat_chunk(chunk: Choice, see: Json | None = None, **head: Unpack[Head]) -> Json:
    """One event of a streamed chat response. An answer's first chunk carries the trace `see`, and with it the role; its
    last one the finish reason. One chunk may be both."""
    role = {} if see is None else {"role": "assistant", "content": ""}
    delta = role | ({"content": chunk.text} if chunk.text else {})
    choice = {"index": chunk.index, "delta": delta, "logprobs": chunk.logprobs, "finish_reason": chunk.finish_reason}
    return _chunk("chat.completion.chunk", choice, see, head)


def completion_body(*, choices: Iterable[Choice], usage: Json, see: Json, **head: Unpack[Head]) -> Json:
    """Body of a completion response; `see` is the trace."""
    # In OpenAI's format a whole completion has the shape of a streamed chunk.
    choice_bodies = [completion_chunk(choice, see, **head)["choices"][0] for choice in choices]
    return {**head, "object": "text_completion", "choices": choice_bodies, "usage": usage, "see": see}


def completion_chunk(chunk: Choice, see: Json | None = None, **head: Unpack[Head]) -> Json:
    """One event of a streamed completion. An answer's first chunk carries the trace `see`, its last the finish
    reason."""
    choice = {"index": chunk.index, "text": chunk.text}
    choice |= {"logprobs": chunk.logprobs, "finish_reason": chunk.finish_reason}
    return _chunk("text_completion", choice, see, head)


def _chunk(kind: str, choice: Json, see: Json | None, head: Head) -> Json:
    return {**head, "object": kind, "choices": [choice], "usage": None} | ({} if see is None else {"see": see})


def usage_chunk(last: Json, usage: Json) -> Json:
    """The event after the stream's last chunk where `include_usage` was requested; `last` is that chunk."""
    return {key: last[key] for key in ("id", "object", "created", "model")} | {"choices": [], "usage": usage}


SSE_DONE = "data: [DONE]\n\n"
"""The last event of every stream, also after an error."""


def sse(obj: Json) -> str:
    """One server-sent event. An error within a stream is `sse(error_body(error))`, then SSE_DONE."""
    # ASCII only: some clients split lines at U+2028 and similar characters, which JSON allows unescaped.
    return f"data: {json.dumps(obj, allow_nan=False)}\n\n"


def error_body(error: RequestError) -> Json:
    """The error as OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def models_body(entries: Iterable[ModelEntry]) -> Json:
    """The body of `GET /v1/models`, in the order given."""
    return {"object": "list", "data": [{"object": "model", "owned_by": "see_ray", **vars(entry)} for entry in entries]}
