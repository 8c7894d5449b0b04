"""From an arriving task to a live expert: the whole path. Read this first.

    prepare                 fit      calibrate    publish
    read ─► reconstruct ─►  fit  ─►  threshold ─► gate ─► store ─► publish
    data/                   fit/     admission/            └─► store alone: set aside

A running endpoint polls the store, so it serves the new sequence version by itself. Earlier experts are not changed;
only the queries that they keep for later ones are read.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from see_ray.admission import newcomers
from see_ray.admission.calibrate import Calibration
from see_ray.admission.candidate import Candidate
from see_ray.admission.gate import Verdict
from see_ray.admission.publication import Publication
from see_ray.config import Config
from see_ray.data.general_sampling import load_or_sample_general
from see_ray.data.prepared import Prepared
from see_ray.data.reconstruct import KINDS, Reconstruction, reconstruct
from see_ray.data.rows import Row, TokenLimit
from see_ray.data.task import SplitOptions, Task, read_task
from see_ray.fit.launch import fit_expert
from see_ray.fit.progress_bridge import ProgressBridge
from see_ray.fit.report import FitSummary, Fitted
from see_ray.fit.spec import FitSpec
from see_ray.fit.tracking import Tracker, draw_losses
from see_ray.models.activation import activation_of, encode_prompt
from see_ray.models.base_model import BaseModel, context_length, find, load_tokenizer
from see_ray.progress import Listener
from see_ray.store.expert_files import kept_chats
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertSequence, Manifest

__all__ = ["Learned", "Prepared", "Source", "learn", "prepare"]


@dataclass(frozen=True)
class Source:
    """Where an arriving task comes from, and how it is read; see `data.task.read_task`."""

    path: str
    name: str | None = None
    max_rows: int | None = None
    skip_bad_rows: bool = False


@dataclass(frozen=True)
class Learned:
    """The result of `learn`.

    Attributes:
        manifest: of the new expert, as stored.
        sequence: the sequence version that made it live.
        calibration: its threshold, and what that accepts of the held-out queries.
        gate: the gate's findings.
        fit: what the fit did.
        seconds: of the steps `prepare`, `fit` and `publish`.
    """

    manifest: Manifest
    sequence: ExpertSequence
    calibration: Calibration
    gate: Verdict
    fit: FitSummary
    seconds: dict[str, float]


def learn(
    source: Source, config: Config, *, replace: bool = False, force: bool = False, listener: Listener | None = None
) -> Learned:
    """Teach the system one task. Needs a connection to Ray.

    Args:
        source: the arriving task.
        config: all settings.
        replace: replace the live expert of the same name.
        force: publish the expert even if it fails a limit of the gate; its manifest says so.
        listener: receives progress.

    Raises:
        GateError: the expert failed a limit of the gate, and was set aside.
        SeeError: a step failed; the live sequence is unchanged.
    """
    listener = listener or Listener()
    clock = _Clock()
    while True:  # a second fit only if the expert accepts queries of another that was published during the first
        prepared = prepare(source, config, listener, replace=replace)
        clock.lap("prepare")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            fitted = _fit(prepared, config, folder, listener)
            clock.lap("fit")
            candidate = Candidate.from_fit(
                prepared.reconstruction,
                fitted.decisions,
                fitted.comparison,
                prepared.base,
                config.calibrate.false_accept_rate,
            )
            publication = Publication(prepared, folder, config, source.path, replace, force)
            published = publication.publish(candidate, listener)
            clock.lap("publish")
        if published is not None:
            return Learned(*published, fit=fitted.summary, seconds=clock.laps)


def prepare(source: Source, config: Config, listener: Listener, *, replace: bool = True) -> Prepared:
    """Read a task and reconstruct its training set.

    With `replace` False, a live expert of the task's name is an error here, before anything takes long.

    Raises:
        BaseModelError, TaskError, ConfigError, StoreError: see the modules of each step.
    """
    listener.step("Reading the base model and the task")
    base = find(config.base_model)
    tokenizer = load_tokenizer(base)
    activation = activation_of(tokenizer, config.base_model, config.fit)
    task = _read_task(source, base, tokenizer, config)
    for note in task.notes:
        listener.note(note)
    store = ExpertStore.open(config.store.url)
    head = store.head()
    newcomers.check_can_join(store, head, task.name, base, replace=replace)
    earlier = {ref.name: kept_chats(store, ref) for ref in head.experts if ref.name != task.name}
    general = load_or_sample_general(base, config, listener)
    reconstruction = reconstruct(
        task, tokenizer, activation, config.reconstruct, earlier=earlier, general=general, seed=config.fit.seed
    )
    return Prepared(task, base, tokenizer, activation, reconstruction, frozenset(ref.id for ref in head.experts))


def _read_task(source: Source, base: BaseModel, tokenizer: Any, config: Config) -> Task:
    def count_tokens(row: Row) -> int:
        response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        return len(encode_prompt(tokenizer, row.messages)) + len(response) + 2  # indicator, end of turn

    reconstruct_config = config.reconstruct
    return read_task(
        source.path,
        name=source.name,
        split=SplitOptions(
            reconstruct_config.eval_share, config.fit.seed, source.max_rows, reconstruct_config.max_eval_rows
        ),
        token_limit=TokenLimit(
            min(config.fit.max_length or 1 << 30, context_length(base, config.base_model)), count_tokens
        ),
        skip_bad_rows=source.skip_bad_rows,
    )


def _fit(prepared: Prepared, config: Config, folder: Path, listener: Listener) -> Fitted:
    reconstruction = prepared.reconstruction
    listener.step(f"Fitting {prepared.task.name}: {_counts(reconstruction)}")
    settings = config.fit.model_dump(mode="json")
    name = f"{prepared.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with Tracker(Path(config.fit.tracking_dir), name, settings, listener.note) as tracker:
        spec = FitSpec(
            reconstruction.train,
            prepared.base,
            config.base_model,
            prepared.activation,
            config.fit,
            held_out=reconstruction.held_out,
        )
        bridge = ProgressBridge(listener, tracker, prepared.task.name)
        fitted = fit_expert(prepared.task.name, spec, folder, bridge)
    draw_losses(fitted.summary, folder / "fit.png")
    return fitted


def _counts(reconstruction: Reconstruction) -> str:
    counts = reconstruction.counts()
    passes = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if kind != "accept" and counts[kind])
    return f"{counts['accept']} accept and {passes or 'no'} pass examples"


class _Clock:
    """Seconds of each step, to a tenth."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
