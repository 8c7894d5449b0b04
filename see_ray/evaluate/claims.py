"""What a comparison is to show of SEE, held against what it found; each claim with yes or no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from see_ray.routing.chain import GENERALIST

ORACLE_WITHIN = 0.01
LEAST_BWT = -0.005
LEAST_ROUTING = 0.99
LEAST_FOREIGN = 0.95
MOST_OWN_PASSED = 0.02
LEAST_AUROC = 0.98

EQUAL = 1e-9
"""Means that are no further apart differ by rounding alone: the same scores, added in another order."""


@dataclass(frozen=True)
class Claim:
    """One claim: the sentence, the number found (as text), and whether it holds."""

    sentence: str
    found: str
    holds: bool


def claims(methods: dict[str, Any]) -> list[Claim]:
    """The claims about `see` that the methods at hand can decide.

    Args:
        methods: those of `results.summary`.
    """
    if "see" not in methods:
        return []
    means = {name: {key: value["mean"] for key, value in body["figures"].items()} for name, body in methods.items()}
    see = means["see"]
    made = []
    if others := {name: figures["ar"] for name, figures in means.items() if name not in ("see", "see-full", "oracle")}:
        best = max(others, key=lambda name: others[name])
        found = f"{100 * see['ar']:.1f} against {100 * others[best]:.1f} of {best}"
        made.append(Claim("AR at least that of every method but the oracle", found, see["ar"] >= others[best] - EQUAL))
    if "oracle" in means:
        behind = means["oracle"]["ar"] - see["ar"]
        found = f"{100 * behind:.1f} points behind"
        made.append(Claim("AR within 1 point of the oracle's", found, behind <= ORACLE_WITHIN + EQUAL))
    made.append(Claim("BWT at least -0.5 points", f"{100 * see['bwt']:.1f}", see["bwt"] >= LEAST_BWT - EQUAL))
    accuracy = see["routing_accuracy"]
    made.append(
        Claim("at least 99 % of the tasks' queries reach their expert", _percent(accuracy), accuracy >= LEAST_ROUTING)
    )
    passed = see["own_to_generalist"]
    made.append(
        Claim("at most 2 % of the tasks' queries reach the generalist", _percent(passed), passed <= MOST_OWN_PASSED)
    )
    for source, share in see.items():
        if source.endswith(f" to {GENERALIST}"):
            name = source.removesuffix(f" to {GENERALIST}")
            made.append(Claim(f"at least 95 % of {name} reach the generalist", _percent(share), share >= LEAST_FOREIGN))
    if "auroc" in see:
        sentence = "AUROC of the tasks' queries against nobody's at least 0.98"
        made.append(Claim(sentence, f"{see['auroc']:.3f}", see["auroc"] >= LEAST_AUROC))
    if "see-full" in means:
        behind = means["see-full"]["ar"] - see["ar"]
        found = f"{100 * see['ar']:.1f} against {100 * means['see-full']['ar']:.1f}"
        made.append(Claim("the activated form's AR at least that of the full form", found, behind <= EQUAL))
    return made


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
