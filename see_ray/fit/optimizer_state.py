"""Adapter and optimizer state of a DeepSpeed engine as whole float32 tensors, and back again.

DeepSpeed's own checkpoints belong to one number of ranks. These tensors are the same for every number of ranks and
every ZeRO stage.

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
    """The engine's state after at least one step. Collective: all ranks call it, all get everything."""
    from deepspeed.utils import safe_get_full_optimizer_state

    tensors: dict[str, Tensor] = {}
    for name, param in _trainable(engine):
        for moment in _MOMENTS:
            if _is_sharded(param):
                state = safe_get_full_optimizer_state(param, moment)
            else:
                state = engine.optimizer.state[param][moment]
            tensors[f"{moment}.{name}"] = _copy(state, param)
    tensors |= {f"weights.{name}": value for name, value in weights(engine).items()}
    steps = [state["step"] for state in _torch_optimizer(engine).state.values() if "step" in state]
    return {**tensors, "step": torch.tensor(float(steps[0]))}


def weights(engine: Any) -> dict[str, Tensor]:
    """The adapter's weights, by parameter name. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: _copy(safe_get_full_fp32_param(param) if _is_sharded(param) else param, param)
        for name, param in _trainable(engine)
    }


def restore(engine: Any, tensors: dict[str, Tensor]) -> None:
    """Load what `gather` returned, on any number of ranks. Collective.

    The engine must have taken a step on any batch, since optimizers create their state in the first one; all of it
    is overwritten.
    """
    for name, param in _trainable(engine):
        for moment in _MOMENTS:
            _put(engine, param, tensors[f"{moment}.{name}"], moment)
    for state in _torch_optimizer(engine).state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(tensors["step"].item())
        elif "step" in state:
            state["step"] = int(tensors["step"].item())
    set_weights(engine, {name: tensors[f"weights.{name}"] for name, _ in _trainable(engine)})


def set_weights(engine: Any, values: dict[str, Tensor]) -> None:
    """Overwrite the adapter's weights and the optimizer's float32 copy of them. Collective."""
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
    """Overwrite an optimizer moment of a parameter, or its float32 copy where `moment` is None."""
    from deepspeed import utils

    if hasattr(param, "ds_id"):  # ZeRO 3: each rank has an equal part of each parameter, the last one padded
        size = utils.safe_get_local_optimizer_state(param, "exp_avg").numel()
        padded = torch.zeros(size * engine.dp_world_size)
        padded[: value.numel()] = value.flatten()
        rank = torch.distributed.get_rank(param.ds_process_group)
        part = padded[size * rank : size * (rank + 1)]
        if moment:
            utils.safe_set_local_optimizer_state(param, part, moment)
        else:
            utils.safe_set_local_fp32_param(param, part)
    elif hasattr(param, "_hp_mapping"):  # ZeRO 1 and 2
        if moment:
            utils.safe_set_full_optimizer_state(param, value, moment)
        else:
            utils.safe_set_full_fp32_param(param, value)
    elif moment:
        engine.optimizer.state[param][moment].copy_(value)


def _trainable(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, param) for name, param in engine.module.named_parameters() if param.requires_grad)


def _is_sharded(param: Any) -> bool:
    """Whether DeepSpeed keeps float32 copy and moments of the parameter separately, in parts."""
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def _torch_optimizer(engine: Any) -> Any:
    """PyTorch's optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _copy(value: Tensor, param: Any) -> Tensor:
    """A copy as float32 in host memory, in the shape of the whole parameter."""
    shape = getattr(param, "ds_shape", param.shape)
    return value.detach().flatten()[: shape.numel()].reshape(shape).float().cpu().clone()
