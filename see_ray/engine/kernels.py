"""Which of PyTorch's matrix multiplication kernels a forward uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MAX_NATIVE_TOKENS = 2
"""Up to this many tokens PyTorch's own bfloat16 kernel is faster than oneDNN's on a CPU without AMX: 2.4 times for one
token, 1.5 times for two. For four they are equal."""


def native_kernels_are_faster(model: Any, num_tokens: int) -> bool:
    """Whether PyTorch's own kernels are faster than oneDNN's for a forward of that many tokens."""
    return (
        num_tokens <= MAX_NATIVE_TOKENS
        and model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and not torch.cpu._is_amx_tile_supported()
    )


@contextmanager
def fastest_kernels(model: Any, num_tokens: int) -> Iterator[None]:
    """Use the faster kernels for that many tokens. The choice applies to the whole process."""
    if not native_kernels_are_faster(model, num_tokens):
        yield
        return
    flags = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=flags[0], _fp32_precision=None)
