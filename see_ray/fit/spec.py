"""The inputs of a fit: examples, base model and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.data.reconstruct import Example
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel

SETTINGS_WITHOUT_EFFECT_ON_RESULT = frozenset(
    {
        "accelerator_type",
        "checkpoint_every_s",
        "checkpoint_every_steps",
        "cpus_per_worker",
        "kv_store_gb",
        "max_failures",
        "max_tokens_per_micro_batch",
        "num_workers",
        "placement_strategy",
        "resources_per_worker",
        "storage_path",
        "threads_per_worker",
        "tracking_dir",
        "use_gpu",
        "zero_stage",
    }
)
"""Fields of `FitConfig` that may differ between a fit's first start and a later one that resumes its checkpoint."""


@dataclass(frozen=True)
class FitSpec:
    """Everything that determines the adapter.

    Attributes:
        examples: accept and pass examples; every target begins with an indicator.
        base: the base model.
        base_config: how the base model is loaded.
        activation: where prompts are split, and the indicator tokens.
        config: of the fit.
        held_out: rows on which the fitted adapter decides.
    """

    examples: Sequence[Example]
    base: BaseModel
    base_config: BaseModelConfig
    activation: Activation
    config: FitConfig
    held_out: Sequence[Example] = ()

    def digest(self) -> str:
        """The same for equal data, base model and settings that change the result; names the fit's checkpoints."""
        settings = self.config.model_dump(mode="json", exclude=set(SETTINGS_WITHOUT_EFFECT_ON_RESULT))
        rows = [[(example.prompt, example.target) for example in part] for part in (self.examples, self.held_out)]
        text = json.dumps([rows, self.base.fingerprint, asdict(self.activation), settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def prefix_lengths(self) -> list[int]:
        """Tokens of each example's prefix; 0 in the full form."""
        return [len(self.activation.split(list(example.prompt))[0]) for example in self.examples]
