"""Letting a fitted expert join the sequence, also when another one joined since its task was prepared.

    calibrate ─► save ─► publish ─► live
        ▲                   │ somebody was first
        └── read the newcomers' queries ◄┘

Two tasks may be fitted at the same time. Whoever publishes second has not seen the first one's queries: they
are read now, and count as foreign queries from then on. Only if the expert cannot tell them from its own is it
fitted again, with the newcomers' rehearsal among its pass examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from see_ray.admission.calibrate import Calibration, calibrate
from see_ray.cluster import as_fit_worker
from see_ray.config import Config
from see_ray.cpus import available_cpus
from see_ray.data.reconstruct import Reconstruction
from see_ray.errors import SeeError
from see_ray.models.activation import Activation, encode_prompt
from see_ray.models.base_model import BaseModel, find
from see_ray.store.expert_files import kept_chats
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence

ENOUGH_OWN = 0.95
"""Share of its own held-out rows that an expert must still accept once newcomers' queries count as foreign;
one that accepted fewer before need not accept more."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class NewcomersError(SeeError):
    """Experts joined that this one has not seen; never leaves :mod:`see_ray.pipeline`."""

    def __init__(self, refs: tuple[ExpertRef, ...]):
        super().__init__(refs)
        self.refs = refs


def newcomers(head: ExpertSequence, known: frozenset[str], name: str) -> tuple[ExpertRef, ...]:
    """Experts of `head` whose ids are not among `known`; the one that `name` replaces does not count."""
    return tuple(ref for ref in head.experts if ref.id not in known and ref.name != name)


def queries_of(store: ExpertStore, refs: Sequence[ExpertRef], tokenizer: Any) -> list[tuple[str, list[int]]]:
    """All queries that some experts keep, as (expert, token ids)."""
    return [
        (ref.name, encode_prompt(tokenizer, chat)) for ref in refs for chats in kept_chats(store, ref) for chat in chats
    ]


def not_own(
    queries: Sequence[tuple[str, list[int]]], made: Reconstruction
) -> tuple[list[tuple[str, list[int]]], dict[str, int]]:
    """Queries without those that are rows of the task, too; and how many these are, by whose they are."""
    own = {example.prompt for example in (*made.train, *made.held_out) if len(example.target) > 1}
    claimed = {kind: 0 for kind, _ in queries}
    for kind, ids in queries:
        claimed[kind] += tuple(ids) in own
    return [(kind, ids) for kind, ids in queries if tuple(ids) not in own], claimed


def base_model_of(store: ExpertStore, head: ExpertSequence, name: str) -> tuple[str, str] | None:
    """Name and fingerprint of the live experts' base model, `name` aside; None if there are no others."""
    for ref in head.experts[::-1]:  # one stands for all
        if ref.name != name:
            manifest = store.manifest(ref)
            return manifest.base_model, manifest.fingerprint
    return None


def decide(folder: Path, prompts: Sequence[list[int]], base: BaseModel, activation: Activation, config: Config) -> Any:
    """P(accept) of an adapter for prompts, as a Ray remote call to wait for; it may run on any node.

    Args:
        folder: the adapter's PEFT folder, on this machine.
        prompts: token ids.
        base, activation: what it was fitted on, and where it is activated.
        config: gives the resources: those of one fit worker.
    """
    files = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
    return as_fit_worker(_decide, config.fit).remote(files, list(prompts), base.fingerprint, activation, config)


def _decide(
    files: dict[str, bytes], prompts: list[list[int]], fingerprint: str, activation: Activation, config: Config
) -> list[float]:
    import torch

    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert
    from see_ray.errors import FingerprintError

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


def recalibrated(
    before: Calibration, own: Sequence[float], foreign: Sequence[tuple[str, float]], false_accept_rate: float
) -> Calibration | None:
    """The calibration with newcomers' queries among the foreign ones; None if the expert must be fitted again.

    Args:
        before: its calibration without them.
        own: P(accept) of its own held-out rows.
        foreign: (where from, P(accept)) of all foreign queries, the newcomers' among them.
        false_accept_rate: most of these that may be accepted.
    """
    after = calibrate(own, foreign, false_accept_rate)
    return after if after.own_accepted >= min(before.own_accepted, ENOUGH_OWN) else None
