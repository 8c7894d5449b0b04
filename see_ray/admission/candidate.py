"""A fitted expert before it is published: its decisions, the threshold they give, and the gate's verdict.

    decisions on held-out queries ─► calibrate ─► threshold ─► gate ─► verdict

`see learn` (`see_ray.pipeline`) and the comparison of methods (`see_ray.evaluate.baselines.methods`) both use this
module, so that both judge an expert by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from see_ray.admission.calibrate import Calibration, calibrate
from see_ray.admission.gate import Evidence, Verdict, judge
from see_ray.config import GateConfig
from see_ray.data.reconstruct import Reconstruction
from see_ray.fit.report import Comparison
from see_ray.models.base_model import BaseModel

MIN_OWN_ACCEPTED = 0.95
"""Share of its own held-out rows that an expert must still accept after foreign queries were added. An expert that
accepted fewer before must not accept fewer than that."""


@dataclass(frozen=True)
class Candidate:
    """What is known of a fitted expert that is not published yet.

    Attributes:
        own: P(accept) of the task's held-out rows.
        foreign: (source, P(accept)) of held-out foreign queries; the source is `general`, `mixed` or the name of
            a live expert.
        claimed: per live expert how many of its kept queries are rows of this task, too.
        comparison: the expert compared with the generalist; None if it was not measured.
        base_model: (name, fingerprint) of the base model that it was fitted on.
        false_accept_rate: largest share of foreign queries that it may accept.
    """

    own: Sequence[float]
    foreign: Sequence[tuple[str, float]]
    claimed: dict[str, int]
    comparison: Comparison | None
    base_model: tuple[str, str]
    false_accept_rate: float

    @classmethod
    def from_fit(
        cls,
        reconstruction: Reconstruction,
        decisions: Sequence[float],
        comparison: Comparison | None,
        base: BaseModel,
        false_accept_rate: float,
    ) -> Candidate:
        """Build it from a fit's decisions on `reconstruction.held_out`, in that order."""
        pairs = list(zip(reconstruction.held_out, decisions, strict=True))
        foreign = [p_accept for example, p_accept in pairs if not example.is_own]
        return cls(
            own=[p_accept for example, p_accept in pairs if example.is_own],
            foreign=[(source, p) for (source, _), p in zip(reconstruction.foreign, foreign, strict=True)],
            claimed=reconstruction.claimed,
            comparison=comparison,
            base_model=(base.name, base.fingerprint),
            false_accept_rate=false_accept_rate,
        )

    @cached_property
    def calibration(self) -> Calibration:
        """The threshold chosen on the decisions."""
        return calibrate(self.own, self.foreign, self.false_accept_rate)

    def with_foreign(self, foreign: Sequence[tuple[str, float]], claimed: dict[str, int]) -> Candidate | None:
        """The same expert, calibrated again with more foreign queries.

        Args:
            foreign: (source, P(accept)) of these queries.
            claimed: per source how many of its queries are rows of this task and therefore not in `foreign`.

        Returns:
            None if it accepts too few of its own rows now, so that it must be fitted again with these queries.
        """
        extended = replace(self, foreign=[*self.foreign, *foreign], claimed=self.claimed | claimed)
        required = min(self.calibration.own_accepted, MIN_OWN_ACCEPTED)
        return extended if extended.calibration.own_accepted >= required else None

    def judge(self, limits: GateConfig, live_base_model: tuple[str, str] | None = None) -> Verdict:
        """Check the expert against the limits of the gate.

        Args:
            limits: the limits.
            live_base_model: (name, fingerprint) of the live experts' base model; None if no other expert is live.
        """
        evidence = Evidence(
            self.calibration, self.own, self.foreign, self.claimed, self.comparison, self.base_model, live_base_model
        )
        return judge(evidence, limits)
