"""Bodies of OpenAI responses: whole answers, chunks of a stream, errors, models.

    chat_body / completion_body       -> the whole answer
    chat_chunk / completion_chunk     -> one event of a stream, sent through sse(), ended by SSE_DONE
    error_body, models_body           -> the other two shapes

Each function returns a dict of JSON types; `sse` encodes one. Source of the formats:
https://platform.openai.com/docs/api-reference/chat, /completions, /models.
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
    """The tokens that a request took, as OpenAI's `usage` object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


@dataclass(frozen=True)
class ModelEntry:
    """A line of `GET /v1/models`. `root`: the base model; `parent`: the model id it derives from."""

    id: str
    created: int
    root: str
    parent: str | None = None


def new_id(kind: Literal["chatcmpl", "cmpl"]) -> str:
    """A fresh id of a chat completion or a completion."""
    return f"{kind}-{uuid.uuid4().hex}"


class Head(TypedDict):
    """What the body, or all chunks, of one answer have in common."""

    id: str
    model: str
    created: int


@dataclass(frozen=True)
class Choice:
    """One answer, or the next piece of one; the last piece has a finish reason.

    Attributes:
        index: which of a request's answers.
        logprobs: as `chat_logprobs` or `completion_logprobs` gives them.
    """

    text: str
    finish_reason: str | None = None
    index: int = 0
    logprobs: Json | None = None


def chat_logprobs(tokens: Iterable[tuple[TokenText, Sequence[TokenText]]]) -> Json:
    """The `logprobs` of a chat choice: each token, and the likeliest ones in its place."""

    def one(token: TokenText) -> Json:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}

    content = [one(token) | {"top_logprobs": [one(other) for other in top]} for token, top in tokens]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Iterable[tuple[TokenText, Sequence[TokenText]]], offset: int) -> Json:
    """The `logprobs` of a completion choice, whose first token begins at character `offset` of the answer."""
    body: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, top in tokens:
        body["tokens"].append(token.text)
        body["token_logprobs"].append(token.logprob)
        body["top_logprobs"].append({other.text: other.logprob for other in top})
        body["text_offset"].append(offset)
        offset += len(token.text)
    return body


def chat_body(*, choices: Iterable[Choice], usage: Json, see: Json, **head: Unpack[Head]) -> Json:
    """The answers to a chat request; `see` is its trace."""
    whole = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return {**head, "object": "chat.completion", "choices": whole, "usage": usage, "see": see}


def chat_chunk(piece: Choice, see: Json | None = None, **head: Unpack[Head]) -> Json:
    """One piece of a streamed chat answer. The first of each carries the trace `see` (and with it the
    role), the last `finish_reason`; one chunk may be both."""
    role = {} if see is None else {"role": "assistant", "content": ""}
    delta = role | ({"content": piece.text} if piece.text else {})
    choice = {"index": piece.index, "delta": delta, "logprobs": piece.logprobs, "finish_reason": piece.finish_reason}
    return _chunk("chat.completion.chunk", choice, see, head)


def completion_body(*, choices: Iterable[Choice], usage: Json, see: Json, **head: Unpack[Head]) -> Json:
    """The answers to a completion request; `see` is its trace."""
    # OpenAI gives a whole completion and a piece of a streamed one the same shape.
    pieces = [completion_chunk(choice, see, **head)["choices"][0] for choice in choices]
    return {**head, "object": "text_completion", "choices": pieces, "usage": usage, "see": see}


def completion_chunk(piece: Choice, see: Json | None = None, **head: Unpack[Head]) -> Json:
    """One piece of a streamed completion. The first carries `see`, the last `finish_reason`."""
    choice = {"index": piece.index, "text": piece.text}
    choice |= {"logprobs": piece.logprobs, "finish_reason": piece.finish_reason}
    return _chunk("text_completion", choice, see, head)


def _chunk(kind: str, choice: Json, see: Json | None, head: Head) -> Json:
    return {**head, "object": kind, "choices": [choice], "usage": None} | ({} if see is None else {"see": see})


def usage_chunk(last: Json, usage: Json) -> Json:
    """What follows the stream's last piece where `include_usage` was asked for."""
    return {key: last[key] for key in ("id", "object", "created", "model")} | {"choices": [], "usage": usage}


SSE_DONE = "data: [DONE]\n\n"  # the last event of every stream, failed ones too


def sse(obj: Json) -> str:
    """One server-sent event. A failure in mid-stream is `sse(error_body(error))`, then SSE_DONE."""
    # ASCII only: some clients split lines at U+2028 and its like, which JSON may hold unescaped.
    return f"data: {json.dumps(obj, allow_nan=False)}\n\n"


def error_body(error: RequestError) -> Json:
    """The error as OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def models_body(entries: Iterable[ModelEntry]) -> Json:
    """The body of `GET /v1/models`, in the order given."""
    return {"object": "list", "data": [{"object": "model", "owned_by": "see_ray", **vars(entry)} for entry in entries]}
