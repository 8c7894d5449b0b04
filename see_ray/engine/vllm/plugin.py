"""Activated experts inside vLLM: a plugin that vLLM loads in each of its processes (`vllm.general_plugins`).

vLLM applies a request's adapter to all its tokens and keeps the KV blocks of its prompt apart from all others. A
request that names an *activation point* (the position of its first adapted token, as
``SamplingParams(extra_args={ACTIVATION_POINT: position})`` beside its ``lora_request``) is treated otherwise:

    positions     0 … point-1                 point …
    computed by   the base model              base model and adapter
    KV blocks     those that end there are    bear the adapter and the point, since both
                  the base model's, shared    change what is in them
                  by all experts

Positions are absolute. So it makes no difference in how many chunks a prompt is read, where a prefix hit ends,
whether a request was preempted and is read again, or how often the generation prompt occurs in a chat: earlier
turns are read by the base model, as the embedded engine reads them.

All other requests (full-form experts, the base model) go vLLM's own way. Two things are mended for them, too. On the
CPU, vLLM's kernels read "no adapter", index -1, as the adapter in the last slot, which they would give to tokens
without adapter that share a step with others. And a step in which one request asks for the log-probabilities of
given tokens, as decisions do, and another for those of the likeliest, would answer the other one wrongly.

What is patched is private to vLLM, so the plugin knows which versions it fits. In any other it leaves vLLM alone,
and :func:`problem` says why. Of vLLM's two model runners it fits V1; a request for V2 is refused, since V2's own
kernels need a GPU and this could not be tried there.
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
"""vLLM versions that the plugin fits: from the first on, below the second."""

log = logging.getLogger(__name__)

_problem: str | None = "vLLM did not load the plugin (is it missing from VLLM_PLUGINS?)"


def register() -> None:
    """Patch vLLM in this process. The entry point; calling it again changes nothing."""
    global _problem
    if _problem is None:
        return
    _problem = _version_problem()
    if _problem is None:
        patches = _patches()
        unknown = [patch.name for patch in patches if not patch.fits()]
        if unknown:
            _problem = f"{', '.join(unknown)} are not what they were in the versions of vLLM that are known"
    if _problem is not None:
        log.warning("see_ray leaves this vLLM alone and cannot serve activated experts on it: %s", _problem)
        return
    for patch in patches:
        patch.install()


def problem() -> str | None:
    """Why activated experts cannot be served by this process; None if they can."""
    return _problem


def _version_problem() -> str | None:
    import vllm
    from vllm.platforms import current_platform

    numbers = vllm.__version__.split("+")[0].split(".")[:2]
    low, high = (".".join(map(str, version)) for version in VERSIONS)
    if not all(map(str.isdigit, numbers)) or not VERSIONS[0] <= tuple(map(int, numbers)) < VERSIONS[1]:
        return f"vLLM is {vllm.__version__}; known are versions from {low} on, below {high}"
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        return f"vLLM's platform {current_platform.device_name} is not known; known are CPUs and GPUs"
    return None


# --- the patches -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patch:
    """`around` is called in place of a function of vLLM, with that function before its arguments. The arguments have
    vLLM's names, since vLLM may pass them by name."""

    owner: Any
    function: str
    around: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"{self.owner.__name__}.{self.function}"

    def fits(self) -> bool:
        """Whether vLLM's function is there, with the arguments that `around` takes (or more, if it takes any more)."""
        found = getattr(self.owner, self.function, None)
        if found is None:
            return False
        there, known = list(inspect.signature(found).parameters), inspect.signature(self.around).parameters.values()
        named = [parameter.name for parameter in known if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][1:]
        return there == named or (len(named) + 1 < len(known) and there[: len(named)] == named)

    def install(self) -> None:
        original, around = getattr(self.owner, self.function), self.around

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        setattr(self.owner, self.function, patched)
        for module in list(sys.modules.values()):  # where it was imported by name
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
    """Refuse what the other patches could not serve, where it comes in: further on it would end the engine."""
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
    """What is hashed beside the tokens of a KV block, [start, end)."""
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    point = _point(request.sampling_params)
    if point is None or keys is None:
        return keys, next_mm_idx
    if end_token_idx <= point:
        keys = tuple(key for key in keys if key[0] != "lora")
    else:
        # Behind the point the same tokens with another point are other keys and values.
        keys = tuple((*key, point) if key[0] == "lora" else key for key in keys)
    return keys or None, next_mm_idx


def _map_tokens(
    original: Any, self: Any, input_batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any = None, *rest: Any,
    **named: Any,
) -> Any:  # fmt: skip
    """Say which adapter each token of a step has, and each place that is sampled from."""
    points = [_point(self.requests[name].sampling_params) for name in input_batch.req_ids]
    if all(point is None for point in points):
        return original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *rest, **named)
    import numpy as np

    sampled = np.ones_like(num_scheduled_tokens) if num_sampled_tokens is None else num_sampled_tokens
    of_samples, of_tokens, adapters = input_batch.make_lora_inputs(num_scheduled_tokens, sampled)
    of_samples, of_tokens = np.array(of_samples), np.array(of_tokens)
    first_token = first_sample = 0
    for row, point in enumerate(points):
        tokens, samples = int(num_scheduled_tokens[row]), int(sampled[row])
        if point is not None:
            before = point - int(input_batch.num_computed_tokens_cpu[row])  # of this step's tokens
            of_tokens[first_token : first_token + min(max(before, 0), tokens)] = 0
            # Sampled from are a request's last tokens.
            of_samples[first_sample : first_sample + min(max(before - tokens + samples, 0), samples)] = 0
        first_token += tokens
        first_sample += samples
    return self._set_active_loras(tuple(of_samples.tolist()), tuple(of_tokens.tolist()), adapters, *rest, **named)


# --- mended for all requests -------------------------------------------------------------------


def _both_logprobs(original: Any, self: Any, logits: Any, sampling_metadata: Any, *rest: Any, **named: Any) -> Any:
    """Log-probabilities of given tokens for the requests that name some, of the likeliest for those that ask so.

    vLLM's sampler has one or the other for all requests of a step.
    """
    given, likeliest = sampling_metadata.logprob_token_ids, sampling_metadata.max_num_logprobs
    if not given or likeliest is None or likeliest < 0:
        return original(self, logits, sampling_metadata, *rest, **named)
    known = self.compute_logprobs(logits)  # now: sampling writes into the logits
    width = max(likeliest, *map(len, given.values()))
    other = replace(sampling_metadata, logprob_token_ids=None, max_num_logprobs=width)
    output = original(self, logits, other, *rest, **named)
    found = output.logprobs_tensors
    for row, tokens in given.items():
        columns = slice(1, 1 + len(tokens))  # behind the sampled token
        found.logprob_token_ids[row, columns] = found.logprob_token_ids.new_tensor(tokens)
        found.logprobs[row, columns] = known[row, tokens]
    return output


def _adapted_rows(
    original: Any, inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, *rest: Any,
    **named: Any,
) -> None:  # fmt: skip
    """A CPU kernel that leaves rows without adapter, slot -1, alone: as an index it is the last slot."""
    slots = lora_indices_tensor
    rows = (slots >= 0).nonzero().flatten()
    if len(rows) == len(slots):
        original(inputs, lora_b_weights, output_tensor, slots, *rest, **named)
    elif len(rows):
        adapted = output_tensor[rows]
        original(inputs[rows], lora_b_weights, adapted, slots[rows], *rest, **named)
        output_tensor[rows] = adapted


def _room_for_runs(original: Any, self: Any, token_lora_tensor: Any) -> None:
    """Make room for the runs of tokens with one adapter: vLLM counts one a request, here there can be two."""
    runs = 1 + int((token_lora_tensor[1:] != token_lora_tensor[:-1]).sum())
    if runs > len(self._seq_lengths):
        for name in ("_seq_start_locs", "_seq_lengths", "_lora_indices_per_batch"):
            setattr(self, name, getattr(self, name).new_empty(2 * runs))
    original(self, token_lora_tensor)


# --- what the engine asks of a worker ---------------------------------------------------------


class WorkerExtension:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    def see_ray_problem(self) -> str | None:
        """As :func:`problem`, in the worker's process."""
        return problem()

    def see_ray_misfits(self, adapter: int) -> list[str]:
        """What of a loaded adapter finds no place in this worker's part of the model: vLLM ignores it, or writes
        what is too small into a corner."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        misfits = []
        for name, lora in manager._registered_adapters[adapter].loras.items():
            module = manager.modules.get(name)
            if module is None:
                misfits.append(f"{name} is no layer here that takes an adapter")
                continue
            layer = module.base_layer
            if getattr(layer, "input_size", None) is None or getattr(layer, "tp_size", 1) > 1:
                continue
            # Layers that vLLM has merged, such as q, k and v, have one pair of matrices for each.
            downs, ups = (part if isinstance(part, list) else [part] for part in (lora.lora_a, lora.lora_b))
            sizes = layer.output_sizes if len(ups) > 1 else [layer.output_size]
            for down, up, size in zip(downs, ups, sizes, strict=True):
                if down is not None and (down.shape[1], up.shape[0]) != (layer.input_size, size):
                    found = f"{down.shape[1]}x{up.shape[0]}"
                    misfits.append(f"{name} is {layer.input_size}x{size}, the adapter there {found}")
        return misfits
