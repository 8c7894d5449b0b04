"""A fitted expert on its way into the sequence: gate, store, publish.

candidate ─► gate ─► store ─► publish ─► live
    ▲         └─► store alone: set aside
    └── decide on the queries of experts that were published during the fit ◄── publish
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from see_ray.admission import newcomers
from see_ray.admission.calibrate import Calibration
from see_ray.admission.candidate import Candidate
from see_ray.admission.gate import Verdict
from see_ray.config import Config
from see_ray.data.prepared import Prepared
from see_ray.errors import GateError
from see_ray.progress import Listener
from see_ray.store.expert_files import write_expert_files
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence, Manifest


class Published(NamedTuple):
    """An expert that went live."""

    manifest: Manifest
    sequence: ExpertSequence
    calibration: Calibration
    gate: Verdict


@dataclass(frozen=True)
class Publication:
    """A fitted expert that is to join the sequence.

    Attributes:
        prepared: its task.
        folder: its PEFT folder; the files that it keeps for later experts are written there, too.
        config: all settings.
        source: where its task came from, for the manifest.
        replace: replace the live expert of the same name.
        force: publish even if a limit of the gate fails.
    """

    prepared: Prepared
    folder: Path
    config: Config
    source: str
    replace: bool
    force: bool

    def publish(self, candidate: Candidate, listener: Listener) -> Published | None:
        """Judge, store and publish; None if the expert must be fitted again, with the queries of newcomers.

        Raises:
            GateError: a limit failed; the expert is stored, but not live.
            StoreError: the expert cannot be stored, or a live expert or base model is in the way.
        """
        name, known = self.prepared.task.name, self.prepared.known
        store = ExpertStore.open(self.config.store.url)
        while True:
            head = store.head()
            if joined := newcomers.newcomers(head, known, name):
                extended = self._decide_on(joined, candidate, store, listener)
                if extended is None:
                    listener.note(f"{name} cannot tell its own queries from theirs: it is fitted again, with them")
                    return None
                candidate, known = extended, known | {ref.id for ref in joined}
            listener.step("Checking the expert against the limits of the gate")
            verdict = candidate.judge(self.config.gate, newcomers.live_base_model(store, head, name))
            for sentence in verdict.failed:
                listener.note(sentence)
            manifest = self._store(store, candidate.calibration, verdict, listener)
            try:
                sequence = store.publish(
                    manifest.ref, newcomers.refuse_newcomers(known, name), self.replace, forced=not verdict.passed
                )
            except newcomers.NewcomersError:
                continue
            return Published(manifest, sequence, candidate.calibration, verdict)

    def _decide_on(
        self, joined: tuple[ExpertRef, ...], candidate: Candidate, store: ExpertStore, listener: Listener
    ) -> Candidate | None:
        """The candidate with newcomers' queries among the foreign ones; None if it must be fitted again."""
        listener.step(f"Deciding on the queries of {', '.join(ref.id for ref in joined)}, published meanwhile")
        kept = newcomers.kept_queries(store, joined, self.prepared.tokenizer)
        queries, claimed = newcomers.split_claimed(kept, self.prepared.reconstruction)
        decisions = newcomers.decide(self.folder, queries, self.prepared.base, self.prepared.activation, self.config)
        return candidate.with_foreign(decisions, claimed)

    def _store(self, store: ExpertStore, calibration: Calibration, verdict: Verdict, listener: Listener) -> Manifest:
        """Store the expert with all that it keeps beside its adapter; raises if it is set aside."""
        is_set_aside = not verdict.passed and not self.force
        listener.step("Setting the expert aside" if is_set_aside else "Storing and publishing the expert")
        write_expert_files(
            self.folder,
            config=self.config,
            calibration=asdict(calibration),
            rehearsal=self.prepared.reconstruction.rehearsal,
            held_out=[row for row, _ in self.prepared.reconstruction.own],
        )
        verdict.write(self.folder)
        prepared, activation = self.prepared, self.prepared.activation
        manifest = store.save(
            self.folder,
            name=prepared.task.name,
            task=self.source,
            base_model=prepared.base.name,
            fingerprint=prepared.base.fingerprint,
            form=self.config.fit.form,
            activation_tokens=activation.tokens,
            generation_prompt=activation.generation_prompt,
            indicator_tokens=(activation.accept, activation.refuse),
            threshold=calibration.threshold,
            metrics=calibration.metrics() | verdict.metrics(),
            gate="passed" if verdict.passed else "forced" if self.force else "set aside",
            gate_failed=verdict.failed,
            r=self.config.fit.r,
        )
        if is_set_aside:
            raise GateError(
                f"{manifest.id} is set aside, not live: {'; '.join(verdict.failed)}. Its report is gate.md beside the "
                f"adapter in {store.url}; mend the task, change a limit (`--set gate.…`), or publish with --force"
            )
        return manifest
