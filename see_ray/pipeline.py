"""From an arriving task to a live expert: the whole path. Read this first.

    read the task ─► reconstruct ─► fit ─► calibrate ─► gate ─► store ─► publish
       task.py      reconstruct.py   fit.py  calibrate.py  gate.py  store.py  newcomers.py
                                                             └─► store alone: set aside

A running endpoint notices the new sequence version by itself (`deployer`). Nothing of earlier
experts changes on the way; their rehearsal samples are only read.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from see_ray.admission import newcomers
from see_ray.admission.calibrate import Calibration, calibrate
from see_ray.admission.gate import Evidence, Verdict, judge
from see_ray.cluster import result_of
from see_ray.config import Config
from see_ray.data.general_sampling import load_or_sample_general
from see_ray.data.reconstruct import KINDS, Reconstruction, reconstruct
from see_ray.data.rows import Row, TokenLimit
from see_ray.data.task import SplitOptions, Task, read_task
from see_ray.errors import FingerprintError, GateError, LiveError
from see_ray.fit import launch as fitting
from see_ray.fit.launch import Fitted
from see_ray.fit.report import FitSummary, Progress
from see_ray.fit.tracking import Tracker, draw_losses
from see_ray.models.activation import Activation, activation_of, encode_prompt
from see_ray.models.base_model import BaseModel, context_length, find, load_tokenizer
from see_ray.observability import metrics
from see_ray.progress import Listener
from see_ray.store.expert_files import kept_chats, write_expert_files
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertSequence, Manifest


@dataclass(frozen=True)
class Prepared:
    """An arriving task, ready to be fitted; `known` are the ids of the experts that were live then."""

    task: Task
    base: BaseModel
    tokenizer: Any
    activation: Activation
    reconstruction: Reconstruction
    known: frozenset[str]


@dataclass(frozen=True)
class Learned:
    """What :func:`learn` made."""

    manifest: Manifest
    sequence: ExpertSequence
    calibration: Calibration
    gate: Verdict
    fit: FitSummary
    seconds: dict[str, float]


@dataclass(frozen=True)
class Source:
    """Where an arriving task comes from, and how it is read; see `task.read_task`."""

    path: str
    name: str | None = None
    max_rows: int | None = None
    skip_bad_rows: bool = False


def prepare(source: Source, config: Config, listener: Listener, *, replace: bool = True) -> Prepared:
    """Read a task and reconstruct its training set; with `replace` False, a live expert of the
    task's name is refused before anything long begins.

    Raises:
        BaseModelError, TaskError, ConfigError, StoreError: see the modules of each step.
    """
    listener.step("Reading the base model and the task")
    base = find(config.base_model)
    tokenizer = load_tokenizer(base)
    activation = activation_of(tokenizer, config.base_model, config.fit)
    longest = min(config.fit.max_length or 1 << 30, context_length(base, config.base_model))

    def count_tokens(row: Row) -> int:
        response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        return len(encode_prompt(tokenizer, row.messages)) + len(response) + 2  # indicator, end of turn

    task = read_task(
        source.path,
        name=source.name,
        split=SplitOptions(
            eval_share=config.reconstruct.eval_share,
            seed=config.fit.seed,
            max_rows=source.max_rows,
            max_eval_rows=config.reconstruct.max_eval_rows,
        ),
        token_limit=TokenLimit(longest, count_tokens),
        skip_bad_rows=source.skip_bad_rows,
    )
    for note in task.notes:
        listener.note(note)
    store = ExpertStore.open(config.store.url)
    head = store.head()
    _refuse(head, store, task.name, base, replace)
    earlier = {ref.name: kept_chats(store, ref) for ref in head.experts if ref.name != task.name}
    general = load_or_sample_general(base, config, listener)
    made = reconstruct(
        task, tokenizer, activation, config.reconstruct, earlier=earlier, general=general, seed=config.fit.seed
    )
    return Prepared(task, base, tokenizer, activation, made, frozenset(ref.id for ref in head.experts))


def learn(
    source: Source, config: Config, *, replace: bool = False, force: bool = False, listener: Listener | None = None
) -> Learned:
    """Teach the system one task. Needs a connection to Ray.

    Args:
        source: the arriving task.
        config: everything else.
        replace: the expert takes the place of a live one of the same name.
        force: publish the expert even if it fails a limit of the gate; its manifest says so.
        listener: is told of every step.

    Raises:
        GateError: it failed one, and was set aside.
        SeeError: any of the steps failed; what was live before still is.
    """
    listener = listener or Listener()
    clock = _Clock()
    while True:
        prepared = prepare(source, config, listener, replace=replace)
        clock.lap("prepare")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            fitted = _fit(prepared, config, folder, listener)
            clock.lap("fit")
            admitted = _admit(prepared, fitted, config, folder, listener, source.path, replace, force)
            clock.lap("publish")
        if admitted is not None:
            return Learned(*admitted, fit=fitted.summary, seconds=clock.laps)


# --- steps ---------------------------------------------------------------------------------


def _fit(prepared: Prepared, config: Config, folder: Path, listener: Listener) -> Fitted:
    made = prepared.reconstruction
    listener.step(f"Fitting {prepared.task.name}: {_counted(made)}")

    settings = config.fit.model_dump(mode="json")
    name = f"{prepared.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with Tracker(Path(config.fit.tracking_dir), name, settings, listener.note) as tracker:
        fitted = fitting.fit_expert(
            made.train,
            prepared.base,
            prepared.activation,
            config.base_model,
            config.fit,
            folder,
            name=prepared.task.name,
            held_out=made.held_out,
            listener=_FitListener(listener, tracker, prepared.task.name),
        )
    draw_losses(fitted.summary, folder / "fit.png")
    return fitted


class _FitListener(fitting.Listener):
    """Hands on what a fit tells: progress and notes to the listener, figures to the tracker, both to metrics."""

    def __init__(self, listener: Listener, tracker: Tracker, task: str):
        self._listener, self._tracker, self._task = listener, tracker, task

    def progress(self, progress: Progress) -> None:
        if progress.phase == "fit":
            metrics.show("see_fit_progress_ratio", progress.done / max(1, progress.total), task=self._task)
            if progress.loss is not None:
                metrics.show("see_fit_loss", progress.loss, task=self._task)
            if progress.tokens_per_s is not None:
                metrics.show("see_fit_tokens_per_second", progress.tokens_per_s, task=self._task)
            loss = "" if progress.loss is None else f"loss {progress.loss:.3f}"
            rate = "" if progress.tokens_per_s is None else f"{progress.tokens_per_s:.0f} tokens/s"
            self._listener.progress("fitting", progress.done, progress.total, f"{loss}, {rate}")
        else:
            titles = {
                "starting": "starting workers",
                "prefix": "reading prefixes",
                "held-out": "deciding on held-out queries",
                "saving": "saving the adapter",
            }
            self._listener.progress(titles[progress.phase], progress.done, progress.total, progress.waiting)

    def note(self, text: str) -> None:
        self._listener.note(text)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self._tracker.log(step, figures)


def _admit(
    prepared: Prepared,
    fitted: Fitted,
    config: Config,
    folder: Path,
    listener: Listener,
    source: str,
    replacing: bool,
    force: bool,
) -> tuple[Manifest, ExpertSequence, Calibration, Verdict] | None:
    """Calibrate, judge, save and publish; None if the expert must be fitted again, since others joined meanwhile."""
    made, name, base = prepared.reconstruction, prepared.task.name, prepared.base
    own, decisions = fitted.decisions[: len(made.own)], fitted.decisions[len(made.own) :]
    foreign = [(kind, p) for (kind, _), p in zip(made.foreign, decisions, strict=True)]
    claimed = dict(made.claimed)
    calibration = calibrate(own, foreign, config.calibrate.false_accept_rate)
    store = ExpertStore.open(config.store.url)
    known = prepared.known
    head = store.head()
    joined = newcomers.newcomers(head, known, name)

    def check(head: ExpertSequence) -> None:
        if found := newcomers.newcomers(head, known, name):
            raise newcomers.NewcomersError(found)

    while True:
        if joined:
            listener.step(f"Reading the queries of {', '.join(ref.id for ref in joined)}, which joined meanwhile")
            queries, theirs = newcomers.not_own(newcomers.queries_of(store, joined, prepared.tokenizer), made)
            claimed |= theirs
            prompts = [ids for _, ids in queries]
            read = result_of(newcomers.decide(folder, prompts, base, prepared.activation, config))
            foreign += [(kind, p) for (kind, _), p in zip(queries, read, strict=True)]
            again = newcomers.recalibrated(calibration, own, foreign, config.calibrate.false_accept_rate)
            if again is None:
                listener.note(f"{name} cannot tell its own queries from theirs: it is fitted again, with them")
                return None
            calibration, known = again, known | {ref.id for ref in joined}
        listener.step("Holding the expert against the limits of the gate")
        verdict = judge(
            Evidence(
                calibration, own, foreign, claimed, fitted.comparison,
                (base.name, base.fingerprint), newcomers.base_model_of(store, head, name),
            ),
            config.gate,
        )  # fmt: skip
        for sentence in verdict.failed:
            listener.note(sentence)
        publishing = verdict.passed or force
        listener.step("Storing and publishing the expert" if publishing else "Setting the expert aside")
        write_expert_files(
            folder,
            config=config,
            calibration=asdict(calibration),
            rehearsal=made.rehearsal,
            held_out=[row for row, _ in made.own],
        )
        verdict.write(folder)
        activation = prepared.activation
        manifest = store.save(
            folder,
            name=name,
            task=source,
            base_model=base.name,
            fingerprint=base.fingerprint,
            form=config.fit.form,
            activation_tokens=activation.tokens,
            generation_prompt=activation.generation_prompt,
            indicator_tokens=(activation.accept, activation.refuse),
            threshold=calibration.threshold,
            metrics=calibration.metrics() | verdict.metrics(),
            gate="passed" if verdict.passed else "forced" if force else "set aside",
            gate_failed=verdict.failed,
            r=config.fit.r,
        )
        if not publishing:
            raise GateError(
                f"{manifest.id} is set aside, not live: {'; '.join(verdict.failed)}. Its report is gate.md beside the "
                f"adapter in {store.url}; mend the task, change a limit (`--set gate.…`), or publish with --force"
            )
        try:
            forced = not verdict.passed
            return manifest, store.publish(manifest.ref, check, replacing, forced), calibration, verdict
        except newcomers.NewcomersError as error:
            joined, head = error.refs, store.head()


def _refuse(head: ExpertSequence, store: ExpertStore, name: str, base: BaseModel, replace: bool) -> None:
    """What publishing would refuse: said before hours of fitting rather than after."""
    for ref in head.experts:
        if ref.name == name and not replace:
            raise LiveError(
                f"{ref.id} is live already; say --replace to put the new expert in its place, "
                "or --name to call the new one otherwise"
            )
    for manifest in map(store.manifest, head.experts[-1:]):  # one stands for all
        if manifest.fingerprint != base.fingerprint:
            raise FingerprintError(
                f"the live experts of {store.url} belong to the base model {manifest.base_model} "
                f"({manifest.fingerprint[:12]}), not to {base.name} ({base.fingerprint[:12]}); "
                "set base_model.name to that one, or use another store"
            )


def _counted(made: Reconstruction) -> str:
    counts = made.counts()
    passes = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if kind != "accept" and counts[kind])
    return f"{counts['accept']} accept and {passes or 'no'} pass examples"


class _Clock:
    """Seconds of each step, rounded."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
