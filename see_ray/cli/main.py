"""The command `see`. Commands parse, call one function and print; what they print is made in `terminal`.

Only click and the standard library are imported up here, so that `see --help` answers at once.
Results go to stdout; progress, traces and errors to stderr.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from see_ray.errors import BadRowsError, SeeError

if TYPE_CHECKING:
    from see_ray.config import Config
    from see_ray.store.expert_store import ExpertStore
    from see_ray.store.records import ExpertSequence

SETTINGS = {
    "store": "store.url",
    "base_model": "base_model.name",
    "host": "serve.host",
    "port": "serve.port",
    "lookahead": "serve.lookahead",
    "no_auth": "serve.no_auth",
}
"""Options that are short for a `--set`."""


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run(see, args, "see")


def run(command: click.Command, args: list[str] | None = None, name: str | None = None) -> None:
    """Run a command. An error that users can meet is one line and exit code 1, Ctrl-C is 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # where the terminal has no such character
    try:
        sys.exit(command.main(args, prog_name=name, standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except SeeError as error:
        if os.environ.get("SEE_DEBUG") == "1":
            raise
        # Bad rows are listed one a line; what came from another program's message is put on one.
        text = str(error) if isinstance(error, BadRowsError) else " ".join(str(error).split("\n"))
        click.echo(f"error: {text}", err=True)
        sys.exit(1)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that make its `config`."""
    change = "Change one setting, such as fit.r=32; the value is YAML. Repeatable; wins over the file."

    @click.option("--config", "file", metavar="FILE", help="YAML file of settings. [default: none, all defaults]")
    @click.option("--set", "changes", metavar="SECTION.FIELD=VALUE", multiple=True, help=change)
    @click.option("--store", metavar="URL", help="A folder, s3://…, gs://… or az://…. [store.url: ./experts]")
    @functools.wraps(command)
    def with_config(file: str | None, changes: tuple[str, ...], **options: Any) -> None:
        from see_ray.config import load_config

        given = {setting: options.pop(name, None) for name, setting in SETTINGS.items()}
        # As JSON, lest YAML take a name for a number.
        short = [f"{setting}={json.dumps(v, ensure_ascii=False)}" for setting, v in given.items() if v is not None]
        command(config=load_config(file, [*changes, *short]), **options)

    return with_config


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a prompt, and the options that say which endpoint to ask."""

    @click.argument("prompt")
    @click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The endpoint.")
    @click.option("--api-key", envvar="SEE_API_KEY", help="Key that the endpoint asks for. [$SEE_API_KEY]")
    @functools.wraps(command)
    def with_prompt(prompt: str, **options: Any) -> None:
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8", "replace").rstrip("\n")
        command(prompt=prompt, **options)

    return with_prompt


base_model_option = click.option("--base-model", help="Id, folder or .gguf file. [base_model.name: embedded]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="see_ray", message="%(version)s")
def see() -> None:
    """Teach one served language model task after task, without forgetting.

    Each arriving task becomes an expert; a query goes to the first expert that accepts it, else to the
    base model. SEE_DEBUG=1 shows the traceback of an error.
    """


# --- learning ---------------------------------------------------------------------------------


@see.command()
@click.argument("path", metavar="SOURCE")
@click.option("--name", help="The expert's name. [default: that of the file, folder or dataset]")
@click.option("--max-rows", type=click.IntRange(min=1), metavar="N", help="Train on at most N rows. [default: all]")
@click.option("--skip-bad-rows", is_flag=True, help="Go on without unusable rows. [default: refuse the task]")
@click.option("--replace", is_flag=True, help="Take the place of the live expert of this name.")
@click.option("--force", is_flag=True, help="Publish the expert even if it fails a limit of the gate.")
@click.option("--dry-run", is_flag=True, help="Show what would be fitted on, with the loss mask; fit nothing.")
@configured
@base_model_option
def learn(config: Config, replace: bool, force: bool, dry_run: bool, **source: Any) -> None:
    """Fit an expert on a task and make it live.

    SOURCE is a .jsonl, .json or .parquet file, a folder with train.jsonl, or a Hugging Face dataset id
    (owner/name:config). Rows hold `messages`; or `prompt` and `response`; or `instruction`, `input`
    and `output`. A running endpoint picks the new expert up by itself.
    """
    from see_ray import cluster, pipeline
    from see_ray.cli import render

    task = pipeline.Source(**source)
    with render.TerminalListener() as listener:
        listener.step("Connecting to Ray")
        cluster.connect()
        if dry_run:
            prepared = pipeline.prepare(task, config, listener)
        else:
            learned = pipeline.learn(task, config, replace=replace, force=force, listener=listener)
    if dry_run:
        return render.print_prepared(prepared)
    click.echo(render.learned_text(learned))


@see.command()
@click.option("--rows", type=click.IntRange(min=1), default=50, show_default=True, help="Training rows of each task.")
@click.option("--dir", "folder", metavar="PATH", default="see-demo", show_default=True, help="Where the demo works.")
def demo(rows: int, folder: str) -> None:
    """Learn three small tasks, and ask the endpoint."""
    from see_ray.cli.demo import run_demo
    from see_ray.cli.render import TerminalListener

    with TerminalListener() as listener:
        sys.exit(run_demo(Path(folder), rows, listener))


@see.command("eval")
@click.argument("tasks", nargs=-1, required=True, metavar="SOURCES")
@click.option("--foreign", multiple=True, metavar="SOURCE", help="Queries that belong to nobody. Repeatable.")
@click.option("--max-rows", type=click.IntRange(min=1), default=100, show_default=True, help="Rows of each at most.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--metric", "metrics", multiple=True, metavar="TASK=KIND", help="Score a task by KIND. Repeatable.")
@click.option("--out", metavar="PATH", default="see-eval", show_default=True, help="Folder of the report.")
@configured
@base_model_option
def evaluate(config: Config, out: str, metrics: tuple[str, ...], **wish: Any) -> None:
    """Measure what is live on tasks it has learned.

    Each source is read as by `see learn`, its eval split asked; of a file called test, eval, dev or validation, all
    rows are. Kinds of score: accuracy, exact_match, token_f1, rouge_l; they follow from the references. Writes
    report.md, report.json and pictures; the same command goes on after an interruption.
    """
    from see_ray import cluster
    from see_ray.cli import render
    from see_ray.evaluate.live_store import EvalConfig, report

    named = tuple((task, kind) for task, _, kind in (metric.partition("=") for metric in metrics))
    with render.TerminalListener() as listener:
        listener.step("Connecting to Ray")
        cluster.connect()
        text = report(EvalConfig(metrics=named, **wish), config, Path(out), listener)
    click.echo(text)


# --- serving and asking -----------------------------------------------------------------------


@see.command()
@click.option("--host", help="Address to bind; anything but loopback needs an API key. [serve.host: 127.0.0.1]")
@click.option("--port", type=int, help="TCP port. [serve.port: 8000]")
@click.option("--lookahead", type=int, metavar="N", help="Experts asked at once; same answer. [serve.lookahead: 2]")
@click.option("--no-auth", is_flag=True, default=None, help="Serve a public address without an API key, on purpose.")
@configured
@base_model_option
def serve(config: Config) -> None:
    """Serve the live experts, until Ctrl-C or SIGTERM.

    All are behind one OpenAI-compatible endpoint. $SEE_API_KEY, or the file serve.api_key_file, holds
    the API keys of which clients must send one.
    """
    from see_ray import client, cluster
    from see_ray.cli import render
    from see_ray.serving.endpoint import check_exposure, start, stop

    keys = check_exposure(config)
    with render.TerminalListener() as listener:
        listener.step("Connecting to Ray")
        cluster.connect()
        listener.step("Starting the endpoint")
        url = start(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # from here on as Ctrl-C
    try:
        click.echo(render.endpoint_text(url, client.health(url), keys.required))
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("stopping", err=True)
    finally:
        stop()


@see.command()
@asking
@click.option("--model", default="see", show_default=True, help="see, see:<expert> or see:generalist.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Tokens at most. [default: the endpoint's]")
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="T", help="0 is greedy. [default: the endpoint's]")
@click.option("--no-stream", is_flag=True, help="Print the answer once it is whole.")
def ask(url: str, prompt: str, api_key: str | None, no_stream: bool, **wishes: Any) -> None:
    """Ask a running endpoint; print the answer as it comes.

    PROMPT - reads stdin. Who answered, and what each expert decided, goes to stderr.
    """
    from see_ray import client
    from see_ray.cli import render

    render.print_answer(client.ask(url, prompt, api_key=api_key, stream=not no_stream, **wishes))


@see.command()
@asking
@json_option
def route(url: str, prompt: str, api_key: str | None, as_json: bool) -> None:
    """Show who would answer, and why.

    Each expert decides, and nobody answers. PROMPT - reads stdin.
    """
    from see_ray import client
    from see_ray.cli import render

    body = client.route(url, prompt, api_key=api_key)
    click.echo(_json(body) if as_json else render.trace_text(body["see"]))


# --- the expert store -------------------------------------------------------------------------


@see.group()
def experts() -> None:
    """List experts, and change which are live."""


@experts.command("list")
@configured
@json_option
def list_experts(config: Config, as_json: bool) -> None:
    """Live experts in the order asked, then stored ones."""
    from see_ray.cli.render import expert_table

    store = _store(config)
    head = store.head()
    live = [store.manifest(ref) for ref in head.newest_first()]
    stored = [manifest for manifest in reversed(store.experts()) if manifest.ref not in head.experts]
    if as_json:
        bodies = [m.model_dump(mode="json") | {"live": m in live} for m in (*live, *stored)]
        click.echo(_json({"sequence_version": head.version, "experts": bodies}))
    else:
        click.echo(expert_table(store.url, head, live, stored))


@experts.command()
@click.argument("expert", metavar="NAME[@VERSION]")
@configured
@json_option
def show(config: Config, expert: str, as_json: bool) -> None:
    """The manifest of one expert: that version, else the live one."""
    from see_ray.cli.render import manifest_text

    store = _store(config)
    manifest, head = store.manifest(store.resolve(expert)), store.head()
    if as_json:
        click.echo(_json(manifest.model_dump(mode="json") | {"live": manifest.ref in head.experts}))
    else:
        click.echo(manifest_text(manifest, head))


@experts.command()
@click.argument("name")
@configured
def remove(config: Config, name: str) -> None:
    """Take an expert out of the live sequence; its files stay."""
    _print_change(_store(config).remove(name))


@experts.command()
@click.argument("version", type=click.IntRange(min=0))
@configured
def rollback(config: Config, version: int) -> None:
    """Make the experts of VERSION live again, as a new version."""
    _print_change(_store(config).roll_back(version))


@experts.command()
@configured
@json_option
def history(config: Config, as_json: bool) -> None:
    """All versions of the sequence; the last is live."""
    from see_ray.cli.render import history_table

    versions = _store(config).history()
    click.echo(_json([v.model_dump(mode="json") for v in versions]) if as_json else history_table(versions))


def _store(config: Config) -> ExpertStore:
    from see_ray.store.expert_store import ExpertStore

    return ExpertStore.open(config.store.url)


def _print_change(sequence: ExpertSequence) -> None:
    live = ", ".join(ref.id for ref in sequence.newest_first()) or "none, only the generalist"
    click.echo(f"sequence version {sequence.version}: {sequence.change}; live: {live}")


def _json(body: Any) -> str:
    return json.dumps(body, indent=2, ensure_ascii=False)
