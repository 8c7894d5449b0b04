"""Names of the Serve applications of an endpoint."""

from __future__ import annotations

from see_ray.store.records import ExpertRef

INGRESS_APP = "see"
GENERALIST_APP = "see-generalist"
ENSEMBLE_APP = "see-ensemble"
EXPERT_PREFIX = "see-expert-"
SPARE_PREFIX = "see-spare-"


def expert_app(ref: ExpertRef) -> str:
    """Application that is started for an expert. An expert that is assigned to a spare has the spare's instead."""
    return f"{EXPERT_PREFIX}{ref.name}-{ref.version}"
