"""The claims about SEE that a comparison checks, each with the measured value and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from see_ray.routing.chain import GENERALIST

MAX_BEHIND_ORACLE = 0.01
MIN_BWT = -0.005
MIN_ROUTING_ACCURACY = 0.99
MIN_FOREIGN_TO_GENERALIST = 0.95
MAX_OWN_TO_GENERALIST = 0.02
MIN_AUROC = 0.98

EPSILON = 1e-9
"""Means closer than this differ by rounding alone: they are sums of the same scores in another order."""


@dataclass(frozen=True)
class Claim:
    """One claim: its sentence, the measured value as text, and whether it holds."""

    sentence: str
    measured: str
    holds: bool


def claims(methods: dict[str, Any]) -> list[Claim]:
    """The claims about `see` that the given methods can decide.

    Args:
        methods: those of `results.summary`.
    """
    if "see" not in methods:
        return []
    means = {name: {key: value["mean"] for key, value in body["figures"].items()} for name, body in methods.items()}
    return _quality(means) + _routing(means["see"]) + _activated_form(means)


def _quality(means: dict[str, dict[str, float]]) -> list[Claim]:
    see = means["see"]
    checked = []
    if others := {name: figures["ar"] for name, figures in means.items() if name not in ("see", "see-full", "oracle")}:
        best = max(others, key=lambda name: others[name])
        measured = f"{100 * see['ar']:.1f} against {100 * others[best]:.1f} of {best}"
        holds = see["ar"] >= others[best] - EPSILON
        checked.append(Claim("AR at least that of every method but the oracle", measured, holds))
    if "oracle" in means:
        behind = means["oracle"]["ar"] - see["ar"]
        measured = f"{100 * behind:.1f} points behind"
        checked.append(Claim("AR within 1 point of the oracle's", measured, behind <= MAX_BEHIND_ORACLE + EPSILON))
    checked.append(Claim("BWT at least -0.5 points", f"{100 * see['bwt']:.1f}", see["bwt"] >= MIN_BWT - EPSILON))
    return checked


def _routing(see: dict[str, float]) -> list[Claim]:
    right, passed = see["routing_accuracy"], see["own_to_generalist"]
    checked = [
        Claim("at least 99 % of the tasks' queries reach their expert", _percent(right), right >= MIN_ROUTING_ACCURACY),
        Claim(
            "at most 2 % of the tasks' queries reach the generalist", _percent(passed), passed <= MAX_OWN_TO_GENERALIST
        ),
    ]
    for figure, share in see.items():
        if figure.endswith(f" to {GENERALIST}"):
            sentence = f"at least 95 % of {figure.removesuffix(f' to {GENERALIST}')} reach the generalist"
            checked.append(Claim(sentence, _percent(share), share >= MIN_FOREIGN_TO_GENERALIST))
    if "auroc" in see:
        sentence = "AUROC of the tasks' queries against foreign ones at least 0.98"
        checked.append(Claim(sentence, f"{see['auroc']:.3f}", see["auroc"] >= MIN_AUROC))
    return checked


def _activated_form(means: dict[str, dict[str, float]]) -> list[Claim]:
    if "see-full" not in means:
        return []
    activated, full = means["see"]["ar"], means["see-full"]["ar"]
    measured = f"{100 * activated:.1f} against {100 * full:.1f}"
    return [Claim("the activated form's AR at least that of the full form", measured, full - activated <= EPSILON)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
