"""The command line: real processes, a real store, a real HTTP server on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from see_ray import client
from see_ray.admission.calibrate import Calibration
from see_ray.admission.gate import Finding, Verdict
from see_ray.cli import render
from see_ray.cli.main import main
from see_ray.data.reconstruct import Example, Reconstruction
from see_ray.data.task import Task
from see_ray.errors import BadRowsError, RequestError, ServingError, StoreError
from see_ray.fit.launch import FitSummary
from see_ray.models.activation import Activation
from see_ray.pipeline import Learned, Prepared
from see_ray.routing.chain import Decision, Trace
from see_ray.serving.api_keys import ApiKeys
from see_ray.serving.openai_requests import ChatRequest, RouteRequest, parse, parse_model
from see_ray.serving.openai_responses import SSE_DONE, Choice, Head, chat_body, chat_chunk, error_body, sse, usage_body
from see_ray.store.expert_store import ExpertStore

HERE = Path(__file__).parents[2]
SEE = [sys.executable, "-c", "from see_ray.cli.main import main; main()"]
KEY = "schlüssel"

FIELDS = {
    "base_model": "embedded",
    "fingerprint": "f00dfeed" * 8,
    "form": "activated",
    "activation_tokens": 1,
    "generation_prompt": (1, 2, 3),
    "indicator_tokens": (17, 18),
    "threshold": 0.625,
    "metrics": {"own_accepted": 0.98},
    "r": 16,
}

See = Callable[..., tuple[int, str, str]]


@pytest.fixture
def see(capfd: pytest.CaptureFixture[str]) -> See:
    """Runs `see` in this process; gives exit code, stdout and stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, err

    return run


def run_process(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SEE, *args], cwd=HERE, capture_output=True, text=True, timeout=30, check=False, **options)


def start_process(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SEE, *args], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


# --- starting fast ------------------------------------------------------------------------------


def test_help_answers_at_once():
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        done = run_process("--help")
        times.append(time.perf_counter() - begun)
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: see ")
    assert statistics.median(times) < 1.0  # 0.2 s where nothing else runs


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from see_ray.cli.main import see; see.main(['learn', '--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'ray', 'transformers', 'pydantic', 'rich', 'httpx', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("words", ["", "learn", "eval", "serve", "ask", "route", "demo", "experts", "experts list"])
def test_every_command_has_help(see, words):
    code, out, _ = see(*words.split(), "--help")
    assert code == 0
    assert out.startswith(f"Usage: see {words}".rstrip())
    assert "..." not in out.replace("[ARGS]...", "")  # no summary is cut short


# --- errors -------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_exit_code_1(tmp_path):
    done = run_process("experts", "list", "--store", "ftp://somewhere")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot open the expert store ftp://somewhere")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SEE_DEBUG", "1")
    with pytest.raises(StoreError):
        main(["experts", "list", "--store", "ftp://somewhere"])


def test_a_misspelt_setting_is_named(see):
    code, _, err = see("experts", "list", "--set", "store.ulr=/tmp/x")
    assert (code, err) == (1, "error: the configuration is not valid: store.ulr: no such setting\n")


def test_a_misspelt_key_of_the_file_is_named(see, tmp_path):
    (tmp_path / "see.yaml").write_text("serve:\n  prot: 80\n")
    code, _, err = see("experts", "list", "--config", str(tmp_path / "see.yaml"))
    assert code == 1
    assert "serve.prot: no such setting" in err


def test_an_option_wins_over_the_file(see, tmp_path):
    (tmp_path / "see.yaml").write_text("store:\n  url: ftp://from-file\n")
    config = ["--config", str(tmp_path / "see.yaml")]
    assert "ftp://from-file" in see("experts", "list", *config)[2]
    assert "ftp://from-set" in see("experts", "list", *config, "--set", "store.url=ftp://from-set")[2]
    assert "ftp://from-option" in see("experts", "list", *config, "--store", "ftp://from-option")[2]


def test_a_name_that_yaml_takes_for_a_number_stays_a_name(see, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no experts in" in see("experts", "list", "--store", "2024")[1]
    assert (tmp_path / "2024").is_dir()


def test_a_bound_of_a_setting_holds_for_its_option(see):
    code, _, err = see("serve", "--port", "70000")
    assert code == 1
    assert "serve.port" in err


def test_serving_to_other_machines_needs_a_key(monkeypatch):
    monkeypatch.delenv("SEE_API_KEY", raising=False)
    done = run_process("serve", "--host", "0.0.0.0")
    assert done.returncode == 1
    assert done.stderr.startswith("error: serve.host 0.0.0.0 can be reached from other machines")
    assert done.stderr.count("\n") == 1  # nothing was started


def test_wrong_usage_is_exit_code_2(see):
    code, _, err = see("learn")
    assert code == 2
    assert "Missing argument 'SOURCE'" in err


def test_bad_rows_keep_their_lines(see, monkeypatch):
    def refuse(url: str) -> None:
        raise BadRowsError("2 bad rows:\n  a.jsonl:1: blank\n  a.jsonl:2: blank", (("a", "b"),))

    monkeypatch.setattr(ExpertStore, "open", refuse)
    assert see("experts", "list")[2] == "error: 2 bad rows:\n  a.jsonl:1: blank\n  a.jsonl:2: blank\n"


# --- experts ------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    """qa@1 and sa@1 live, sa@2 only stored."""
    store = ExpertStore.open(tmp_path / "store")
    for name in ("qa", "sa", "sa"):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text('{"r": 16}')
        (folder / "adapter_model.safetensors").write_text(f"weights of {name}")
        ref = store.save(folder, name=name, task=f"tasks/{name}.jsonl", **FIELDS).ref
        if ref.version == 1:
            store.publish(ref)
    return store


def test_list_has_live_experts_in_the_order_asked_then_stored_ones(see, store):
    code, out, _ = see("experts", "list", "--store", store.url)
    assert code == 0
    title, head, *rows = out.splitlines()
    assert title.startswith("sequence version 2")
    assert head.split()[:3] == ["expert", "state", "threshold"]
    assert [row.split()[:3] for row in rows] == [
        ["sa@1", "live", "0.6250"],
        ["qa@1", "live", "0.6250"],
        ["sa@2", "stored", "0.6250"],
    ]
    assert rows[1].endswith("  tasks/qa.jsonl")


def test_an_expert_that_was_set_aside_is_listed_with_its_reasons(see, store, tmp_path):
    failed = {"gate": "set aside", "gate_failed": ("it would take 40 % of qa's 50 kept queries",)}
    store.save(tmp_path / "adapter", name="qa", task="tasks/qa.jsonl", **FIELDS, **failed)
    rows = see("experts", "list", "--store", store.url)[1].splitlines()
    assert [row for row in rows if row.split()[:3] == ["qa@2", "set", "aside"]]
    shown = see("experts", "show", "qa@2", "--store", store.url)[1]
    assert "it would take 40 % of qa's 50 kept queries" in shown


def test_an_expert_that_was_forced_is_listed_as_such(see, store, tmp_path):
    forced = {"gate": "forced", "gate_failed": ("it is null",)}
    made = store.save(tmp_path / "adapter", name="pe", task="tasks/pe.jsonl", **FIELDS, **forced)
    store.publish(made.ref, forced=True)
    rows = see("experts", "list", "--store", store.url)[1].splitlines()
    assert [row for row in rows if row.split()[:3] == ["pe@1", "live,", "forced"]]
    assert "(forced)" in see("experts", "history", "--store", store.url)[1]


def test_list_as_json(see, store):
    body = json.loads(see("experts", "list", "--store", store.url, "--json")[1])
    assert body["sequence_version"] == 2
    assert [(e["name"], e["version"], e["live"]) for e in body["experts"]] == [
        ("sa", 1, True),
        ("qa", 1, True),
        ("sa", 2, False),
    ]


def test_an_empty_store_says_what_to_do(see, tmp_path):
    code, out, _ = see("experts", "list", "--store", str(tmp_path / "new"))
    assert code == 0
    assert "see learn" in out
    assert see("experts", "history", "--store", str(tmp_path / "new"))[1] == "nothing published yet\n"


def test_show_has_the_manifest(see, store):
    out = see("experts", "show", "sa", "--store", store.url)[1]
    assert out.startswith("sa@1\n")
    assert "live in sequence version 2, place 1 of 2" in out
    assert "accept 17, pass 18" in out
    assert "own_accepted      0.98" in out
    assert "stored, not live" in see("experts", "show", "sa@2", "--store", store.url)[1]
    body = json.loads(see("experts", "show", "sa@2", "--store", store.url, "--json")[1])
    assert (body["version"], body["live"], body["r"]) == (2, False, 16)


def test_show_of_an_unknown_expert_names_those_there_are(see, store):
    code, _, err = see("experts", "show", "pe", "--store", store.url)
    assert code == 1
    assert "it has: qa@1, sa@1, sa@2" in err


def test_remove_roll_back_and_history(see, store):
    where = ["--store", store.url]
    assert see("experts", "remove", "qa", *where)[1] == "sequence version 3: remove qa@1; live: sa@1\n"
    assert see("experts", "rollback", "2", *where)[1] == "sequence version 4: roll back to 2; live: sa@1, qa@1\n"
    assert "live: none" in see("experts", "rollback", "0", *where)[1]
    rows = see("experts", "history", *where)[1].splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert "remove qa@1" in rows[2]
    versions = json.loads(see("experts", "history", *where, "--json")[1])
    assert [len(version["experts"]) for version in versions] == [1, 2, 1, 2, 0]


def test_remove_of_what_is_not_live_fails(see, store):
    code, _, err = see("experts", "remove", "pe", "--store", store.url)
    assert (code, err) == (1, "error: no live expert is called pe; live are: qa, sa\n")


# --- ask and route ------------------------------------------------------------------------------

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
    finish = "length" if body.sampling().max_tokens == 2 else "stop"
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
def test_ask_prints_the_answer_and_then_the_trace(see, url, option):
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
def test_ask_tells_when_the_answer_was_cut_off(see, url):
    assert "cut off" in see("ask", "hi", "--url", url, "--max-tokens", "2")[2]


@pytest.mark.usefixtures("key")
def test_ask_reads_its_prompt_from_stdin(url):
    done = run_process("ask", "-", "--url", f"{url}/v1/", input="from\nstdin\n")
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
def test_what_the_endpoint_says_is_the_error(see, url, prompt, message):
    code, _, err = see("ask", prompt, "--url", url)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("key")
def test_an_unknown_model_is_the_endpoints_error(see, url):
    code, _, err = see("ask", "hi", "--url", url, "--model", "gpt")
    assert (code, err) == (1, "error: the model 'gpt' does not exist; GET /v1/models lists the model ids\n")


def test_a_missing_key_says_how_to_give_one(see, url, monkeypatch):
    monkeypatch.delenv("SEE_API_KEY", raising=False)
    code, _, err = see("ask", "hi", "--url", url)
    assert code == 1
    assert err.endswith("give --api-key or set SEE_API_KEY\n")
    assert see("ask", "hi", "--url", url, "--api-key", KEY)[0] == 0


def test_route_prints_the_trace(see, url):
    code, out, err = see("route", "hi", "--url", url)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "answered by sa: accepted (sequence version 7, 27.3 ms)"
    assert out.splitlines()[4].split() == ["sa", "accept", "0.9800", "0.6250", "14.3"]
    assert json.loads(see("route", "hi", "--url", url, "--json")[1])["see"] == TRACE.body()


@pytest.mark.parametrize("command", ["ask", "route"])
def test_a_closed_port_says_how_to_start_an_endpoint(see, command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, _, err = see(command, "hi", "--url", f"http://127.0.0.1:{port}")
    assert code == 1
    assert err.startswith(f"error: no endpoint at http://127.0.0.1:{port} ")
    assert err.endswith("start one with `see serve`\n")


@pytest.mark.parametrize("wrong", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://127.0.0.1:port", ""])
def test_a_wrong_url_says_how_to_write_one(see, wrong):
    code, _, err = see("route", "hi", "--url", wrong)
    assert code == 1
    assert "write it as http://host:port" in err


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(see, url, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert see("route", "hi", "--url", url)[0] == 0


def test_health_waits_for_an_endpoint_that_starts(url):
    assert client.health(url)["sequence_version"] == 7


def test_the_client_raises_our_errors(url):
    with pytest.raises(RequestError) as refused:
        list(client.ask(url, "hi", model="see", api_key="wrong"))
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    with pytest.raises(ServingError):
        client.health("http://127.0.0.1:1")


@pytest.mark.usefixtures("key")
def test_control_c_is_exit_code_130(url):
    with start_process("ask", "hang", "--url", url) as process:
        assert process.stdout.read(3) == "You"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.split("\n") == ["", "interrupted", ""]


@pytest.mark.usefixtures("key")
def test_a_broken_pipe_is_quiet(url):
    with start_process("ask", "go on", "--url", url) as process:
        assert process.stdout.read(3) == "You"
        process.stdout.close()
        assert process.stderr.read() == ""


# --- the terminal ---------------------------------------------------------------------------------


def play(listener: render.TerminalListener) -> None:
    with listener:
        listener.step("Reading [the] task")
        listener.note("dropped 3 exact duplicates")
        listener.step("Fitting sa")
        listener.progress("starting workers", 0, 1)
        for done in range(4):
            listener.progress("fitting", done, 3, f"loss {1 - done / 10:.1f}, ")
        listener.progress("fitting", 3, 3, "loss 0.7")
        listener.step("Publishing")


def test_a_log_has_each_step_once_and_the_end_of_each_progress():
    log = io.StringIO()
    play(render.TerminalListener(log))
    assert log.getvalue().splitlines() == [
        "Reading [the] task",
        "  note: dropped 3 exact duplicates",
        "Fitting sa",
        "  fitting 3/3, 0 s, loss 0.7",
        "Publishing",
    ]


def test_a_log_tells_of_progress_now_and_then(monkeypatch):
    monkeypatch.setattr(render, "PLAIN_EVERY_S", 0.05)
    log, begun = io.StringIO(), time.monotonic()
    with render.TerminalListener(log) as listener:
        for done in range(100):
            listener.progress("fitting", done, 100)
            time.sleep(0.002)
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= (time.monotonic() - begun) / 0.05 + 1
    assert lines[-1].startswith("  fitting 99/100, ")  # where it stood when it ended


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[render.TerminalListener], None]], str]:
    """Gives what a terminal got from a listener that was used in some way."""
    monkeypatch.setenv("TERM", "xterm-256color")

    def show(use: Callable[[render.TerminalListener], None]) -> str:
        controller, worker = pty.openpty()
        shown = bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):  # the other end is closed
                while part := os.read(controller, 4096):
                    shown.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(worker, "w") as stream:
            use(render.TerminalListener(stream))
        reader.join()
        os.close(controller)
        return shown.decode()

    return show


def test_a_terminal_has_a_bar_and_keeps_a_line_of_it(on_terminal):
    shown = on_terminal(play)
    assert "━" in shown
    assert "Reading [the] task" in shown
    assert "  fitting 3/3, 0 s, loss 0.7\r\n" in shown


def test_an_interrupted_terminal_is_left_clean(on_terminal):
    def interrupt(listener: render.TerminalListener) -> None:
        with contextlib.suppress(KeyboardInterrupt), listener:
            listener.step("Fitting sa")
            listener.progress("fitting", 2, 3)
            raise KeyboardInterrupt

    shown = on_terminal(interrupt)
    hidden, visible = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert shown.count(hidden) == shown.count(visible) == 2
    assert shown.rindex(visible) > shown.rindex(hidden)


# --- results ------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def prepared(prompt: str) -> Prepared:
    train = [Example(tuple(map(ord, prompt)), (ord("A"), ord("!")), "accept")] * 12
    train.append(Example(tuple(map(ord, "a general query>")), (ord("P"),), "general"))
    made = Reconstruction(train, [], [], {}, [], [])
    task: Any = Task("sa", (), (), ())
    base: Any = SimpleNamespace()
    return Prepared(task, base, Letters(), Activation((ord(">"),), 1, ord("A"), ord("P")), made, frozenset())


def test_a_dry_run_shows_the_loss_mask_of_every_kind_of_example(capsys):
    render.print_prepared(prepared("is this ‖ good?>"))
    out = capsys.readouterr().out
    assert "sa would be fitted on 13 examples" in out
    assert out.count("is this ‖ good?‖>⟦A!⟧\n") == 9
    assert out.count("a general query‖>⟦P⟧\n") == 1
    assert "── accept: 16 prompt tokens, 2 with loss" in out


def test_a_dry_run_has_colours_on_a_terminal():
    shown = io.StringIO()
    render.print_prepared(prepared("x" * 2000 + "?>"), render.Console(file=shown, force_terminal=True))
    assert "\x1b[1;32m⟦A!⟧\x1b[0m" in shown.getvalue()
    assert "[… 1203 characters …]" in shown.getvalue()


def test_a_summary_of_what_was_learned(store):
    manifest, sequence = store.experts()[0], store.head()
    fit = FitSummary(
        steps=60, examples=200, tokens=9000, seconds=30.0, setup_seconds=9.0, tokens_per_s=300.0, first_loss=2.0,
        last_loss=0.5, losses=[], indicator_losses=[], response_losses=[], evaluations=[], fewest_reads=3,
        most_reads=3, resumed=0, stopped_early=False, kv_store_gb=4.0, kv_hit_rate=0.5, padding_share=0.1,
        memory_gb=1.5, workers=1, zero_stage=2, dtype="bfloat16",
    )  # fmt: skip
    calibration = Calibration(0.625, 0.98, 0.0625, 0.283, 50, 16, {"general": 1})
    findings = (
        Finding("taken", "sa", 0.0, 0.05, True, "it would take 0 % of sa's 50 kept queries"),
        Finding("change", "", 7.0, 0.01, True, "its adapter changes something"),
        Finding("own_accepted", "", 0.5, 0.75, False, "it accepts 50 % of its own"),
    )
    verdict = Verdict(findings, 1.25)
    text = render.learned_text(Learned(manifest, sequence, calibration, verdict, fit, {"prepare": 1.0, "fit": 30.5}))
    assert text.splitlines() == [
        "qa@1 is live in sequence version 2",
        "  threshold         0.6250",
        "  own accepted      98.0% of 50 held-out rows",
        "  foreign accepted  6.2% of 16 held-out queries (95% upper bound 28.3%)",
        "  accepted from     general 1",
        "  gate              it would take 0 % of sa's 50 kept queries",
        "  gate              it accepts 50 % of its own",
        "  gate took         1.2 s",
        "  fit               60 steps, 300 tokens/s, 0.50 s a step, last loss 0.500",
        "  seconds           prepare 1, fit 30.5",
        "next: `see serve`, with the same settings; a running endpoint picks the expert up within 15 s",
    ]


def test_a_started_endpoint_says_how_to_ask_it():
    body = {"base_model": "tiny", "sequence_version": 7, "failed": {"qa@1": "no room"}}
    health = body | {"experts": [{"name": "sa", "version": 2}]}
    text = render.endpoint_text("http://127.0.0.1:8000", health, needs_key=True)
    assert "experts, in the order asked: sa@2" in text
    assert "not running: qa@1: no room" in text
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text
    assert "Bearer $SEE_API_KEY" in text
