"""Options that several commands, and the jobs, have in common."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import click

SETTINGS = {
    "store": "store.url",
    "base_model": "base_model.name",
    "host": "serve.host",
    "port": "serve.port",
    "lookahead": "serve.lookahead",
    "no_auth": "serve.no_auth",
}
"""Options that are short forms of `--set`: name of the parameter -> setting."""

base_model_option = click.option("--base-model", help="Id, folder or .gguf file. [base_model.name: embedded]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that set the configuration; the command receives it as `config`.

    Precedence, lowest first: the file, `--set`, the short forms in `SETTINGS`.
    """
    set_help = "Change one setting, such as fit.r=32; the value is YAML. Repeatable; wins over the file."

    @click.option("--config", "file", metavar="FILE", help="YAML file of settings. [default: none, all defaults]")
    @click.option("--set", "overrides", metavar="SECTION.FIELD=VALUE", multiple=True, help=set_help)
    @click.option("--store", metavar="URL", help="A folder, s3://…, gs://… or az://…. [store.url: ./experts]")
    @functools.wraps(command)
    def with_config(file: str | None, overrides: tuple[str, ...], **options: Any) -> None:
        from see_ray.config import load_config

        values = {setting: options.pop(option, None) for option, setting in SETTINGS.items()}
        # As JSON: YAML would read a store called 2024 as a number.
        short = [f"{setting}={json.dumps(v, ensure_ascii=False)}" for setting, v in values.items() if v is not None]
        command(config=load_config(file, [*overrides, *short]), **options)

    return with_config


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument `prompt` (`-` reads stdin) and the options `url` and `api_key` of the endpoint."""

    @click.argument("prompt")
    @click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The endpoint.")
    @click.option("--api-key", envvar="SEE_API_KEY", help="Key that the endpoint asks for. [$SEE_API_KEY]")
    @functools.wraps(command)
    def with_prompt(prompt: str, **options: Any) -> None:
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8", "replace").rstrip("\n")
        command(prompt=prompt, **options)

    return with_prompt
