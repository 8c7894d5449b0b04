"""One fit on a GPU, by see_ray (`fit.local`) or by a plain loop over PEFT and AdamW; the fit cells of `gpu.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from random_llama import ACTIVATION, RANK, free, now, random_tokens

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.local import fit_local
from see_ray.fit.spec import FitSpec
from see_ray.models.base_model import BaseModel

ROWS, PROMPT_TOKENS, RESPONSE_TOKENS, EPOCHS, BATCH = 48, 400, 32, 3, 16


def fitting(model: Any, kind: str, folder: Path) -> dict[str, Any]:
    """One fit after a short one that warms up: milliseconds of a step (median), seconds of prefixes and of the whole,
    peak gigabytes of the device's memory with the weights."""
    prompts = [(*random_tokens(model, PROMPT_TOKENS - 3), *ACTIVATION.generation_prompt) for _ in range(ROWS)]
    rows = [Example(ids, (ACTIVATION.accept, *random_tokens(model, RESPONSE_TOKENS)), "accept") for ids in prompts]
    steps = peft_steps if kind == "peft" else partial(see_ray_steps, form=kind, folder=folder)
    steps(model, rows[:BATCH], 2)
    free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds, stamps = steps(model, rows, EPOCHS)
    each = statistics.median(later - earlier for earlier, later in pairwise(stamps))
    return {
        "step_ms": round(each * 1000, 1),
        "steps_per_s": round(1 / each, 2),
        "prefix_s": round(max(0.0, seconds - each * len(stamps)), 2) if kind == "activated" else 0.0,
        "steps": len(stamps),
        "total_s": round(seconds, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else 0.0,
    }


def see_ray_steps(
    model: Any, rows: Sequence[Example], epochs: int, form: str, folder: Path
) -> tuple[float, list[float]]:
    """Seconds of see_ray's own fit, and the times at which its steps ended."""
    settings = {"form": form, "r": RANK, "num_train_epochs": epochs, "train_batch_size": BATCH}
    config = FitConfig.model_validate(settings)
    activation, stamps = replace(ACTIVATION, tokens=1 if form == "activated" else None), []
    base = BaseModel("random", folder, "")
    spec = FitSpec(rows, base, BaseModelConfig(), activation, config)
    fitted = fit_local(spec, model, folder, on_step=lambda *_: stamps.append(now()))
    return fitted.seconds, stamps


def peft_steps(model: Any, rows: Sequence[Example], epochs: int) -> tuple[float, list[float]]:
    """The same of a plain loop: rows equally long, adapters and AdamW in bfloat16, the loss is transformers' own."""
    settings = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    peft = get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
    ids = torch.tensor([[*row.prompt, *row.target] for row in rows], device=model.device)
    labels = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < PROMPT_TOKENS, -100)
    began, stamps = now(), []
    for _ in range(epochs):
        for batch, wanted in zip(ids.split(BATCH), labels.split(BATCH), strict=True):
            peft(input_ids=batch, labels=wanted).loss.backward()
            torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            stamps.append(now())
    peft.unload().eval()
    return stamps[-1] - began, stamps
