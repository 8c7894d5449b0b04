"""Request bodies: what is accepted, and how the rest is refused."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from see_ray.engine.interface import SamplingParams
from see_ray.errors import RequestError
from see_ray.serving import openai_requests
from see_ray.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    RouteRequest,
    Target,
    parse,
    parse_model,
    unknown_model,
)
from see_ray.serving.openai_responses import (
    Choice,
    chat_body,
    usage_body,
)

LIMIT = 100_000
USER = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "see", "messages": [USER], **fields}
    return parse(ChatRequest, json.dumps(body).encode(), LIMIT)


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "see", "prompt": "Hi", **fields}).encode(), LIMIT)


def sampling(request: ChatRequest | CompletionRequest) -> SamplingParams:
    """Of a server that samples at temperature 0.25 by default."""
    return request.to_sampling_params(request.token_limit or 16, 0.25)


def refused(call: Any, *args: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args, **fields)
    return caught.value


# ---- the body as bytes ------------------------------------------------------------------


def raw(body: bytes, limit: int = LIMIT) -> ChatRequest:
    return parse(ChatRequest, body, limit)


def test_a_body_over_the_limit_is_refused_with_both_numbers() -> None:
    error = refused(raw, b" " * 1001, 1000)
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert "1001" in error.message
    assert "1000" in error.message


def test_a_body_of_exactly_the_limit_is_read() -> None:
    body = json.dumps({"model": "see", "messages": [USER]}).encode()
    assert raw(body, len(body)).model == "see"


def test_a_body_that_is_not_utf8_is_refused_with_the_position() -> None:
    error = refused(raw, b'{"model": "\xff"}')
    assert error.status == 400
    assert "UTF-8" in error.message
    assert "position 11" in error.message


def test_a_body_that_is_not_json_is_refused_with_the_position() -> None:
    error = refused(raw, b'{"model": "see",}')
    assert error.status == 400
    assert "line 1 column 17" in error.message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "metadata"])
def test_numbers_that_json_does_not_have_are_refused_even_where_ignored(field: str, number: str) -> None:
    body = json.dumps({"model": "see", "messages": [USER], field: 0}).replace(": 0}", f": {number}}}")
    assert "not JSON" in refused(raw, body.encode()).message


def test_a_number_beyond_floats_is_refused() -> None:
    body = json.dumps({"model": "see", "messages": [USER], "temperature": 0}).replace(": 0}", ": 1e999}")
    assert refused(raw, body.encode()).param == "temperature"


@pytest.mark.parametrize("text", [r"\ud800", r"\udc00", r"a\ud800b"])
def test_lone_surrogates_are_refused(text: str) -> None:
    body = '{"model": "see", "messages": [{"role": "user", "content": "' + text + '"}]}'
    assert refused(raw, body.encode()).status == 400


def test_surrogate_pairs_are_read() -> None:
    request = raw(b'{"model": "see", "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}')
    assert request.chat() == [{"role": "user", "content": "😀"}]


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    error = refused(raw, opening * 15_000)
    assert error.status == 400
    assert "not JSON" in error.message


@pytest.mark.parametrize(
    ("body", "found"), [(b"[]", "an array"), (b'"x"', "the string"), (b"1", "1"), (b"null", "null")]
)
def test_a_body_that_is_not_an_object_is_refused(body: bytes, found: str) -> None:
    error = refused(raw, body)
    assert error.status == 400
    assert "should be an object" in error.message
    assert found in error.message
    assert error.param is None


def test_an_empty_body_is_refused() -> None:
    assert refused(raw, b"").status == 400


# ---- messages ---------------------------------------------------------------------------


def test_messages_arrive_as_role_and_content() -> None:
    turns = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "A"}, USER]
    assert chat(messages=turns).chat() == turns


def test_developer_is_system() -> None:
    assert chat(messages=[{"role": "developer", "content": "S"}, USER]).chat()[0]["role"] == "system"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).chat() == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize(
    "content",
    [
        5,
        True,
        {"type": "text", "text": "x"},
        [],
        ["x"],
        [{"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "image_url", "text": "x"}],
        [{"type": "text", "text": 5}],
        [{"type": "text"}],
        [{"type": "text", "text": "x", "more": 1}],
        [{"type": "text", "text": "x"}, None],
    ],
)
def test_content_that_is_not_text_is_refused(content: Any) -> None:
    error = refused(chat, messages=[{"role": "user", "content": content}])
    assert error.status == 400
    assert error.param == "messages[0].content"
    assert "a string or an array of" in error.message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ({"role": "user", "content": "Hi"}, "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "tool", "content": "Hi"}], "messages[0].role"),
        ([{"role": [], "content": "Hi"}], "messages[0].role"),
        ([USER, {"role": "user", "content": "Hi", "tool_calls": [{}]}], "messages[1].tool_calls"),
        ([USER, {"role": "assistant", "content": "A"}], "messages"),
        ([{"role": "system", "content": "S"}], "messages"),
        ([USER, {"role": "system", "content": "S"}, USER], "messages"),
        ([{"role": "system", "content": "S"}, {"role": "developer", "content": "S"}, USER], "messages"),
    ],
)
def test_messages_out_of_shape_are_refused(messages: Any, param: str) -> None:
    error = refused(chat, messages=messages)
    assert (error.status, error.param) == (400, param)


def test_an_answer_can_be_sent_back_as_history() -> None:
    body = chat_body(
        id="i",
        model="see",
        created=1,
        choices=[Choice("A", "stop")],
        usage=usage_body(prompt_tokens=3, completion_tokens=4),
        see={},
    )
    answer = ChatCompletion.model_validate(body).choices[0].message.model_dump()
    assert chat(messages=[USER, answer, USER]).chat()[1] == {"role": "assistant", "content": "A"}


# ---- the other fields -------------------------------------------------------------------


def test_sampling_fields_arrive() -> None:
    request = chat(max_tokens=7, temperature=0.5, top_p=0.9, stop=["a", "b"], seed=-3)
    assert sampling(request) == SamplingParams(7, 0.5, 0.9, ("a", "b"), -3)
    assert sampling(chat(ignore_eos=True)).ignore_eos


@pytest.mark.parametrize("request_of", [chat, completion])
def test_sampling_left_out_is_the_servers_default(request_of: Any) -> None:
    assert request_of().token_limit is None
    assert sampling(request_of()) == SamplingParams(16, 0.25, 1.0, (), None)


def test_an_integer_is_a_number() -> None:
    assert sampling(chat(temperature=1, top_p=1)).temperature == 1.0


def test_one_stop_string_is_a_list_of_one() -> None:
    assert sampling(chat(stop="###")).stop == ("###",)


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}])
def test_max_completion_tokens_limits_the_answer(fields: dict[str, Any]) -> None:
    assert chat(**fields).token_limit == 5


def test_two_different_limits_are_refused() -> None:
    error = refused(chat, max_tokens=5, max_completion_tokens=6)
    assert error.param == "max_completion_tokens"
    assert "5" in error.message
    assert "6" in error.message


@pytest.mark.parametrize("request_of", [chat, completion])
@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("model", 5, "found 5"),
        ("max_tokens", "5", 'found the string "5"'),
        ("max_tokens", True, "found true"),
        ("max_tokens", 5.0, "found 5.0"),
        ("max_tokens", 0, "found 0"),
        ("max_tokens", [5], "found an array of 1"),
        ("temperature", -0.1, "found -0.1"),
        ("temperature", 2.1, "found 2.1"),
        ("temperature", "1", 'found the string "1"'),
        ("temperature", False, "found false"),
        ("top_p", 0, "found 0"),
        ("top_p", 1.1, "found 1.1"),
        ("stop", "", 'found the string ""'),
        ("stop", [], "found an array of 0"),
        ("stop", ["a", "b", "c", "d", "e"], "found an array of 5"),
        ("stop", ["a", ""], "found an array of 2"),
        ("stop", ["a", 1], "found an array of 2"),
        ("seed", 1.5, "found 1.5"),
        ("seed", True, "found true"),
        ("seed", 2**63, "found 9223372036854775808"),
        ("stream", 1, "found 1"),
        ("stream", "true", 'found the string "true"'),
        ("stream_options", True, "found true"),
        ("stream_options", [], "found an array of 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(request_of: Any, field: str, value: Any, found: str) -> None:
    error = refused(request_of, **{field: value})
    assert (error.status, error.param) == (400, field)
    assert error.message.startswith(f"{field}: should be ")
    assert found in error.message


def test_the_first_wrong_field_is_named() -> None:
    assert refused(chat, seed="x", temperature="y", unknown=1).param == "temperature"


@pytest.mark.parametrize("request_of", [chat, completion])
@pytest.mark.parametrize("field", ["temprature", "n_best", "verbosity"])
def test_an_unknown_field_is_refused_by_name(request_of: Any, field: str) -> None:
    error = refused(request_of, **{field: 1})
    assert (error.status, error.param) == (400, field)
    assert field in error.message


def test_an_unknown_field_of_a_message_is_refused_by_name() -> None:
    assert refused(chat, messages=[{**USER, "colour": "red"}]).param == "messages[0].colour"


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(field: str) -> None:
    body = {"model": "see", "messages": [USER]}
    del body[field]
    error = refused(raw, json.dumps(body).encode())
    assert (error.status, error.param) == (400, field)
    assert "required" in error.message


def test_null_means_left_out() -> None:
    request = chat(max_tokens=None, temperature=None, top_p=None, stop=None, stream=None, n=None, tools=None)
    assert request == chat()


@pytest.mark.parametrize(
    "field", ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"]
)
def test_fields_without_effect_are_ignored(field: str) -> None:
    assert chat(**{field: {"any": 1}}) == chat()


@pytest.mark.parametrize(
    ("field", "accepted", "other"),
    [
        ("frequency_penalty", 0, 0.5),
        ("presence_penalty", 0.0, -1),
        ("presence_penalty", 0, False),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("tools", [], [{"type": "function"}]),
        ("functions", [], [{"name": "f"}]),
    ],
)
def test_what_is_not_supported_is_accepted_only_where_it_asks_for_nothing(
    field: str, accepted: Any, other: Any
) -> None:
    assert chat(**{field: accepted}).chat() == [USER]
    error = refused(chat, **{field: other})
    assert (error.status, error.param) == (400, field)
    assert "not supported" in error.message


@pytest.mark.parametrize(
    ("request_", "count"),
    [(chat(), None), (chat(logprobs=True), 0), (chat(logprobs=True, top_logprobs=3), 3), (completion(logprobs=2), 2)],
)
def test_log_probabilities_are_asked_for_in_two_ways(request_: Any, count: int | None) -> None:
    assert sampling(request_).logprobs == count


def test_top_logprobs_without_logprobs_are_refused() -> None:
    assert refused(chat, top_logprobs=3).param == "top_logprobs"


@pytest.mark.parametrize(
    ("options", "wanted"), [({"include_usage": True}, True), ({"include_usage": False}, False), ({}, False)]
)
def test_stream_options_ask_for_usage(options: dict[str, Any], wanted: bool) -> None:
    assert chat(stream=True, stream_options=options).include_usage is wanted
    assert chat().include_usage is False


def test_stream_options_are_strict() -> None:
    assert refused(chat, stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"
    assert refused(chat, stream=True, stream_options={"usage": True}).param == "stream_options.usage"


def test_a_message_repeats_little_of_what_the_client_sent() -> None:
    assert len(refused(chat, temperature="x" * 10_000).message) < 200
    assert len(refused(chat, **{"y" * 10_000: 1}).message) < 200


def test_requests_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        chat().model = "other"  # type: ignore[misc]


def test_requests_survive_pickling() -> None:
    request = chat(stop="a", stream=True, stream_options={"include_usage": True})
    assert pickle.loads(pickle.dumps(request)) == request


# ---- completions and routes -------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"]])
def test_a_prompt_is_one_string(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == "Hi"
    assert completion(prompt=prompt).chat() == [USER]


@pytest.mark.parametrize("prompt", [["a", "b"], [], "", [""], 5, {"text": "a"}])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert refused(completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2]], [1]])
def test_token_arrays_are_refused_by_that_word(prompt: Any) -> None:
    assert "token ids are not supported" in refused(completion, prompt=prompt).message


def test_echo_can_only_be_false() -> None:
    assert completion(echo=False).prompt == "Hi"
    assert refused(completion, echo=True).param == "echo"


def test_chat_fields_are_unknown_to_completions() -> None:
    assert refused(completion, max_completion_tokens=5).param == "max_completion_tokens"


def route(**fields: Any) -> RouteRequest:
    return parse(RouteRequest, json.dumps(fields).encode(), LIMIT)


def test_a_route_takes_messages_or_a_prompt() -> None:
    assert route(messages=[USER]).chat() == [USER]
    assert route(prompt="Hi").prompt == "Hi"
    assert route(prompt="Hi").chat() == [USER]


def test_a_route_asks_the_chain_where_it_names_no_model() -> None:
    assert route(prompt="Hi").model == "see"
    assert route(prompt="Hi", model="see:qa").model == "see:qa"


@pytest.mark.parametrize("fields", [{}, {"messages": [USER], "prompt": "Hi"}])
def test_a_route_needs_exactly_one_of_messages_and_prompt(fields: dict[str, Any]) -> None:
    error = refused(route, **fields)
    assert (error.status, error.param) == (400, "messages")


def test_a_route_checks_messages_as_chat_does() -> None:
    assert refused(route, messages=[]).param == "messages"
    assert refused(route, prompt=[1, 2]).param == "prompt"
    assert refused(route, prompt="Hi", max_tokens=5).param == "max_tokens"


# ---- model ids --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("see", openai_requests.ROUTED),
        ("see:generalist", openai_requests.GENERALIST),
        ("see:qa", Target("expert", "qa")),
        ("see:SNI-2.x_y", Target("expert", "SNI-2.x_y")),
    ],
)
def test_model_ids_name_a_target(model: str, target: Any) -> None:
    assert parse_model(model) == target


@pytest.mark.parametrize("model", ["", "gpt-4o", "SEE", "see:", "see: qa", "see:../x", "see:qa\n", "seeqa", "see:é"])
def test_other_model_ids_are_not_found(model: str) -> None:
    error = refused(parse_model, model)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_an_expert_that_is_not_live_is_the_same_404() -> None:
    error = unknown_model("see:gone")
    assert (error.status, error.code) == (404, "model_not_found")
    assert "see:gone" in error.message
