"""The command `see`. Each command parses its options, calls one function and prints the text that `render` returns.

Only click and the standard library are imported at module level, so that `see --help` answers at once.
Results go to stdout; progress, traces and errors to stderr.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from see_ray.cli.experts import experts
from see_ray.cli.options import asking, base_model_option, configured, json_option
from see_ray.cli.run import run

if TYPE_CHECKING:
    from see_ray.config import Config


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    run(see, args, "see")


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
@click.option("--skip-bad-rows", is_flag=True, help="Learn without unusable rows. [default: refuse the task]")
@click.option("--replace", is_flag=True, help="Replace the live expert of this name.")
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
    from see_ray.cli.progress_bar import TerminalListener

    task = pipeline.Source(**source)
    with TerminalListener() as listener:
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
    from see_ray.cli.progress_bar import TerminalListener

    with TerminalListener() as listener:
        sys.exit(run_demo(Path(folder), rows, listener))


@see.command("eval")
@click.argument("tasks", nargs=-1, required=True, metavar="SOURCES")
@click.option("--foreign", multiple=True, metavar="SOURCE", help="Queries that no live expert has learned. Repeatable.")
@click.option("--max-rows", type=click.IntRange(min=1), default=100, show_default=True, help="Most rows of each.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Limit of an answer.")
@click.option("--metric", "metrics", multiple=True, metavar="TASK=KIND", help="Score a task by KIND. Repeatable.")
@click.option("--out", metavar="PATH", default="see-eval", show_default=True, help="Folder of the report.")
@configured
@base_model_option
def evaluate(config: Config, out: str, metrics: tuple[str, ...], **options: Any) -> None:
    """Measure what is live on tasks it has learned.

    Each source is read as by `see learn`, and the queries of its eval split are asked; of a file called test, eval,
    dev or validation, those of all rows. Kinds of score: accuracy, exact_match, token_f1, rouge_l; chosen by the
    references where --metric names none. Writes report.md, report.json and plots. The same command continues after
    an interruption.
    """
    from see_ray import cluster
    from see_ray.cli.progress_bar import TerminalListener
    from see_ray.evaluate.live_store import EvalConfig, report

    kinds = tuple((task, kind) for task, _, kind in (metric.partition("=") for metric in metrics))
    with TerminalListener() as listener:
        listener.step("Connecting to Ray")
        cluster.connect()
        text = report(EvalConfig(metrics=kinds, **options), config, Path(out), listener)
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

    All are behind one OpenAI-compatible endpoint. Clients must send one of the API keys in $SEE_API_KEY or in
    the file serve.api_key_file.
    """
    from see_ray import client, cluster
    from see_ray.cli import render
    from see_ray.cli.progress_bar import TerminalListener
    from see_ray.serving.endpoint import check_exposure, start, stop

    keys = check_exposure(config)
    with TerminalListener() as listener:
        listener.step("Connecting to Ray")
        cluster.connect()
        listener.step("Starting the endpoint")
        url = start(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # acts as Ctrl-C from here on
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
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Answer's limit. [default: the endpoint's]")
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="T", help="0 is greedy. [default: the endpoint's]")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
def ask(url: str, prompt: str, api_key: str | None, no_stream: bool, **options: Any) -> None:
    """Ask a running endpoint; print the answer as it is generated.

    PROMPT - reads stdin. The trace goes to stderr: who answered, and what each expert decided.
    """
    from see_ray import client
    from see_ray.cli import render

    render.print_answer(client.ask(url, prompt, api_key=api_key, stream=not no_stream, **options))


@see.command()
@asking
@json_option
def route(url: str, prompt: str, api_key: str | None, as_json: bool) -> None:
    """Show who would answer, and why.

    The experts decide; no answer is generated. PROMPT - reads stdin.
    """
    from see_ray import client
    from see_ray.cli import render

    body = client.route(url, prompt, api_key=api_key)
    click.echo(render.as_json_text(body) if as_json else render.trace_text(body["see"]))


see.add_command(experts)
