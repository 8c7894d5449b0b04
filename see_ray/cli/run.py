"""Runs a command and shows its errors, warnings and interruptions. The jobs use it, too."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from see_ray.errors import BadRowsError, SeeError


def run(command: click.Command, args: list[str] | None = None, name: str | None = None) -> None:
    """Run a command and exit with its code.

    A `SeeError` is printed as one line on stderr, with exit code 1; `SEE_DEBUG=1` raises it instead. Ctrl-C is
    exit code 130. A warning that see_ray defines, such as that of a renamed setting, is one line on stderr.

    Args:
        command: what to run.
        args: its arguments; those of the process where None.
        name: the program's name in usage messages; that of the script where None.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack a character
    with warnings.catch_warnings():
        warnings.showwarning = _own_warnings_in_one_line(warnings.showwarning)
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
            # Only bad rows are listed on lines of their own; an error of another program may bring line breaks.
            text = str(error) if isinstance(error, BadRowsError) else " ".join(str(error).split("\n"))
            click.echo(f"error: {text}", err=True)
            sys.exit(1)


def _own_warnings_in_one_line(show_others: Callable[..., None]) -> Callable[..., None]:
    """A `warnings.showwarning` without file and line for the categories that see_ray defines."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.partition(".")[0] == "see_ray":
            click.echo(f"warning: {message}", err=True)
        else:
            show_others(message, category, *where, **more)

    return show
