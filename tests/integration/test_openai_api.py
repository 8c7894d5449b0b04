"""Requests and responses over HTTP, with the `openai` package as the client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn
from openai.types.chat import ChatCompletionUserMessageParam
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from see_ray.errors import RequestError
from see_ray.serving.api_keys import ApiKeys
from see_ray.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    parse,
    parse_model,
)
from see_ray.serving.openai_responses import (
    SSE_DONE,
    Choice,
    Head,
    chat_chunk,
    completion_chunk,
    error_body,
    sse,
    usage_body,
    usage_chunk,
)

LIMIT = 100_000
USER: ChatCompletionUserMessageParam = {"role": "user", "content": "Hi"}


HEAD = Head(id="chatcmpl-1", model="see", created=1_700_000_000)
USAGE = usage_body(prompt_tokens=3, completion_tokens=4)
TRACE = {"expert": "qa", "asked": [{"expert": "qa", "p_accept": 0.9}]}


PIECES = ["Grüße,\n", "data: [DONE]\n\n", "\u2028", " 😀", ""]


async def answer(http: HttpRequest) -> JSONResponse | StreamingResponse:
    is_chat = http.url.path.endswith("chat/completions")
    chunk = chat_chunk if is_chat else completion_chunk
    try:
        ApiKeys(["sk-see"]).check(http.headers.get("authorization"))
        body = await http.body()
        request = parse(ChatRequest, body, LIMIT) if is_chat else parse(CompletionRequest, body, LIMIT)
        parse_model(request.model)
    except RequestError as error:
        return JSONResponse(error_body(error), status_code=error.status)

    async def events() -> Any:
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
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="sk-see", max_retries=0, timeout=10) as client:
        yield client


def test_a_chat_stream_reaches_openais_client(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="see", messages=[USER], stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(PIECES)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.model_extra for chunk in chunks] == [{"see": TRACE}] + [{}] * (len(chunks) - 1)
    assert {chunk.id for chunk in chunks} == {"chatcmpl-1"}


def test_usage_comes_last_where_it_was_asked_for(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="see", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7
    assert chunks[-1].choices == []


def test_a_completion_stream_reaches_openais_client(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="see", prompt="Hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "".join(PIECES)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].model_extra == {"see": TRACE}


def test_a_failure_in_mid_stream_is_raised_by_openais_client(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="see", messages=[USER], stream=True, seed=13)
    with pytest.raises(openai.APIError, match="the engine broke") as caught:
        list(stream)
    assert (caught.value.type, caught.value.code) == ("server_error", "engine")


def test_openais_client_knows_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4o", prompt="Hi")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="see", messages=[USER], n=99)
    assert bad.value.param == "n"
    with pytest.raises(openai.AuthenticationError) as denied:
        client.chat.completions.create(model="see", messages=[USER], extra_headers={"Authorization": "Bearer no"})
    assert denied.value.code == "invalid_api_key"
