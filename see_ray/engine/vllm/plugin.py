"""Activated experts in vLLM: a plugin that vLLM loads in each of its processes (`vllm.general_plugins`).

vLLM applies a request's adapter to all its tokens, and shares none of its KV blocks with requests of other adapters. A
request that names an *activation point*, the position of its first adapted token, as
``SamplingParams(extra_args={ACTIVATION_POINT: position})`` beside its ``lora_request``, is treated differently:

    positions     0 … point-1                  point …
    computed by   the base model               base model and adapter
    KV blocks     that end before the point    are keyed by adapter and point,
                  are the base model's,        since both change their content
                  shared by all experts

Positions are absolute, so the result does not depend on how a prompt is chunked, where a prefix hit ends, whether the
request was preempted and recomputed, or how often the generation prompt occurs in a chat: earlier turns are computed
by the base model, as in the embedded engine.

All other requests (full-form experts, the base model) are left to vLLM, but for two fixes:

- vLLM's CPU kernels use the index -1, "no adapter", as the last adapter slot, which they would apply to tokens without
  an adapter that share a step with others.
- vLLM's sampler computes the log-probabilities either of given tokens, which decisions ask for, or of the likeliest
  ones, for all requests of a step; requests of the other kind would get wrong ones.

The patched functions are private to vLLM, so the plugin supports certain versions only. With any other it leaves vLLM
as it is, and `problem` returns the reason. It supports vLLM's V1 model runner; requests on V2, whose kernels need
a GPU and could not be tried, are rejected.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

ACTIVATION_POINT = "see_ray_activation_point"
"""Key in `SamplingParams.extra_args`: position of the first token that the adapter applies to."""

VERSIONS = ((0, 32), (0, 33))
"""Supported vLLM versions: at least the first, below the second."""

log = logging.getLogger(__name__)

_problem: str | None = "vLLM did not load the plugin (is it missing from VLLM_PLUGINS?)"


def register() -> None:
    """Patch vLLM in this process. The plugin's entry point; has no effect the second time."""
    global _problem
    if _problem is None:
        return
    _problem = _version_problem()
    if _problem is None:
        patches = _patches()
        unknown = [patch.name for patch in patches if not patch.fits()]
        if unknown:
            _problem = f"{', '.join(unknown)} differ from those in the supported versions of vLLM"
    if _problem is not None:
        log.warning("see_ray does not patch this vLLM and cannot serve activated experts on it: %s", _problem)
        return
    for patch in patches:
        patch.install()


def problem() -> str | None:
    """Why this process cannot serve activated experts; None if it can."""
    return _problem


def _version_problem() -> str | None:
    import vllm
    from vllm.platforms import current_platform

    numbers = vllm.__version__.split("+")[0].split(".")[:2]
    low, high = (".".join(map(str, version)) for version in VERSIONS)
    if not all(map(str.isdigit, numbers)) or not VERSIONS[0] <= tuple(map(int, numbers)) < VERSIONS[1]:
        return f"vLLM is {vllm.__version__}; supported are versions from {low} on, below {high}"
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        return f"vLLM's platform {current_platform.device_name} is not supported; supported are CPUs and GPUs"
    return None


# --- the patches -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patch:
    """Replaces a function of vLLM by `around`, which is given that function and its arguments. The arguments have
    vLLM's names, since vLLM may pass them by name.

    Attributes:
        owner: module or class.
        function: name of the function in `owner`.
    """

    owner: Any
    function: str
    around: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"{self.owner.__name__}.{self.function}"

    def fits(self) -> bool:
        """Whether vLLM's function exists and has the arguments of `around`; further ones only if that takes `*rest`."""
        original = getattr(self.owner, self.function, None)
        if original is None:
            return False
        actual = list(inspect.signature(original).parameters)
        known = inspect.signature(self.around).parameters.values()
        expected = [parameter.name for parameter in known if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][1:]
        takes_more = len(known) > len(expected) + 1
        return actual == expected or (takes_more and actual[: len(expected)] == expected)

    def install(self) -> None:
        original, around = getattr(self.owner, self.function), self.around

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        setattr(self.owner, self.function, patched)
        for module in list(sys.modules.values()):  # also where it was imported by name
            if getattr(module, "__dict__", {}).get(self.function) is original:
                setattr(module, self.function, patched)


def _patches() -> list[_Patch]:
    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    patches = [
        _Patch(InputProcessor, "_validate_params", _check_request),
        _Patch(kv_cache_utils, "generate_block_hash_extra_keys", _block_keys),
        _Patch(LoRAModelRunnerMixin, "set_active_loras", _map_tokens),
        _Patch(Sampler, "forward", _both_logprobs),
    ]
    if current_platform.is_cpu():
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

        kernels = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
        patches += [_Patch(lora_ops, kernel, _adapted_rows) for kernel in kernels]
        patches.append(_Patch(PunicaWrapperBase, "_update_prefill_metadata", _room_for_runs))
    return patches


def _point(params: Any) -> int | None:
    """The activation point in a request's sampling parameters; None if it names none."""
    return (getattr(params, "extra_args", None) or {}).get(ACTIVATION_POINT)


def _check_request(original: Any, self: Any, params: Any, supported_tasks: Any) -> Any:
    """Reject a request that the other patches cannot serve. Later in vLLM, the error would end the engine."""
    from vllm.exceptions import VLLMValidationError

    point = _point(params)
    if point is not None:
        if type(point) is not int or point < 0:
            raise VLLMValidationError(f"{ACTIVATION_POINT} is {point!r}; it must be a position, 0 or more")
        if self.vllm_config.use_v2_model_runner:
            raise VLLMValidationError(
                "activated experts need vLLM's V1 model runner; start it with VLLM_USE_V2_MODEL_RUNNER=0"
            )
    return original(self, params, supported_tasks)


def _block_keys(original: Any, request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
    """What is hashed together with the tokens [start, end) of a KV block."""
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    point = _point(request.sampling_params)
    if point is None or keys is None:
        return keys, next_mm_idx
    if end_token_idx <= point:
        keys = tuple(key for key in keys if key[0] != "lora")
    else:
        # After the point, keys and values depend on where it is.
        keys = tuple((*key, point) if key[0] == "lora" else key for key in keys)
    return keys or None, next_mm_idx


def _map_tokens(
    original: Any,
    self: Any,
    input_batch: Any,
    num_scheduled_tokens: Any,
    num_sampled_tokens: Any = None,
    *rest: Any,
    **named: Any,
) -> Any:
    """Set the adapter of each token of a step, and of each position that is sampled from."""
    points = [_point(self.requests[name].sampling_params) for name in input_batch.req_ids]
    if all(point is None for point in points):
        return original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *rest, **named)
    import numpy as np

    sampled = np.ones_like(num_scheduled_tokens) if num_sampled_tokens is None else num_sampled_tokens
    sample_slots, token_slots, adapters = input_batch.make_lora_inputs(num_scheduled_tokens, sampled)
    sample_slots, token_slots = np.array(sample_slots), np.array(token_slots)
    first_token = first_sample = 0
    for row, point in enumerate(points):
        tokens, samples = int(num_scheduled_tokens[row]), int(sampled[row])
        if point is not None:
            before = point - int(input_batch.num_computed_tokens_cpu[row])  # tokens of this step before the point
            token_slots[first_token : first_token + min(max(before, 0), tokens)] = 0
            # The sampled positions are a request's last ones.
            sample_slots[first_sample : first_sample + min(max(before - tokens + samples, 0), samples)] = 0
        first_token += tokens
        first_sample += samples
    return self._set_active_loras(tuple(sample_slots.tolist()), tuple(token_slots.tolist()), adapters, *rest, **named)


# --- fixes for all requests -------------------------------------------------------------------


def _both_logprobs(original: Any, self: Any, logits: Any, sampling_metadata: Any, *rest: Any, **named: Any) -> Any:
    """Log-probabilities of given tokens for the requests that name some, of the likeliest tokens for the others. vLLM's
    sampler computes one or the other for all requests of a step."""
    given, likeliest = sampling_metadata.logprob_token_ids, sampling_metadata.max_num_logprobs
    if not given or likeliest is None or likeliest < 0:
        return original(self, logits, sampling_metadata, *rest, **named)
    logprobs = self.compute_logprobs(logits)  # first, since sampling modifies the logits
    width = max(likeliest, *map(len, given.values()))
    likeliest_only = replace(sampling_metadata, logprob_token_ids=None, max_num_logprobs=width)
    output = original(self, logits, likeliest_only, *rest, **named)
    tensors = output.logprobs_tensors
    for row, tokens in given.items():
        columns = slice(1, 1 + len(tokens))  # column 0 is the sampled token
        tensors.logprob_token_ids[row, columns] = tensors.logprob_token_ids.new_tensor(tokens)
        tensors.logprobs[row, columns] = logprobs[row, tokens]
    return output


def _adapted_rows(
    original: Any,
    inputs: Any,
    lora_b_weights: Any,
    output_tensor: Any,
    lora_indices_tensor: Any,
    *rest: Any,
    **named: Any,
) -> None:
    """Run a CPU kernel on the rows that have an adapter only; -1, "no adapter", it would index as the last slot."""
    slots = lora_indices_tensor
    rows = (slots >= 0).nonzero().flatten()
    if len(rows) == len(slots):
        original(inputs, lora_b_weights, output_tensor, slots, *rest, **named)
    elif len(rows):
        adapted = output_tensor[rows]
        original(inputs[rows], lora_b_weights, adapted, slots[rows], *rest, **named)
        output_tensor[rows] = adapted


def _room_for_runs(original: Any, self: Any, token_lora_tensor: Any) -> None:
    """Enlarge the buffers for runs of tokens with the same adapter. vLLM expects one run per request; with an
    activation point there can be two."""
    runs = 1 + int((token_lora_tensor[1:] != token_lora_tensor[:-1]).sum())
    if runs > len(self._seq_lengths):
        for name in ("_seq_start_locs", "_seq_lengths", "_lora_indices_per_batch"):
            setattr(self, name, getattr(self, name).new_empty(2 * runs))
    original(self, token_lora_tensor)


# --- called by the engine in each worker ---------------------------------------------------------


class WorkerExtension:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    def see_ray_problem(self) -> str | None:
        """`problem` in the worker's process."""
        return problem()

    def see_ray_misfits(self, adapter: int) -> list[str]:
        """Weights of a loaded adapter that do not fit this worker's part of the model. vLLM ignores them, or pads
        those that are too small."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        misfits = []
        for name, lora in manager._registered_adapters[adapter].loras.items():
            module = manager.modules.get(name)
            if module is None:
                misfits.append(f"{name} is not a layer here that supports an adapter")
                continue
            layer = module.base_layer
            if getattr(layer, "input_size", None) is None or getattr(layer, "tp_size", 1) > 1:
                continue
            # Layers that vLLM has merged, such as q, k and v, have a pair of matrices for each part.
            downs, ups = (part if isinstance(part, list) else [part] for part in (lora.lora_a, lora.lora_b))
            sizes = layer.output_sizes if len(ups) > 1 else [layer.output_size]
            for down, up, size in zip(downs, ups, sizes, strict=True):
                if down is not None and (down.shape[1], up.shape[0]) != (layer.input_size, size):
                    adapter_size = f"{down.shape[1]}x{up.shape[0]}"
                    misfits.append(f"{name} is {layer.input_size}x{size}, the adapter {adapter_size}")
        return misfits
