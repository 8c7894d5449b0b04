"""Adapter and optimizer of a DeepSpeed engine as full float32 tensors, and back again.

DeepSpeed's own checkpoints belong to one number of workers. These tensors do not: every ZeRO stage gives
and takes them in the same form.

    weights.<name>, exp_avg.<name>, exp_avg_sq.<name>      of each trainable parameter
    step                                                   of Adam's bias correction
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(engine: Any) -> dict[str, Tensor]:
    """The state of a fit after at least one step. Collective: all workers call it, all get everything."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors: dict[str, Any] = {}
    for name, param in _trainable(engine):
        for moment in _MOMENTS:
            if _is_sharded(param):
                found = safe_get_full_optimizer_state(param, moment)
            else:
                found = engine.optimizer.state[param][moment]
            tensors[f"{moment}.{name}"] = _copy(found, param)
        found = safe_get_full_fp32_param(param) if _is_sharded(param) else param
        tensors[f"weights.{name}"] = _copy(found, param)
    steps = [state["step"] for state in _inner(engine).state.values() if "step" in state]
    return {**tensors, "step": torch.tensor(float(steps[0]))}


def weights(engine: Any) -> dict[str, Tensor]:
    """The adapter alone, by parameter name. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: _copy(safe_get_full_fp32_param(param) if _is_sharded(param) else param, param)
        for name, param in _trainable(engine)
    }


def restore(engine: Any, tensors: dict[str, Tensor]) -> None:
    """Put :func:`gather`'s tensors back, on any number of workers. Collective.

    The engine must have taken a step (whichever: everything is overwritten), since optimizers make their
    state in the first one.
    """
    for name, param in _trainable(engine):
        for moment in _MOMENTS:
            _put(engine, param, tensors[f"{moment}.{name}"], moment)
    for state in _inner(engine).state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(tensors["step"].item())
        elif "step" in state:
            state["step"] = int(tensors["step"].item())
    set_weights(engine, {name: tensors[f"weights.{name}"] for name, _ in _trainable(engine)})


def set_weights(engine: Any, values: dict[str, Tensor]) -> None:
    """Overwrite the adapter, the optimizer's float32 copy of it included. Collective."""
    import deepspeed

    params = dict(_trainable(engine))
    for name, param in params.items():
        if _is_sharded(param):
            _put(engine, param, values[name], None)
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()
        return
    stage3 = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(params.values()), modifier_rank=0, enabled=stage3), torch.no_grad():
        for name, param in params.items():
            param.copy_(values[name].reshape(param.shape))


def _put(engine: Any, param: Any, value: Tensor, moment: str | None) -> None:
    from deepspeed import utils

    if hasattr(param, "ds_id"):  # ZeRO 3: each worker has an equal part of each parameter, the last one padded
        mine = utils.safe_get_local_optimizer_state(param, "exp_avg").numel()
        padded = torch.zeros(mine * engine.dp_world_size)
        padded[: value.numel()] = value.flatten()
        rank = torch.distributed.get_rank(param.ds_process_group)
        part = padded[mine * rank : mine * (rank + 1)]
        if moment:
            utils.safe_set_local_optimizer_state(param, part, moment)
        else:
            utils.safe_set_local_fp32_param(param, part)
    elif hasattr(param, "_hp_mapping"):
        if moment:
            utils.safe_set_full_optimizer_state(param, value, moment)
        else:
            utils.safe_set_full_fp32_param(param, value)
    elif moment:
        engine.optimizer.state[param][moment].copy_(value)


def _trainable(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, param) for name, param in engine.module.named_parameters() if param.requires_grad)


def _is_sharded(param: Any) -> bool:
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def _inner(engine: Any) -> Any:
    """PyTorch's optimizer behind DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _copy(found: Tensor, param: Any) -> Tensor:
    """As float32 in host memory, in the shape of the whole parameter."""
    shape = getattr(param, "ds_shape", param.shape)
    return found.detach().flatten()[: shape.numel()].reshape(shape).float().cpu().clone()
