"""LoRA adapters with random weights: they cost what fitted ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_adapter(model: Any, folder: Path, rank: int, seed: int, target_modules: list[str] | None = None) -> None:
    """Write a PEFT folder with a random adapter.

    Args:
        model: a transformers model; its linear layers give names and shapes.
        folder: is created.
        rank: of the adapter.
        seed: of its weights.
        target_modules: names of the adapted layers, such as `q_proj`; all linear layers but the output if None.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from see_ray.engine.lora import linear_layers

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for path, linear in linear_layers(model).items():
        if target_modules and path.rpartition(".")[2] not in target_modules:
            continue
        key = f"base_model.model.{path}.lora_{{}}.weight"
        weights[key.format("A")] = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        weights[key.format("B")] = torch.randn(linear.out_features, rank, generator=generator) * 0.01
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=target_modules or "all-linear")
    lora.save_pretrained(folder)
