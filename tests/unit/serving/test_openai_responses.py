"""Response bodies, as the `openai` package reads them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from see_ray.engine.interface import TokenText
from see_ray.errors import RequestError
from see_ray.serving.openai_responses import (
    Choice,
    Head,
    ModelEntry,
    chat_body,
    chat_chunk,
    chat_logprobs,
    completion_body,
    completion_chunk,
    completion_logprobs,
    error_body,
    models_body,
    new_id,
    sse,
    usage_body,
    usage_chunk,
)

HEAD = Head(id="chatcmpl-1", model="see", created=1_700_000_000)
USAGE = usage_body(prompt_tokens=3, completion_tokens=4)
TRACE = {"expert": "qa", "asked": [{"expert": "qa", "p_accept": 0.9}]}


def test_ids_have_openais_prefixes_and_differ() -> None:
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", new_id("chatcmpl"))
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", new_id("cmpl"))
    assert new_id("cmpl") != new_id("cmpl")


def test_log_probabilities_of_a_chat_are_openais() -> None:
    paris, lyon = TokenText("Paris", b"Paris", -0.1), TokenText("\ufffd", b"\xf0", -2.0)
    logprobs = chat_logprobs([(paris, [paris, lyon])])
    body = chat_body(choices=[Choice("Paris", "stop", 0, logprobs)], usage=USAGE, see=TRACE, **HEAD)
    parsed = ChatCompletion.model_validate(body, strict=True).choices[0].logprobs
    assert parsed is not None
    assert parsed.content is not None
    assert [(token.token, token.logprob, token.bytes) for token in parsed.content] == [("Paris", -0.1, [*b"Paris"])]
    assert [top.bytes for top in parsed.content[0].top_logprobs] == [[*b"Paris"], [0xF0]]


def test_log_probabilities_of_a_completion_say_where_each_token_begins() -> None:
    tokens: list[tuple[TokenText, list[TokenText]]] = [
        (TokenText(text, text.encode(), -0.5), []) for text in ("Par", "is")
    ]
    body = completion_body(
        choices=[Choice("Paris", "stop", 0, completion_logprobs(tokens, 4))],
        usage=USAGE,
        see=TRACE,
        **HEAD,
    )
    parsed = Completion.model_validate(body, strict=True).choices[0].logprobs
    assert parsed is not None
    assert (parsed.tokens, parsed.text_offset, parsed.token_logprobs) == (["Par", "is"], [4, 7], [-0.5, -0.5])


def test_several_answers_stand_in_one_body() -> None:
    made = [Choice("A", "stop", 0), Choice("B", "length", 1)]
    parsed = ChatCompletion.model_validate(chat_body(choices=made, usage=USAGE, see=TRACE, **HEAD), strict=True)
    assert [(c.index, c.message.content, c.finish_reason) for c in parsed.choices] == [
        (0, "A", "stop"),
        (1, "B", "length"),
    ]


def extras(model: Any) -> dict[str, Any]:
    """What an OpenAI object, with all objects inside it, holds beyond the fields of its type."""
    found = dict(model.model_extra)
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if hasattr(item, "model_extra"):
                found |= extras(item)
    return found


def test_a_chat_body_is_openais_with_the_trace_added() -> None:
    body = chat_body(choices=[Choice("Hello", "stop")], usage=USAGE, see=TRACE, **HEAD)
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert (parsed.id, parsed.model, parsed.created) == ("chatcmpl-1", "see", 1_700_000_000)
    assert (parsed.choices[0].message.content, parsed.choices[0].finish_reason) == ("Hello", "stop")
    assert parsed.choices[0].model_fields_set == {"index", "message", "logprobs", "finish_reason"}
    assert parsed.choices[0].message.model_fields_set == {"role", "content", "refusal"}
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 7
    assert extras(parsed) == {"see": TRACE}


def test_a_completion_body_is_openais_with_the_trace_added() -> None:
    body = completion_body(choices=[Choice("Hello", "length")], usage=USAGE, see=TRACE, **HEAD)
    parsed = Completion.model_validate(body, strict=True)
    assert (parsed.choices[0].text, parsed.choices[0].finish_reason) == ("Hello", "length")
    assert parsed.choices[0].model_fields_set == {"index", "text", "logprobs", "finish_reason"}
    assert parsed.usage is not None
    assert parsed.usage.prompt_tokens == 3
    assert parsed.usage.completion_tokens == 4
    assert extras(parsed) == {"see": TRACE}


@pytest.mark.parametrize(("text", "reason", "see"), [("", None, TRACE), ("a", None, None), ("", "stop", None)])
def test_a_chat_chunk_is_openais(text: str, reason: str | None, see: dict[str, Any] | None) -> None:
    parsed = ChatCompletionChunk.model_validate(chat_chunk(Choice(text, reason), see, **HEAD), strict=True)
    assert parsed.choices[0].finish_reason == reason
    assert parsed.choices[0].model_fields_set == {"index", "delta", "logprobs", "finish_reason"}
    assert "usage" in parsed.model_fields_set
    assert parsed.choices[0].delta.role == ("assistant" if see else None)
    assert (parsed.choices[0].delta.content or "") == text
    assert extras(parsed) == ({"see": see} if see else {})


def test_an_empty_trace_still_marks_the_first_chunk() -> None:
    chunk = chat_chunk(Choice(""), see={}, **HEAD)
    assert chunk["choices"][0]["delta"]["role"] == "assistant"
    assert chunk["see"] == {}


def test_the_last_completion_chunk_is_openais() -> None:
    parsed = Completion.model_validate(completion_chunk(Choice("a", "stop"), **HEAD), strict=True)
    assert parsed.choices[0].text == "a"
    assert extras(parsed) == {}


def test_a_usage_chunk_has_usage_and_no_choices() -> None:
    last = chat_chunk(Choice("", "stop"), TRACE, **HEAD)
    parsed = ChatCompletionChunk.model_validate(usage_chunk(last, USAGE), strict=True)
    assert parsed.id == "chatcmpl-1"
    assert parsed.choices == []
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 7
    assert extras(parsed) == {}


def test_models_are_openais_with_root_and_parent() -> None:
    entries = [
        ModelEntry("see", 1, "smollm2"),
        ModelEntry("see:qa", 2, "smollm2", "see:generalist"),
    ]
    body = models_body(entries)
    assert body["object"] == "list"
    models = [Model.model_validate(item, strict=True) for item in body["data"]]
    assert [model.id for model in models] == ["see", "see:qa"]
    assert models[1].owned_by == "see_ray"
    assert extras(models[0]) == {"root": "smollm2", "parent": None}
    assert extras(models[1]) == {"root": "smollm2", "parent": "see:generalist"}


def test_an_error_body_has_openais_four_fields() -> None:
    error = RequestError("no", status=404, type="invalid_request_error", param="model", code="model_not_found")
    assert error_body(error) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }


def test_an_event_is_one_line_of_ascii() -> None:
    event = sse({"text": "a\nb\r\u2028\u0085é😀"})
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    assert event.isascii()
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: "))["text"] == "a\nb\r\u2028\u0085é😀"


def test_an_event_is_never_invalid_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        sse({"p": float("nan")})
