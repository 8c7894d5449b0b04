"""An arriving task that is ready to be fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from see_ray.data.reconstruct import Reconstruction
from see_ray.data.task import Task
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel


@dataclass(frozen=True)
class Prepared:
    """An arriving task and all that fitting and publishing its expert needs.

    Attributes:
        task: its rows.
        base: the base model.
        tokenizer: of the base model.
        activation: from where the adapter applies, and the indicator tokens.
        reconstruction: accept and pass examples, and held-out rows.
        known: ids of the live experts whose queries are among the pass examples.
    """

    task: Task
    base: BaseModel
    tokenizer: Any
    activation: Activation
    reconstruction: Reconstruction
    known: frozenset[str]
