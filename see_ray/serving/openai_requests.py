"""OpenAI request bodies: parsing and validation.

    parse(ChatRequest, body, limit)   -> a validated request, or RequestError (400) naming the field
    parse_model("see:qa")             -> Target: the chain, the generalist or one expert

Types are strict: neither `"5"` nor `true` is an integer. `null` means "left out", as in OpenAI's clients. Fields
without an effect on the answer (`user`, …) are ignored. Unsupported fields that would change the answer (`tools`, …)
are accepted only with the value that has no effect, and are an error otherwise. This module does not use live experts,
tokenizers or HTTP servers.
Formats: https://platform.openai.com/docs/api-reference/chat, /completions, /models.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from see_ray.engine.interface import SamplingParams
from see_ray.errors import RequestError

Json = dict[str, Any]

MAX_ANSWERS = 16
"""Most answers to one request (`n`)."""


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_null_and_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and key not in cls.ignored}


def _only(allowed: Any, *, why: str) -> BeforeValidator:
    """For an unsupported field: accept only the value that has no effect."""

    def check(value: Any) -> Any:
        if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):  # True == 1 in Python
            raise ValueError(f"{_describe(value)} is not supported, only {json.dumps(allowed)}: {why}")
        return value

    return BeforeValidator(check)


def _text(content: Any) -> str:
    """A string, or text parts joined by newlines (as vLLM and llama.cpp join them)."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    are_text = [isinstance(p, dict) and p.keys() == {"type", "text"} and p["type"] == "text" for p in parts]
    if not parts or not all(are_text) or not all(isinstance(part["text"], str) for part in parts):
        raise ValueError(
            f'should be a string or an array of {{"type": "text", "text": "…"}}, found {_describe(content)}'
        )
    return "\n".join(part["text"] for part in parts)


def _one_prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"should be one non-empty string (token ids are not supported), found {_describe(prompt)}")
    return prompt


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = stop if isinstance(stop, list) else [stop]
    if not 1 <= len(strings) <= 4 or not all(isinstance(item, str) and item for item in strings):
        raise ValueError(f"should be a non-empty string or an array of 1 to 4 of them, found {_describe(stop)}")
    return tuple(strings)


class Message(_StrictModel):
    """One message of a conversation."""

    ignored = ("name", "annotations")  # chat templates do not use them
    role: Annotated[
        Literal["system", "user", "assistant"], BeforeValidator(lambda r: "system" if r == "developer" else r)
    ]
    content: Annotated[str, BeforeValidator(_text)]


def _check_order(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Accept only the order of roles that every chat template supports."""
    if not messages or messages[-1].role != "user":
        raise ValueError(f"should end with a user message, found {messages[-1].role if messages else 'no'} message")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message can only come first")
    return messages


# strict=False: a JSON array is accepted as a tuple. The messages themselves stay strict.
Messages = Annotated[tuple[Message, ...], Field(strict=False), AfterValidator(_check_order)]


class StreamOptions(_StrictModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Any = None  # ignored: nothing is obfuscated


class GenerationBody(_StrictModel):
    """Fields of both chat and completion requests."""

    # Used by OpenAI's own service only.
    ignored = ("user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key")
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings)] = ()
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS)
    ignore_eos: bool = False  # vLLM's addition to the API, for load tests
    frequency_penalty: Annotated[Any, _only(0, why="penalties are not applied")] = None
    presence_penalty: Annotated[Any, _only(0, why="penalties are not applied")] = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int | None:
        """Most tokens of the answer; None: the server's default."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Number of likeliest tokens to report beside each token; None: no log-probabilities."""
        raise NotImplementedError

    def to_sampling_params(self, max_tokens: int, default_temperature: float) -> SamplingParams:
        """Sampling parameters of the answer; the caller resolves `max_tokens` from `token_limit`."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_p=self.top_p,
            stop=self.stop,
            seed=self.seed,
            logprobs=self.num_logprobs,
            ignore_eos=self.ignore_eos,
        )


class ChatRequest(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: Annotated[Any, _only({"type": "text"}, why="answers are plain text")] = None
    tools: Annotated[Any, _only([], why="tools cannot be called")] = None
    functions: Annotated[Any, _only([], why="functions cannot be called")] = None
    parallel_tool_calls: Any = None  # ignored: there are no tools

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        old, new = self.max_tokens, self.max_completion_tokens
        if old and new and old != new:
            message = f"max_completion_tokens: found {new}, but max_tokens is {old}; send one of them"
            raise RequestError(message, param="max_completion_tokens")
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            message = f"top_logprobs: found {self.top_logprobs}, but logprobs is not true; set both"
            raise RequestError(message, param="top_logprobs")
        return self

    def chat(self) -> list[dict[str, str]]:
        """The messages as `{"role", "content"}`, for a chat template."""
        return [message.model_dump() for message in self.messages]

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[str, BeforeValidator(_one_prompt)]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Annotated[Any, _only(False, why="the prompt is not repeated")] = None

    def chat(self) -> list[dict[str, str]]:
        """The prompt as a user message: experts were fitted on chats."""
        return [{"role": "user", "content": self.prompt}]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class RouteRequest(_StrictModel):
    """Body of `POST /v1/route`: a query to route, not to answer. Exactly one of `messages` and `prompt` is set."""

    model: str = "see"
    messages: Messages | None = None
    prompt: Annotated[str | None, BeforeValidator(_one_prompt)] = None

    @model_validator(mode="after")
    def _exactly_one(self) -> RouteRequest:
        if (self.messages is None) == (self.prompt is None):
            raise RequestError("messages: send either this or prompt, and not both", param="messages")
        return self

    def chat(self) -> list[dict[str, str]]:
        """The messages as `{"role", "content"}`; a prompt is one user message."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt or ""}]
        return [message.model_dump() for message in self.messages]


Request = TypeVar("Request", ChatRequest, CompletionRequest, RouteRequest)


def parse(model_class: type[Request], body: bytes, max_body_bytes: int) -> Request:
    """Parse and validate a request body.

    Raises:
        RequestError: 400. The body is too large, not UTF-8, not JSON (which has no NaN and no lone surrogates; nesting
            is limited to 200 levels), not an object, or has a wrong or unknown field (`param` names the first).
    """
    if len(body) > max_body_bytes:
        raise RequestError(f"the request body has {len(body)} bytes; at most {max_body_bytes} are accepted")
    try:
        # json.loads would accept NaN and lone surrogates, and recurse without limit.
        data = from_json(body.decode("utf-8"), allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the request body is not JSON in UTF-8: {error}") from error
    try:
        return model_class.model_validate(data)
    except ValidationError as error:
        raise _wrong_field(error) from error


def _wrong_field(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    kind = first["type"]
    json_types = {"tuple_type": "an array", "model_type": "an object"}  # pydantic names Python's
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part:.60}" for part in first["loc"])[1:]
    if kind == "missing":
        problem = "is required"
    elif kind == "extra_forbidden":
        problem = "no such field, or not supported here; leave it out"
    elif kind == "value_error":
        problem = str(first["ctx"]["error"])
    else:
        expected = json_types.get(kind) or first["msg"].removeprefix("Input should be ")
        problem = f"should be {expected}, found {_describe(first['input'])}"
    return RequestError(f"{param or 'the request body'}: {problem}", param=param or None)


def _describe(value: Any) -> str:
    """A JSON value, shortened for a message."""
    if isinstance(value, list | dict):
        return "an object" if isinstance(value, dict) else f"an array of {len(value)}"
    return f"{'the string ' if isinstance(value, str) else ''}{json.dumps(value, ensure_ascii=False):.60}"


@dataclass(frozen=True)
class Target:
    """What a model id names; `expert` is set for the kind `expert` only."""

    kind: Literal["routed", "generalist", "expert"]
    expert: str | None = None


ROUTED, GENERALIST = Target("routed"), Target("generalist")


def parse_model(model: str) -> Target:
    """The target of a model id: `see` is the chain, `see:generalist` the base model, `see:<expert>` that expert, live
    or not.

    Raises:
        RequestError: 404 for anything else.
    """
    if model in ("see", "see:generalist"):
        return ROUTED if model == "see" else GENERALIST
    if match := re.fullmatch(r"see:([A-Za-z0-9][A-Za-z0-9._-]{0,127})", model):
        return Target("expert", match[1])
    raise unknown_model(model)


def unknown_model(model: str) -> RequestError:
    """The 404 for a model id that is not served; also for `see:<expert>` where no such expert is live."""
    message = f"the model {model[:60]!r} does not exist; GET /v1/models lists the model ids"
    return RequestError(message, status=404, param="model", code="model_not_found")
