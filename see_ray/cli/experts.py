"""`see experts`: list experts, and change which are live."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from see_ray.cli.options import configured, json_option

if TYPE_CHECKING:
    from see_ray.config import Config
    from see_ray.store.expert_store import ExpertStore
    from see_ray.store.records import ExpertSequence


@click.group()
def experts() -> None:
    """List experts, and change which are live."""


@experts.command("list")
@configured
@json_option
def list_experts(config: Config, as_json: bool) -> None:
    """Live experts in the order asked, then stored ones."""
    from see_ray.cli.render import as_json_text, expert_table

    store = _store(config)
    head = store.head()
    live = [store.manifest(ref) for ref in head.newest_first()]
    stored = [manifest for manifest in reversed(store.experts()) if manifest.ref not in head.experts]
    if as_json:
        bodies = [m.model_dump(mode="json") | {"live": m in live} for m in (*live, *stored)]
        click.echo(as_json_text({"sequence_version": head.version, "experts": bodies}))
    else:
        click.echo(expert_table(store.url, head, live, stored))


@experts.command()
@click.argument("expert", metavar="NAME[@VERSION]")
@configured
@json_option
def show(config: Config, expert: str, as_json: bool) -> None:
    """The manifest of one expert: that version, else the live one."""
    from see_ray.cli.render import as_json_text, manifest_text

    store = _store(config)
    manifest, head = store.manifest(store.resolve(expert)), store.head()
    if as_json:
        click.echo(as_json_text(manifest.model_dump(mode="json") | {"live": manifest.ref in head.experts}))
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
    from see_ray.cli.render import as_json_text, history_table

    versions = _store(config).history()
    click.echo(as_json_text([v.model_dump(mode="json") for v in versions]) if as_json else history_table(versions))


def _store(config: Config) -> ExpertStore:
    from see_ray.store.expert_store import ExpertStore

    return ExpertStore.open(config.store.url)


def _print_change(sequence: ExpertSequence) -> None:
    live = ", ".join(ref.id for ref in sequence.newest_first()) or "none, only the generalist"
    click.echo(f"sequence version {sequence.version}: {sequence.change}; live: {live}")
