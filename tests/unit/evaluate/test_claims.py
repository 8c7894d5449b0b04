"""Claims are held against what was found, and fail where it does not bear them out."""

from __future__ import annotations

from typing import Any

import pytest

from see_ray.evaluate.claims import claims

GOOD = {"ar": 0.80, "bwt": 0.0, "routing_accuracy": 1.0, "own_to_generalist": 0.0, "trec to generalist": 0.96,
        "auroc": 0.99}  # fmt: skip
OTHERS = {"oracle": 0.805, "multitask": 0.80, "sequential": 0.5, "see-full": 0.79}


def body(**figures: float) -> dict[str, Any]:
    return {"figures": {key: {"mean": value, "spread": None} for key, value in figures.items()}}


def held(**changes: float) -> dict[str, bool]:
    methods = {name: body(ar=ar) for name, ar in OTHERS.items()} | {"see": body(**(GOOD | changes))}
    return {claim.sentence: claim.holds for claim in claims(methods)}


def test_all_hold_where_all_is_well() -> None:
    assert list(held().values()) == [True] * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ar": 0.79}, {"but the oracle", "the oracle's"}),
        ({"ar": 0.798}, {"but the oracle"}),
        ({"bwt": -0.006}, {"BWT"}),
        ({"routing_accuracy": 0.98}, {"reach their expert"}),
        ({"own_to_generalist": 0.03}, {"at most 2 %"}),
        ({"trec to generalist": 0.94}, {"of trec"}),
        ({"auroc": 0.97}, {"AUROC"}),
    ],
)
def test_each_fails_by_its_own_number(change: dict[str, Any], words: Any) -> None:
    failed = [sentence for sentence, holds in held(**change).items() if not holds]
    assert len(failed) == len(words)
    assert all(any(word in sentence for sentence in failed) for word in words)


def test_without_see_there_is_nothing_to_claim() -> None:
    assert claims({"oracle": body(ar=0.5)}) == []


def test_what_is_live_is_not_compared_with_methods_that_did_not_run() -> None:
    sentences = [claim.sentence for claim in claims({"see": body(**GOOD)})]
    assert not any("oracle" in sentence or "full" in sentence for sentence in sentences)


def test_means_that_differ_by_rounding_alone_are_equal() -> None:
    assert held(ar=0.80 - 1e-12)["AR at least that of every method but the oracle"]
