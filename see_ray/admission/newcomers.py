"""Experts that others published while this one was fitted.

    calibrate ─► gate ─► store ─► publish ─► live
        ▲                            │ other experts were published since the task was prepared
        └── decide on their queries ◄┘

Two tasks may be fitted at the same time. The expert that is published second was not fitted to pass on the queries of
the first, the *newcomer*. It decides on them before it joins, and they count as foreign queries in its calibration. It
is fitted again, with the newcomer's rehearsal queries among its pass examples, only if it then accepts too few of its
own rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from see_ray.cluster import as_fit_worker, result_of
from see_ray.config import Config
from see_ray.cpus import available_cpus
from see_ray.data.reconstruct import Reconstruction
from see_ray.errors import FingerprintError, LiveError, SeeError
from see_ray.models.activation import Activation, encode_prompt
from see_ray.models.base_model import BaseModel, find
from see_ray.store.expert_files import kept_chats
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class NewcomersError(SeeError):
    """Experts were published whose queries the candidate has not decided on. Handled inside `learn`."""

    def __init__(self, refs: tuple[ExpertRef, ...]):
        super().__init__(refs)
        self.refs = refs


def check_can_join(store: ExpertStore, head: ExpertSequence, name: str, base: BaseModel, *, replace: bool) -> None:
    """Raise before a long fit what publishing its expert would raise after it.

    Raises:
        LiveError: an expert of this name is live, and `replace` is False.
        FingerprintError: the live experts belong to another base model.
    """
    for ref in head.experts:
        if ref.name == name and not replace:
            raise LiveError(
                f"{ref.id} is live already; use --replace to put the new expert in its place, "
                "or --name to call the new one otherwise"
            )
    for manifest in map(store.manifest, head.experts[-1:]):  # all live experts have the same base model
        if manifest.fingerprint != base.fingerprint:
            raise FingerprintError(
                f"the live experts of {store.url} belong to the base model {manifest.base_model} "
                f"({manifest.fingerprint[:12]}), not to {base.name} ({base.fingerprint[:12]}); "
                "set base_model.name to that one, or use another store"
            )


def live_base_model(store: ExpertStore, head: ExpertSequence, name: str) -> tuple[str, str] | None:
    """(name, fingerprint) of the base model of the live experts other than `name`; None if there are none."""
    for ref in head.experts[::-1]:
        if ref.name != name:
            manifest = store.manifest(ref)  # all live experts have the same base model
            return manifest.base_model, manifest.fingerprint
    return None


def newcomers(head: ExpertSequence, known: frozenset[str], name: str) -> tuple[ExpertRef, ...]:
    """Experts of `head` whose ids are not in `known`, except for the one that `name` replaces."""
    return tuple(ref for ref in head.experts if ref.id not in known and ref.name != name)


def refuse_newcomers(known: frozenset[str], name: str) -> Callable[[ExpertSequence], None]:
    """A check for `ExpertStore.publish` that raises NewcomersError if `head` holds experts that are not known."""

    def check(head: ExpertSequence) -> None:
        if refs := newcomers(head, known, name):
            raise NewcomersError(refs)

    return check


def kept_queries(store: ExpertStore, refs: Sequence[ExpertRef], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """All queries that some experts keep, as (expert, token ids)."""
    return [
        (ref.name, encode_prompt(tokenizer, chat)) for ref in refs for chats in kept_chats(store, ref) for chat in chats
    ]


def split_claimed(
    queries: Sequence[tuple[str, list[int]]], reconstruction: Reconstruction
) -> tuple[list[tuple[str, list[int]]], dict[str, int]]:
    """Separate other experts' queries from those that are rows of this task, too.

    Args:
        queries: (expert, token ids).
        reconstruction: of this task.

    Returns:
        The queries that are foreign to the task, and per expert how many of its queries are not.
    """
    examples = (*reconstruction.train, *reconstruction.held_out)
    own = {example.prompt for example in examples if example.is_own}
    claimed = {expert: 0 for expert, _ in queries}
    for expert, ids in queries:
        claimed[expert] += tuple(ids) in own
    return [(expert, ids) for expert, ids in queries if tuple(ids) not in own], claimed


def decide(
    folder: Path, queries: Sequence[tuple[str, list[int]]], base: BaseModel, activation: Activation, config: Config
) -> list[tuple[str, float]]:
    """(expert, P(accept)) of an adapter for (expert, token ids) queries, decided in a Ray task on any node.

    Args:
        folder: the adapter's PEFT folder on this machine.
        queries: of other experts.
        base: the base model that the adapter was fitted on.
        activation: where the adapter is activated.
        config: the task gets the resources of one fit worker.

    Raises:
        FingerprintError: the node has another base model of this name.
    """
    files = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
    prompts = [ids for _, ids in queries]
    task = as_fit_worker(_decide, config.fit).remote(files, prompts, base.fingerprint, activation, config)
    return [(expert, p) for (expert, _), p in zip(queries, result_of(task), strict=True)]


def _decide(
    files: dict[str, bytes], prompts: list[list[int]], fingerprint: str, activation: Activation, config: Config
) -> list[float]:
    import torch

    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert

    torch.set_num_threads(config.fit.threads_per_worker or available_cpus())
    base = find(config.base_model)
    if base.fingerprint != fingerprint:
        raise FingerprintError(f"{base.name} is another base model on this node than on the driver's; make them equal")
    with tempfile.TemporaryDirectory() as temporary:
        for name, data in files.items():
            (Path(temporary) / name).write_bytes(data)
        engine = EmbeddedEngine(base, config.base_model)
        engine.load(Expert("candidate", Path(temporary), activation))
        return engine.decide_batch(prompts, "candidate")
