"""Which of PyTorch's matrix kernels a pass uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FEW = 2
"""Tokens up to which a bfloat16 product is faster by PyTorch's own kernel than by oneDNN's, on a CPU without AMX: for
one token 2.4 times, for two 1.5 times; for four they are equal."""


def are_few(model: Any, tokens: int) -> bool:
    """Whether PyTorch's own kernels are faster for a pass of that many tokens."""
    return (
        tokens <= FEW
        and model.device.type == "cpu"
        and model.dtype == torch.bfloat16
        and not torch.cpu._is_amx_tile_supported()
    )


@contextmanager
def kernels(model: Any, tokens: int) -> Iterator[None]:
    """The faster kernels for that many tokens. They are chosen for the whole process."""
    if not are_few(model, tokens):
        yield
        return
    before = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0], _fp32_precision=None)
