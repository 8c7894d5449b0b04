import json
import pickle
import re
import socket
import threading
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from see_ray.engine.interface import SamplingParams, TokenText
from see_ray.errors import ConfigError, RequestError
from see_ray.serving import openai_requests
from see_ray.serving.api_keys import ApiKeys
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
    SSE_DONE,
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

LIMIT = 100_000
USER = {"role": "user", "content": "Hi"}


def chat(**fields) -> ChatRequest:
    body = {"model": "see", "messages": [USER], **fields}
    return parse(ChatRequest, json.dumps(body).encode(), LIMIT)


def completion(**fields) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "see", "prompt": "Hi", **fields}).encode(), LIMIT)


def sampling(request: ChatRequest | CompletionRequest) -> SamplingParams:
    """Of a server that samples at temperature 0.25 by default."""
    return request.to_sampling_params(request.token_limit or 16, 0.25)


def refused(call, *args, **fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args, **fields)
    return caught.value


# ---- the body as bytes ------------------------------------------------------------------


def raw(body: bytes, limit: int = LIMIT) -> ChatRequest:
    return parse(ChatRequest, body, limit)


def test_a_body_over_the_limit_is_refused_with_both_numbers():
    error = refused(raw, b" " * 1001, 1000)
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert "1001" in error.message
    assert "1000" in error.message


def test_a_body_of_exactly_the_limit_is_read():
    body = json.dumps({"model": "see", "messages": [USER]}).encode()
    assert raw(body, len(body)).model == "see"


def test_a_body_that_is_not_utf8_is_refused_with_the_position():
    error = refused(raw, b'{"model": "\xff"}')
    assert error.status == 400
    assert "UTF-8" in error.message
    assert "position 11" in error.message


def test_a_body_that_is_not_json_is_refused_with_the_position():
    error = refused(raw, b'{"model": "see",}')
    assert error.status == 400
    assert "line 1 column 17" in error.message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "metadata"])
def test_numbers_that_json_does_not_have_are_refused_even_where_ignored(field, number):
    body = json.dumps({"model": "see", "messages": [USER], field: 0}).replace(": 0}", f": {number}}}")
    assert "not JSON" in refused(raw, body.encode()).message


def test_a_number_beyond_floats_is_refused():
    body = json.dumps({"model": "see", "messages": [USER], "temperature": 0}).replace(": 0}", ": 1e999}")
    assert refused(raw, body.encode()).param == "temperature"


@pytest.mark.parametrize("text", [r"\ud800", r"\udc00", r"a\ud800b"])
def test_lone_surrogates_are_refused(text):
    body = '{"model": "see", "messages": [{"role": "user", "content": "' + text + '"}]}'
    assert refused(raw, body.encode()).status == 400


def test_surrogate_pairs_are_read():
    request = raw(b'{"model": "see", "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}')
    assert request.chat() == [{"role": "user", "content": "😀"}]


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(opening):
    error = refused(raw, opening * 15_000)
    assert error.status == 400
    assert "not JSON" in error.message


@pytest.mark.parametrize(
    ("body", "found"), [(b"[]", "an array"), (b'"x"', "the string"), (b"1", "1"), (b"null", "null")]
)
def test_a_body_that_is_not_an_object_is_refused(body, found):
    error = refused(raw, body)
    assert error.status == 400
    assert "should be an object" in error.message
    assert found in error.message
    assert error.param is None


def test_an_empty_body_is_refused():
    assert refused(raw, b"").status == 400


# ---- messages ---------------------------------------------------------------------------


def test_messages_arrive_as_role_and_content():
    turns = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "A"}, USER]
    assert chat(messages=turns).chat() == turns


def test_developer_is_system():
    assert chat(messages=[{"role": "developer", "content": "S"}, USER]).chat()[0]["role"] == "system"


def test_text_parts_are_joined():
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
def test_content_that_is_not_text_is_refused(content):
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
def test_messages_out_of_shape_are_refused(messages, param):
    error = refused(chat, messages=messages)
    assert (error.status, error.param) == (400, param)


def test_an_answer_can_be_sent_back_as_history():
    body = chat_body(id="i", model="see", created=1, choices=[Choice("A", "stop")], usage=USAGE, see={})
    answer = ChatCompletion.model_validate(body).choices[0].message.model_dump()
    assert chat(messages=[USER, answer, USER]).chat()[1] == {"role": "assistant", "content": "A"}


# ---- the other fields -------------------------------------------------------------------


def test_sampling_fields_arrive():
    request = chat(max_tokens=7, temperature=0.5, top_p=0.9, stop=["a", "b"], seed=-3)
    assert sampling(request) == SamplingParams(7, 0.5, 0.9, ("a", "b"), -3)
    assert sampling(chat(ignore_eos=True)).ignore_eos


@pytest.mark.parametrize("request_of", [chat, completion])
def test_sampling_left_out_is_the_servers_default(request_of):
    assert request_of().token_limit is None
    assert sampling(request_of()) == SamplingParams(16, 0.25, 1.0, (), None)


def test_an_integer_is_a_number():
    assert sampling(chat(temperature=1, top_p=1)).temperature == 1.0


def test_one_stop_string_is_a_list_of_one():
    assert sampling(chat(stop="###")).stop == ("###",)


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}])
def test_max_completion_tokens_limits_the_answer(fields):
    assert chat(**fields).token_limit == 5


def test_two_different_limits_are_refused():
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
def test_a_wrong_value_is_named_with_what_was_expected(request_of, field, value, found):
    error = refused(request_of, **{field: value})
    assert (error.status, error.param) == (400, field)
    assert error.message.startswith(f"{field}: should be ")
    assert found in error.message


def test_the_first_wrong_field_is_named():
    assert refused(chat, seed="x", temperature="y", unknown=1).param == "temperature"


@pytest.mark.parametrize("request_of", [chat, completion])
@pytest.mark.parametrize("field", ["temprature", "n_best", "verbosity"])
def test_an_unknown_field_is_refused_by_name(request_of, field):
    error = refused(request_of, **{field: 1})
    assert (error.status, error.param) == (400, field)
    assert field in error.message


def test_an_unknown_field_of_a_message_is_refused_by_name():
    assert refused(chat, messages=[{**USER, "colour": "red"}]).param == "messages[0].colour"


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(field):
    body = {"model": "see", "messages": [USER]}
    del body[field]
    error = refused(raw, json.dumps(body).encode())
    assert (error.status, error.param) == (400, field)
    assert "required" in error.message


def test_null_means_left_out():
    request = chat(max_tokens=None, temperature=None, top_p=None, stop=None, stream=None, n=None, tools=None)
    assert request == chat()


@pytest.mark.parametrize(
    "field", ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"]
)
def test_fields_without_effect_are_ignored(field):
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
def test_what_is_not_supported_is_accepted_only_where_it_asks_for_nothing(field, accepted, other):
    assert chat(**{field: accepted}).chat() == [USER]
    error = refused(chat, **{field: other})
    assert (error.status, error.param) == (400, field)
    assert "not supported" in error.message


def test_log_probabilities_of_a_chat_are_openais():
    paris, lyon = TokenText("Paris", b"Paris", -0.1), TokenText("\ufffd", b"\xf0", -2.0)
    logprobs = chat_logprobs([(paris, [paris, lyon])])
    body = chat_body(choices=[Choice("Paris", "stop", 0, logprobs)], usage=USAGE, see=TRACE, **HEAD)
    parsed = ChatCompletion.model_validate(body, strict=True).choices[0].logprobs
    assert [(token.token, token.logprob, token.bytes) for token in parsed.content] == [("Paris", -0.1, [*b"Paris"])]
    assert [top.bytes for top in parsed.content[0].top_logprobs] == [[*b"Paris"], [0xF0]]


def test_log_probabilities_of_a_completion_say_where_each_token_begins():
    tokens = [(TokenText(text, text.encode(), -0.5), []) for text in ("Par", "is")]
    body = completion_body(
        choices=[Choice("Paris", "stop", 0, completion_logprobs(tokens, 4))],
        usage=USAGE,
        see=TRACE,
        **HEAD,
    )
    parsed = Completion.model_validate(body, strict=True).choices[0].logprobs
    assert (parsed.tokens, parsed.text_offset, parsed.token_logprobs) == (["Par", "is"], [4, 7], [-0.5, -0.5])


@pytest.mark.parametrize(
    ("request_", "count"),
    [(chat(), None), (chat(logprobs=True), 0), (chat(logprobs=True, top_logprobs=3), 3), (completion(logprobs=2), 2)],
)
def test_log_probabilities_are_asked_for_in_two_ways(request_, count):
    assert sampling(request_).logprobs == count


def test_top_logprobs_without_logprobs_are_refused():
    assert refused(chat, top_logprobs=3).param == "top_logprobs"


def test_several_answers_stand_in_one_body():
    made = [Choice("A", "stop", 0), Choice("B", "length", 1)]
    parsed = ChatCompletion.model_validate(chat_body(choices=made, usage=USAGE, see=TRACE, **HEAD), strict=True)
    assert [(c.index, c.message.content, c.finish_reason) for c in parsed.choices] == [
        (0, "A", "stop"),
        (1, "B", "length"),
    ]


@pytest.mark.parametrize(
    ("options", "wanted"), [({"include_usage": True}, True), ({"include_usage": False}, False), ({}, False)]
)
def test_stream_options_ask_for_usage(options, wanted):
    assert chat(stream=True, stream_options=options).include_usage is wanted
    assert chat().include_usage is False


def test_stream_options_are_strict():
    assert refused(chat, stream=True, stream_options={"include_usage": 1}).param == "stream_options.include_usage"
    assert refused(chat, stream=True, stream_options={"usage": True}).param == "stream_options.usage"


def test_a_message_repeats_little_of_what_the_client_sent():
    assert len(refused(chat, temperature="x" * 10_000).message) < 200
    assert len(refused(chat, **{"y" * 10_000: 1}).message) < 200


def test_requests_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        chat().model = "other"


def test_requests_survive_pickling():
    request = chat(stop="a", stream=True, stream_options={"include_usage": True})
    assert pickle.loads(pickle.dumps(request)) == request


# ---- completions and routes -------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"]])
def test_a_prompt_is_one_string(prompt):
    assert completion(prompt=prompt).prompt == "Hi"
    assert completion(prompt=prompt).chat() == [USER]


@pytest.mark.parametrize("prompt", [["a", "b"], [], "", [""], 5, {"text": "a"}])
def test_other_prompts_are_refused(prompt):
    assert refused(completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2]], [1]])
def test_token_arrays_are_refused_by_that_word(prompt):
    assert "token ids are not supported" in refused(completion, prompt=prompt).message


def test_echo_can_only_be_false():
    assert completion(echo=False).prompt == "Hi"
    assert refused(completion, echo=True).param == "echo"


def test_chat_fields_are_unknown_to_completions():
    assert refused(completion, max_completion_tokens=5).param == "max_completion_tokens"


def route(**fields) -> RouteRequest:
    return parse(RouteRequest, json.dumps(fields).encode(), LIMIT)


def test_a_route_takes_messages_or_a_prompt():
    assert route(messages=[USER]).chat() == [USER]
    assert route(prompt="Hi").prompt == "Hi"
    assert route(prompt="Hi").chat() == [USER]


def test_a_route_asks_the_chain_where_it_names_no_model():
    assert route(prompt="Hi").model == "see"
    assert route(prompt="Hi", model="see:qa").model == "see:qa"


@pytest.mark.parametrize("fields", [{}, {"messages": [USER], "prompt": "Hi"}])
def test_a_route_needs_exactly_one_of_messages_and_prompt(fields):
    error = refused(route, **fields)
    assert (error.status, error.param) == (400, "messages")


def test_a_route_checks_messages_as_chat_does():
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
def test_model_ids_name_a_target(model, target):
    assert parse_model(model) == target


@pytest.mark.parametrize("model", ["", "gpt-4o", "SEE", "see:", "see: qa", "see:../x", "see:qa\n", "seeqa", "see:é"])
def test_other_model_ids_are_not_found(model):
    error = refused(parse_model, model)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


def test_an_expert_that_is_not_live_is_the_same_404():
    error = unknown_model("see:gone")
    assert (error.status, error.code) == (404, "model_not_found")
    assert "see:gone" in error.message


# ---- ids --------------------------------------------------------------------------------


def test_ids_have_openais_prefixes_and_differ():
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", new_id("chatcmpl"))
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", new_id("cmpl"))
    assert new_id("cmpl") != new_id("cmpl")


# ---- bodies -----------------------------------------------------------------------------

HEAD = Head(id="chatcmpl-1", model="see", created=1_700_000_000)
USAGE = usage_body(prompt_tokens=3, completion_tokens=4)
TRACE = {"expert": "qa", "asked": [{"expert": "qa", "p_accept": 0.9}]}


def extras(model) -> dict:
    """What an OpenAI object, with all objects inside it, holds beyond the fields of its type."""
    found = dict(model.model_extra)
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if hasattr(item, "model_extra"):
                found |= extras(item)
    return found


def test_a_chat_body_is_openais_with_the_trace_added():
    body = chat_body(choices=[Choice("Hello", "stop")], usage=USAGE, see=TRACE, **HEAD)
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert (parsed.id, parsed.model, parsed.created) == ("chatcmpl-1", "see", 1_700_000_000)
    assert (parsed.choices[0].message.content, parsed.choices[0].finish_reason) == ("Hello", "stop")
    assert parsed.choices[0].model_fields_set == {"index", "message", "logprobs", "finish_reason"}
    assert parsed.choices[0].message.model_fields_set == {"role", "content", "refusal"}
    assert parsed.usage.total_tokens == 7
    assert extras(parsed) == {"see": TRACE}


def test_a_completion_body_is_openais_with_the_trace_added():
    body = completion_body(choices=[Choice("Hello", "length")], usage=USAGE, see=TRACE, **HEAD)
    parsed = Completion.model_validate(body, strict=True)
    assert (parsed.choices[0].text, parsed.choices[0].finish_reason) == ("Hello", "length")
    assert parsed.choices[0].model_fields_set == {"index", "text", "logprobs", "finish_reason"}
    assert parsed.usage.prompt_tokens == 3
    assert parsed.usage.completion_tokens == 4
    assert extras(parsed) == {"see": TRACE}


@pytest.mark.parametrize(("text", "reason", "see"), [("", None, TRACE), ("a", None, None), ("", "stop", None)])
def test_a_chat_chunk_is_openais(text, reason, see):
    parsed = ChatCompletionChunk.model_validate(chat_chunk(Choice(text, reason), see, **HEAD), strict=True)
    assert parsed.choices[0].finish_reason == reason
    assert parsed.choices[0].model_fields_set == {"index", "delta", "logprobs", "finish_reason"}
    assert "usage" in parsed.model_fields_set
    assert parsed.choices[0].delta.role == ("assistant" if see else None)
    assert (parsed.choices[0].delta.content or "") == text
    assert extras(parsed) == ({"see": see} if see else {})


def test_an_empty_trace_still_marks_the_first_chunk():
    chunk = chat_chunk(Choice(""), see={}, **HEAD)
    assert chunk["choices"][0]["delta"]["role"] == "assistant"
    assert chunk["see"] == {}


def test_the_last_completion_chunk_is_openais():
    parsed = Completion.model_validate(completion_chunk(Choice("a", "stop"), **HEAD), strict=True)
    assert parsed.choices[0].text == "a"
    assert extras(parsed) == {}


def test_a_usage_chunk_has_usage_and_no_choices():
    last = chat_chunk(Choice("", "stop"), TRACE, **HEAD)
    parsed = ChatCompletionChunk.model_validate(usage_chunk(last, USAGE), strict=True)
    assert parsed.id == "chatcmpl-1"
    assert parsed.choices == []
    assert parsed.usage.total_tokens == 7
    assert extras(parsed) == {}


def test_models_are_openais_with_root_and_parent():
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


def test_an_error_body_has_openais_four_fields():
    error = RequestError("no", status=404, type="invalid_request_error", param="model", code="model_not_found")
    assert error_body(error) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }


def test_an_event_is_one_line_of_ascii():
    event = sse({"text": "a\nb\r\u2028\u0085é😀"})
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    assert event.isascii()
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: "))["text"] == "a\nb\r\u2028\u0085é😀"


def test_an_event_is_never_invalid_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        sse({"p": float("nan")})


# ---- over HTTP, read by OpenAI's client -------------------------------------------------

PIECES = ["Grüße,\n", "data: [DONE]\n\n", "\u2028", " 😀", ""]


async def answer(http: HttpRequest) -> JSONResponse | StreamingResponse:
    is_chat = http.url.path.endswith("chat/completions")
    chunk = chat_chunk if is_chat else completion_chunk
    try:
        ApiKeys(["sk-see"]).check(http.headers.get("authorization"))
        request = parse(ChatRequest if is_chat else CompletionRequest, await http.body(), LIMIT)
        parse_model(request.model)
    except RequestError as error:
        return JSONResponse(error_body(error), status_code=error.status)

    async def events():
        yield sse(chunk(Choice(""), see=TRACE, **HEAD))
        for piece in PIECES:
            yield sse(chunk(Choice(piece), **HEAD))
        if request.seed == 13:
            yield sse(error_body(RequestError("the engine broke", 500, "server_error", code="engine")))
            yield SSE_DONE
            return
        last = chunk(Choice("", "stop"), **HEAD)
        yield sse(last)
        if request.include_usage:
            yield sse(usage_chunk(last, USAGE))
        yield SSE_DONE

    return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    routes = [Route(path, answer, methods=["POST"]) for path in ("/v1/chat/completions", "/v1/completions")]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connections wait in its queue until uvicorn is up
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def client(base_url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="sk-see", max_retries=0, timeout=10) as client:
        yield client


def test_a_chat_stream_reaches_openais_client(client):
    stream = client.chat.completions.create(model="see", messages=[USER], stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(PIECES)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.model_extra for chunk in chunks] == [{"see": TRACE}] + [{}] * (len(chunks) - 1)
    assert {chunk.id for chunk in chunks} == {"chatcmpl-1"}


def test_usage_comes_last_where_it_was_asked_for(client):
    stream = client.chat.completions.create(
        model="see", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.total_tokens == 7
    assert chunks[-1].choices == []


def test_a_completion_stream_reaches_openais_client(client):
    chunks = list(client.completions.create(model="see", prompt="Hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "".join(PIECES)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].model_extra == {"see": TRACE}


def test_a_failure_in_mid_stream_is_raised_by_openais_client(client):
    stream = client.chat.completions.create(model="see", messages=[USER], stream=True, seed=13)
    with pytest.raises(openai.APIError, match="the engine broke") as caught:
        list(stream)
    assert (caught.value.type, caught.value.code) == ("server_error", "engine")


def test_openais_client_knows_our_errors(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4o", prompt="Hi")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="see", messages=[USER], n=99)
    assert bad.value.param == "n"
    with pytest.raises(openai.AuthenticationError) as denied:
        client.chat.completions.create(model="see", messages=[USER], extra_headers={"Authorization": "Bearer no"})
    assert denied.value.code == "invalid_api_key"


# ---- API keys ---------------------------------------------------------------------------


def as_header(text: str) -> str:
    """The string that an ASGI server makes of a header sent in UTF-8."""
    return text.encode().decode("latin-1")


def test_no_keys_let_everyone_in():
    keys = ApiKeys.from_env_and_file({}, None)
    assert not keys.required
    keys.check(None)
    keys.check("Bearer anything")


def test_a_blank_variable_is_no_key():
    assert not ApiKeys.from_env_and_file({"SEE_API_KEY": " "}, None).required


def test_the_variable_and_every_key_of_the_file_open(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# the team's\n\n  one  \r\ntwo\n   # not-this\n")
    keys = ApiKeys.from_env_and_file({"SEE_API_KEY": "zero"}, file)
    for key in ("zero", "one", "two"):
        keys.check(f"Bearer {key}")
    for key in ("not-this", "# not-this", "three", "on", "onee"):
        assert refused(keys.check, f"Bearer {key}").status == 401


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic k", "k", "Bearer K", "Bearer k k", "Bearer é", "Bearer ключ", "\ud800"],
)
def test_anything_but_a_key_is_401(header):
    error = refused(ApiKeys(["k"]).check, header)
    assert (error.status, error.code) == (401, "invalid_api_key")


def test_the_scheme_is_read_in_any_case():
    ApiKeys(["k"]).check("bearer k")
    ApiKeys(["k"]).check("BEARER  k")


@pytest.mark.parametrize("key", ["clé", "ключ", "voilà", "\u0405"])  # the last two end in the bytes a0 and 85
def test_keys_beyond_ascii_work(key):
    keys = ApiKeys([key])
    keys.check(as_header(f"Bearer {key}"))
    assert refused(keys.check, as_header(f"Bearer {key}x")).status == 401


def test_a_401_does_not_repeat_the_key():
    assert "secret" not in refused(ApiKeys(["k-secret"]).check, "Bearer my-secret").message
    assert "secret" not in repr(ApiKeys(["k-secret"]))


def test_a_missing_key_file_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        ApiKeys.from_env_and_file({"SEE_API_KEY": "k"}, tmp_path / "nowhere")


def test_a_key_file_without_keys_is_a_configuration_error(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none yet\n\n")
    with pytest.raises(ConfigError, match="no key"):
        ApiKeys.from_env_and_file({"SEE_API_KEY": "k"}, file)


def test_a_key_file_that_is_not_text_is_a_configuration_error(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        ApiKeys.from_env_and_file({}, file)
