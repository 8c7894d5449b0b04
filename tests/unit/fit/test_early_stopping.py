"""Early stopping: when a fit ends, and which adapter it keeps."""

from __future__ import annotations

import torch

from see_ray.fit.early_stopping import BestAdapter, Evaluation, best_step, patience_exhausted


def evaluation(step: int, accuracy: float, loss: float) -> Evaluation:
    return {"step": step, "own_accuracy": accuracy, "foreign_accuracy": 1.0, "response_loss": loss}


def test_patience_ends_where_neither_decisions_nor_responses_improve() -> None:
    evaluations = [
        evaluation(1, 0.5, 2.0),
        evaluation(2, 0.9, 1.0),
        evaluation(3, 0.9, 0.9999),
        evaluation(4, 0.8, 1.2),
    ]
    assert [patience_exhausted(evaluations[:count], 2) for count in range(1, 5)] == [False, False, False, True]
    assert not patience_exhausted([*evaluations, evaluation(5, 0.9, 0.5)], 2)
    assert not patience_exhausted([*evaluations, evaluation(5, 1.0, 2.0)], 2)


def test_the_best_evaluation_has_the_most_decisions_right_then_the_lowest_loss() -> None:
    evaluations = [
        evaluation(1, 0.9, 0.1),
        evaluation(2, 1.0, 0.5),
        evaluation(3, 1.0, 0.3),
        evaluation(4, 1.0, 0.4),
    ]
    assert best_step(evaluations) == 3


def test_the_best_adapter_comes_back_from_a_checkpoint() -> None:
    weights = {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.zeros(3)}
    tensors = {"weights.a.lora_A": torch.zeros(2, 3), **BestAdapter(7, weights).to_tensors()}
    assert tensors.keys() == {"weights.a.lora_A", "best", "best.a.lora_A", "best.a.lora_B"}  # as older ones have it
    best = BestAdapter.from_tensors(tensors)
    assert best is not None
    assert (best.step, best.weights) == (7, weights)
    assert BestAdapter.from_tensors({"weights.a.lora_A": torch.zeros(2, 3)}) is None
