"""A PEFT LoRA adapter: put around a base model, and written to a folder that PEFT and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from see_ray.config import FitConfig
from see_ray.errors import FitError
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel

if TYPE_CHECKING:
    from torch import Tensor


def with_adapter(model: Any, config: FitConfig) -> Any:
    """A base model with a new LoRA adapter around it, as a PEFT model.

    Raises:
        FitError: the target modules do not fit the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    try:
        # The adapter has the base model's dtype: a cast in each layer costs more than it gives, and the optimizer
        # keeps float32 copies where that dtype is shorter.
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise FitError(f"fit.target_modules {targets!r} does not fit this base model: {error}") from error


def save_adapter(weights: dict[str, Tensor], model: Any, activation: Activation, base: BaseModel, folder: Path) -> None:
    """Write an adapter as a PEFT folder, in float32.

    Args:
        weights: by parameter name of `model`.
        model: the PEFT model.
        activation: becomes `alora_invocation_tokens` where PEFT can express it.
        base: named in the adapter's configuration.
        folder: where to write.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = model.peft_config["default"]
    settings.base_model_name_or_path = base.name
    settings.alora_invocation_tokens = activation.peft_invocation()
    settings.inference_mode = True
    settings.save_pretrained(folder)
    # Not "auto": PEFT would ask the hub whether the base model's vocabulary was changed.
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file(state, folder / "adapter_model.safetensors")
