"""`see ask`, `see route` and `see serve`: real processes, and a real HTTP server on loopback."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from see_ray import client
from see_ray.errors import RequestError, ServingError
from see_ray.routing.chain import Decision, Trace
from see_ray.serving.api_keys import ApiKeys
from see_ray.serving.openai_requests import ChatRequest, RouteRequest, parse, parse_model
from see_ray.serving.openai_responses import SSE_DONE, Choice, Head, chat_body, chat_chunk, error_body, sse, usage_body

if TYPE_CHECKING:
    from tests.conftest import See, SeeProcess

HERE = Path(__file__).parents[2]
KEY = "schlüssel"


def start_process(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from see_ray.cli.main import main; main()", *args],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def test_serving_to_other_machines_needs_a_key(see_process: SeeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEE_API_KEY", raising=False)
    done = see_process("serve", "--host", "0.0.0.0")
    assert done.returncode == 1
    assert done.stderr.startswith("error: serve.host 0.0.0.0 can be reached from other machines")
    assert done.stderr.count("\n") == 1  # nothing was started


DECISIONS = (Decision("pe", 0.0125, 0.5, 12.0), Decision("ta", None, 0.5, 1.0), Decision("sa", 0.98, 0.625, 14.3))
TRACE = Trace(7, DECISIONS, "sa", "accepted", 27.3)


async def _chat(request: Request) -> Response:
    """Answers in two pieces; a few prompts make it fail in one way each."""
    try:
        ApiKeys([KEY]).check(request.headers.get("authorization"))
        body = parse(ChatRequest, await request.body(), 10_000)
        parse_model(body.model)
    except RequestError as error:
        return JSONResponse(error_body(error), status_code=error.status)
    prompt = body.chat()[-1]["content"]
    if prompt == "gateway":
        return PlainTextResponse("<h1>Bad\nGateway</h1>", status_code=502)
    if prompt == "overload":
        return JSONResponse(error_body(RequestError("something failed", 500, "server_error")), status_code=500)
    head: Head = {"id": "chatcmpl-1", "model": body.model, "created": 1}
    finish = "length" if body.max_tokens == 2 else "stop"
    if not body.stream:
        usage = usage_body(prompt_tokens=1, completion_tokens=2)
        text = f"You said: {prompt}"
        return JSONResponse(chat_body(choices=[Choice(text, finish)], usage=usage, see=TRACE.body(), **head))

    async def events() -> AsyncIterator[str]:
        yield sse(chat_chunk(Choice("You said: "), see=TRACE.body(), **head))
        if prompt == "hang":
            await request.receive()  # until the client is gone
            return
        if prompt == "fail":
            yield sse(error_body(RequestError("out of memory", 500, "server_error")))
        elif prompt == "break off":
            return
        elif prompt == "go on":
            for _ in range(10_000):
                yield sse(chat_chunk(Choice("and on "), **head))
        else:
            yield sse(chat_chunk(Choice(prompt, finish), **head))
        yield SSE_DONE

    return StreamingResponse(events(), media_type="text/event-stream")


async def _route(request: Request) -> Response:
    body = parse(RouteRequest, await request.body(), 10_000)
    return JSONResponse({"object": "see.trace", "model": body.model, "prompt_tokens": 9, "see": TRACE.body()})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An endpoint that speaks as ours does."""
    starting = [True]

    async def health(request: Request) -> Response:
        body = {"status": "ok", "base_model": "tiny", "sequence_version": 7, "failed": {}, "experts": []}
        return JSONResponse(body, status_code=503 if starting and starting.pop() else 200)

    routes = [
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/route", _route, methods=["POST"]),
        Route("/health", health),
    ]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEE_API_KEY", KEY)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("option", [[], ["--no-stream"]])
def test_ask_prints_the_answer_and_then_the_trace(see: See, url: str, option: Any) -> None:
    code, out, err = see("ask", "grüß dich", "--url", url, *option)
    assert (code, out) == (0, "You said: grüß dich\n")
    assert err.splitlines() == [
        "answered by sa: accepted (sequence version 7, 27.3 ms)",
        "expert  decision     P(accept)  threshold  ms",
        "pe      pass         0.0125     0.5000     12",
        "ta      unavailable  –          0.5000     1",
        "sa      accept       0.9800     0.6250     14.3",
    ]


@pytest.mark.usefixtures("key")
def test_ask_tells_when_the_answer_was_cut_off(see: See, url: str) -> None:
    assert "cut off" in see("ask", "hi", "--url", url, "--max-tokens", "2")[2]


@pytest.mark.usefixtures("key")
def test_ask_reads_its_prompt_from_stdin(see_process: SeeProcess, url: str) -> None:
    done = see_process("ask", "-", "--url", f"{url}/v1/", input="from\nstdin\n")
    assert (done.returncode, done.stdout) == (0, "You said: from\nstdin\n")


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("fail", "error: the answer broke off: out of memory\n"),
        ("overload", "error: something failed\n"),
        ("gateway", "answered 502 Bad Gateway: <h1>Bad Gateway</h1>; is that the URL of `see serve`?\n"),
        ("break off", "broke off the answer; see the log of `see serve`\n"),
    ],
)
def test_what_the_endpoint_says_is_the_error(see: See, url: str, prompt: str, message: str) -> None:
    code, _, err = see("ask", prompt, "--url", url)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("key")
def test_an_unknown_model_is_the_endpoints_error(see: See, url: str) -> None:
    code, _, err = see("ask", "hi", "--url", url, "--model", "gpt")
    assert (code, err) == (1, "error: the model 'gpt' does not exist; GET /v1/models lists the model ids\n")


def test_a_missing_key_says_how_to_give_one(see: See, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEE_API_KEY", raising=False)
    code, _, err = see("ask", "hi", "--url", url)
    assert code == 1
    assert err.endswith("give --api-key or set SEE_API_KEY\n")
    assert see("ask", "hi", "--url", url, "--api-key", KEY)[0] == 0


def test_route_prints_the_trace(see: See, url: str) -> None:
    code, out, err = see("route", "hi", "--url", url)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "answered by sa: accepted (sequence version 7, 27.3 ms)"
    assert out.splitlines()[4].split() == ["sa", "accept", "0.9800", "0.6250", "14.3"]
    assert json.loads(see("route", "hi", "--url", url, "--json")[1])["see"] == TRACE.body()


@pytest.mark.parametrize("command", ["ask", "route"])
def test_a_closed_port_says_how_to_start_an_endpoint(see: See, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, _, err = see(command, "hi", "--url", f"http://127.0.0.1:{port}")
    assert code == 1
    assert err.startswith(f"error: no endpoint at http://127.0.0.1:{port} ")
    assert err.endswith("start one with `see serve`\n")


@pytest.mark.parametrize("wrong", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://127.0.0.1:port", ""])
def test_a_wrong_url_says_how_to_write_one(see: See, wrong: str) -> None:
    code, _, err = see("route", "hi", "--url", wrong)
    assert code == 1
    assert "write it as http://host:port" in err


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    see: See, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert see("route", "hi", "--url", url)[0] == 0


def test_health_waits_for_an_endpoint_that_starts(url: str) -> None:
    assert client.health(url)["sequence_version"] == 7


def test_the_client_raises_our_errors(url: str) -> None:
    with pytest.raises(RequestError) as refused:
        list(client.ask(url, "hi", model="see", api_key="wrong"))
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    with pytest.raises(ServingError):
        client.health("http://127.0.0.1:1")


@pytest.mark.usefixtures("key")
def test_control_c_is_exit_code_130(url: str) -> None:
    with start_process("ask", "hang", "--url", url) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "You"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.split("\n") == ["", "interrupted", ""]


@pytest.mark.usefixtures("key")
def test_a_broken_pipe_is_quiet(url: str) -> None:
    with start_process("ask", "go on", "--url", url) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "You"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
