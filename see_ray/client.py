"""HTTP client of the endpoint: `Client` for scripts, and functions for the command line.

    ask(url, "…")          the answer in pieces, as they arrive
    route(url, "…")        who would answer, and why
    ask_all, route_all     the same for many prompts, `AT_ONCE` at a time
    health(url)            what is live

Every failure is a ServingError; a request that the endpoint refuses (HTTP 4xx) is a RequestError.
"""

from __future__ import annotations

import ipaddress
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from see_ray.errors import RequestError, ServingError

Json = dict[str, Any]
_T = TypeVar("_T")

AT_ONCE = 8
"""Concurrent requests of `ask_all` and `route_all`."""

RETRY_FOR_S = 120.0
"""Seconds for which `ask_all` and `route_all` retry a request that is refused with 429."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 600.0
"""Seconds to wait for a connection, and for the next piece of an answer."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: the next characters of the answer; may be empty.
        trace: who answers and why (the JSON of `routing.chain.Trace.body`); only in the first piece.
        finish_reason: `stop` or `length`; only in the last piece.
    """

    text: str
    trace: Json | None = None
    finish_reason: str | None = None


def ask(
    url: str,
    prompt: str,
    *,
    model: str = "see",
    max_tokens: int | None = None,
    temperature: float | None = None,
    api_key: str | None = None,
    stream: bool = True,
) -> Iterator[Piece]:
    """Yield the endpoint's answer to one user message: piece by piece, or as a single piece if not `stream`.

    Raises:
        RequestError: the endpoint refuses the request, with its message.
        ServingError: there is no endpoint, it failed, or the answer broke off.
    """
    body = {"model": model, "messages": _chat(prompt), "stream": stream}
    limits = {"max_tokens": max_tokens, "temperature": temperature}
    body |= {field: value for field, value in limits.items() if value is not None}
    with _http_client(url, api_key) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        _check(response)
        if not stream:
            response.read()
            answer = _json(response)
            choice = answer["choices"][0]
            yield Piece(choice["message"]["content"], answer.get("see"), choice["finish_reason"])
            return
        for event in _events(response):
            for choice in event["choices"]:
                yield Piece(choice["delta"].get("content") or "", event.get("see"), choice["finish_reason"])


def route(url: str, prompt: str, *, api_key: str | None = None) -> Json:
    """The body of `POST /v1/route`: who would answer `prompt`, as a trace under `see`. Raises as `ask` does."""
    with _http_client(url, api_key) as client:
        response = client.post("/v1/route", json={"model": "see", "messages": _chat(prompt)})
        _check(response)
        return _json(response)


def ask_all(
    url: str,
    prompts: Sequence[str],
    *,
    model: str = "see",
    max_tokens: int | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[str, str]]:
    """Greedy answers to many prompts, `AT_ONCE` at a time, as (answer, answered by)."""

    def send(prompt: str) -> tuple[str, str]:
        pieces = list(ask(url, prompt, model=model, max_tokens=max_tokens, temperature=0))
        trace = next(piece.trace for piece in pieces if piece.trace)
        return "".join(piece.text for piece in pieces), trace["answered_by"]

    return _send_all(send, prompts, on_done)


def route_all(
    url: str, prompts: Sequence[str], *, on_done: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Who would answer each of many prompts, `AT_ONCE` at a time."""
    return _send_all(lambda prompt: str(route(url, prompt)["see"]["answered_by"]), prompts, on_done)


def _send_all(send: Callable[[str], _T], prompts: Sequence[str], on_done: Callable[[int, int], None]) -> list[_T]:
    """`send` each prompt on a thread; results in the order of the prompts."""

    def send_with_retry(prompt: str) -> _T:
        deadline = time.monotonic() + RETRY_FOR_S
        while True:
            try:
                return send(prompt)
            except RequestError as error:
                if error.status != 429 or error.retry_after_s is None or time.monotonic() > deadline:
                    raise
                time.sleep(error.retry_after_s)

    results: list[_T] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for result in pool.map(send_with_retry, prompts):
            results.append(result)
            on_done(len(results), len(prompts))
    return results


def health(url: str, patience_s: float = 10.0) -> Json:
    """The body of `GET /health`, retried for `patience_s` seconds while the endpoint is starting."""
    deadline = time.monotonic() + patience_s
    with _http_client(url) as client:
        while (response := client.get("/health")).status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.2)
        _check(response)
        return _json(response)


def _chat(prompt: str) -> list[dict[str, str]]:
    # An argument that is not UTF-8 reaches Python as lone surrogates, which JSON cannot hold.
    text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return [{"role": "user", "content": text}]


@contextmanager
def _http_client(url: str, api_key: str | None = None) -> Iterator[httpx.Client]:
    """An httpx client of the endpoint; errors of httpx inside the block become a ServingError."""
    base = url.rstrip("/").removesuffix("/v1")
    key = (api_key or "").strip().encode("utf-8", "surrogateescape")
    try:
        with httpx.Client(
            base_url=base,
            headers={b"Authorization": b"Bearer " + key} if key else None,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=not _is_this_machine(base),  # a proxy cannot reach loopback
        ) as client:
            yield client
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServingError(f"no endpoint at {url} ({error}); start one with `see serve`") from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ServingError(f"cannot use the URL {url} ({error}); write it as http://host:port") from error
    except httpx.TimeoutException as error:
        raise ServingError(f"{url} sent nothing for {READ_TIMEOUT_S:.0f} s; see the log of `see serve`") from error
    except httpx.TransportError as error:
        raise ServingError(f"the connection to {url} broke off: {error or type(error).__name__}") from error


def _is_this_machine(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(response: httpx.Response) -> None:
    """Raise the error that a response reports, if it reports one."""
    if response.is_success:
        return
    response.read()
    try:
        error = json.loads(response.content)["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError) as not_openai:
        summary = f"{response.status_code} {response.reason_phrase}: {' '.join(response.text.split())[:200]}"
        raise ServingError(
            f"{response.url} answered {summary.strip(': ')}; is that the URL of `see serve`?"
        ) from not_openai
    if response.status_code >= 500:
        raise ServingError(message)
    if response.status_code == 401:
        message += "; give --api-key or set SEE_API_KEY"
    retry_after = response.headers.get("retry-after", "")
    raise RequestError(
        message,
        status=response.status_code,
        type=str(error.get("type")),
        param=error.get("param"),
        code=error.get("code"),
        retry_after_s=int(retry_after) if retry_after.isdigit() else None,
    )


def _json(response: httpx.Response) -> Json:
    try:
        body = json.loads(response.content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ServingError(f"{response.url} did not answer with a JSON object; is that the URL of `see serve`?")
    return body


def _events(response: httpx.Response) -> Iterator[Json]:
    """The JSON of each server-sent event up to `[DONE]`; raises an error event."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ServingError(f"the answer broke off: {event['error']['message']}")
        yield event
    raise ServingError(f"{response.url} broke off the answer; see the log of `see serve`")


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: the whole text.
        answered_by: name of the expert, or `generalist`.
        finish_reason: `stop` or `length`.
        trace: the experts that were asked, with P(accept) and threshold of each.
    """

    text: str
    answered_by: str
    finish_reason: str
    trace: Json

    def __str__(self) -> str:
        return self.text


class Client:
    """A client of one endpoint.

    Args:
        url: of the endpoint, with or without `/v1`.
        api_key: sent as `Authorization: Bearer`; `$SEE_API_KEY` if None.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None):
        self.url = url
        self._api_key = api_key if api_key is not None else os.environ.get("SEE_API_KEY")

    def ask(
        self, prompt: str, *, model: str = "see", max_tokens: int | None = None, temperature: float | None = None
    ) -> Answer:
        """Ask for a whole answer.

        Args:
            prompt: one user message.
            model: `see` (routed), `see:generalist`, or `see:<expert>`.
            max_tokens: most tokens of the answer; the endpoint's default if None.
            temperature: of sampling, 0 is greedy; the endpoint's default if None.

        Raises:
            RequestError: the endpoint refuses the request, with its message.
            ServingError: there is no endpoint, it failed, or the answer broke off.
        """
        sampling: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        (piece,) = ask(self.url, prompt, model=model, api_key=self._api_key, stream=False, **sampling)
        trace = piece.trace or {}
        return Answer(piece.text, str(trace.get("answered_by")), piece.finish_reason or "stop", trace)

    def stream(self, prompt: str, *, model: str = "see", max_tokens: int | None = None) -> Iterator[Piece]:
        """The answer piece by piece, as it is generated. Arguments and errors are those of `Client.ask`."""
        return ask(self.url, prompt, model=model, max_tokens=max_tokens, api_key=self._api_key)

    def route(self, prompt: str) -> Json:
        """Who would answer `prompt`, and why: `answered_by`, `reason`, and the decisions of the experts asked."""
        trace: Json = route(self.url, prompt, api_key=self._api_key)["see"]
        return trace

    def health(self) -> Json:
        """What is live: sequence version, experts with their thresholds, experts that do not run."""
        return health(self.url)
