"""The gate: whether a fitted expert may join the sequence.

A new expert can harm a live endpoint in one way: by accepting queries that another expert, or the generalist, answers
better. The gate therefore checks, on rows that neither the new expert nor an older one was fitted on:

    taken          the share of each older expert's kept queries that it would accept
    own_accepted   the share of its own held-out rows that it accepts at its threshold, which is chosen so that few
                   foreign queries reach it; small if own and foreign queries have similar P(accept)
    gain           by how much its loss on its own responses is below the generalist's
    change         whether its adapter changes the decision at all
    base_model     whether it was fitted on the base model of the live experts

The limits are the section `gate` of the configuration. An expert that fails one is set aside: it is stored with a
report and not published, unless forced. Decisions and losses are measured by the fit while the model is loaded; only
the comparison with the generalist is extra work, on at most 32 rows. This module computes findings from these numbers
and loads no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from see_ray.admission.calibrate import Calibration, wilson_upper
from see_ray.config import GateConfig
from see_ray.fit.report import Comparison


@dataclass(frozen=True)
class Evidence:
    """The measurements that the gate judges.

    Attributes:
        calibration: its threshold.
        own: P(accept) of its own held-out rows.
        foreign: (source, P(accept)) of held-out foreign queries; the source is `general`, `mixed` or the name of a
            live expert.
        claimed: per live expert how many of its kept queries are rows of this task, too.
        comparison: the expert compared with the generalist; None if it was not measured.
        base_model: (name, fingerprint) of the expert's base model.
        live_base_model: the same for the live experts; None if there are none.
    """

    calibration: Calibration
    own: Sequence[float]
    foreign: Sequence[tuple[str, float]]
    claimed: dict[str, int]
    comparison: Comparison | None
    base_model: tuple[str, str]
    live_base_model: tuple[str, str] | None = None


@dataclass(frozen=True)
class Finding:
    """The result of one check. The field names are those of `gate.json`.

    Attributes:
        limit: `taken`, `own_accepted`, `gain`, `change` or `base_model`.
        about: name of the older expert, for a limit that applies to each of them; else empty.
        found: the measured value; None for `base_model`.
        allowed: its limit; None for `base_model`.
        passed: whether the limit is kept.
        sentence: the result as a sentence.
    """

    limit: str
    about: str
    found: float | None
    allowed: float | None
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """All findings, and the seconds that measuring took beyond the fit."""

    findings: tuple[Finding, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def failed(self) -> tuple[str, ...]:
        """The sentences of the failed checks."""
        return tuple(finding.sentence for finding in self.findings if not finding.passed)

    def metrics(self) -> dict[str, float]:
        """Values for the expert's manifest."""
        return {
            f"gate_{finding.limit}{'_from_' if finding.about else ''}{finding.about}": round(finding.found, 4)
            for finding in self.findings
            if finding.found is not None and finding.limit != "own_accepted"  # in Calibration.metrics()
        }

    def write(self, folder: Path) -> None:
        """Write `gate.json`, and the same as text to `gate.md`."""
        report = {"passed": self.passed, "seconds": self.seconds, "findings": [asdict(f) for f in self.findings]}
        (folder / "gate.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        lines = [f"- {'kept' if f.passed else '**failed**'}: {f.sentence}" for f in self.findings]
        title = "passed" if self.passed else "failed"
        text = "\n".join([f"# Gate: {title}", "", *lines, "", f"Measured in {self.seconds:.1f} s beside the fit.", ""])
        (folder / "gate.md").write_text(text, encoding="utf-8")


def judge(evidence: Evidence, limits: GateConfig) -> Verdict:
    """Check an expert's measurements against the limits."""
    findings = [
        _base_model(evidence),
        *_taken(evidence, limits.max_taken),
        _own_accepted(evidence, limits.min_own_accepted),
    ]
    if evidence.comparison is not None:
        findings += [_gain(evidence.comparison, limits.min_gain), _change(evidence.comparison, limits.min_change)]
    return Verdict(tuple(findings), evidence.comparison.seconds if evidence.comparison else 0.0)


def _base_model(evidence: Evidence) -> Finding:
    name, fingerprint = evidence.base_model
    if evidence.live_base_model is None:
        return Finding("base_model", "", None, None, True, f"it belongs to {name}, and no other expert is live")
    live_name, live = evidence.live_base_model
    same = fingerprint == live
    candidate = f"it belongs to the base model {name} ({fingerprint[:12]})"
    others = "as the live experts do" if same else f"but the live experts to {live_name} ({live[:12]})"
    return Finding("base_model", "", None, None, same, f"{candidate}, {others}")


def _taken(evidence: Evidence, allowed: float) -> list[Finding]:
    findings = []
    experts = sorted({source for source, _ in evidence.foreign} - {"general", "mixed"} | set(evidence.claimed))
    for name in experts:
        decisions = [p for source, p in evidence.foreign if source == name]
        claimed = evidence.claimed.get(name, 0)
        kept = len(decisions) + claimed
        if not kept:
            continue
        taken = claimed + sum(p >= evidence.calibration.threshold for p in decisions)
        sentence = (
            f"it would take {_percent(taken / kept)} of {name}'s {kept} kept queries (at most {_percent(allowed)}; "
            f"95 % upper bound {_percent(wilson_upper(taken, kept))})"
        )
        if claimed:
            sentence += f"; {claimed} of them are rows of this task, too"
        # One query is always allowed: of a few it would be a large share.
        passed = taken <= max(1, math.floor(allowed * kept))
        findings.append(Finding("taken", name, taken / kept, allowed, passed, sentence))
    return findings


def _own_accepted(evidence: Evidence, allowed: float) -> Finding:
    calibration = evidence.calibration
    passed = calibration.own_accepted >= allowed
    sentence = (
        f"it accepts {_percent(calibration.own_accepted)} of its {calibration.own} held-out rows (at least "
        f"{_percent(allowed)}) at threshold {calibration.threshold:.3f}, which lets "
        f"{_percent(calibration.foreign_accepted)} of {calibration.foreign} foreign queries in"
    )
    if not passed:
        sentence += f"; {_overlap(evidence, allowed)}"
    return Finding("own_accepted", "", calibration.own_accepted, allowed, passed, sentence)


def _overlap(evidence: Evidence, share: float) -> str:
    """The foreign queries that it would accept at the threshold that accepts `share` of its own rows."""
    own = sorted(evidence.own)
    threshold = own[min(len(own) - 1, math.floor((1 - share) * len(own)))] if own else 0.5
    accepts: dict[str, list[bool]] = {}
    for source, p in evidence.foreign:
        accepts.setdefault(source, []).append(p >= threshold)
    shares = {source: sum(hits) / len(hits) for source, hits in accepts.items() if any(hits)}
    most_first = sorted(shares, key=lambda source: -shares[source])
    listed = ", ".join(f"{_percent(shares[source])} of {_queries_of(source)}" for source in most_first)
    return f"to accept that many it would also take {listed or 'none of the foreign queries'}"


def _queries_of(source: str) -> str:
    return f"the {source} queries" if source in ("general", "mixed") else f"{source}'s queries"


def _gain(comparison: Comparison, allowed: float) -> Finding:
    gain = comparison.generalist_loss - comparison.expert_loss
    sentence = (
        f"its loss of a response token is {comparison.expert_loss:.3f}, the generalist's "
        f"{comparison.generalist_loss:.3f}, on {comparison.rows} held-out rows: a gain of {gain:.3f} "
        f"(at least {allowed:g})"
    )
    return Finding("gain", "", gain, allowed, gain >= allowed, sentence)


def _change(comparison: Comparison, allowed: float) -> Finding:
    passed = comparison.change >= allowed
    sentence = (
        f"its adapter changes the log odds of accept against pass by up to {comparison.change:.4f} (at least "
        f"{allowed:g}){'' if passed else ': it is null'}"
    )
    return Finding("change", "", comparison.change, allowed, passed, sentence)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
