"""Starting vLLM with our plugin in each of its processes."""

from __future__ import annotations

import os
from typing import Any

from see_ray.cpus import available_cpus
from see_ray.engine.vllm.plugin import problem
from see_ray.errors import ServingError

CPU_BLOCK = 32
"""Tokens of a KV block on the CPU: the smallest size that vLLM's attention supports well there. Only whole blocks are
shared."""

CPU_KV_BYTES = 2 << 30
"""Memory for keys and values on the CPU, in bytes, if `kv_cache_memory_bytes` is not given. vLLM's own default there is
nine tenths of all memory."""


async def launch(arguments: dict[str, Any]) -> Any:
    """Start vLLM's `AsyncLLM`; `arguments` are those of `AsyncEngineArgs`.

    Raises:
        ServingError: vLLM is missing, does not start, or does not take the plugin.
    """
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.exceptions import VLLMError
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ServingError(
            f"vLLM cannot be imported ({last_line(error)}); install it: `pip install 'see_ray[vllm]'` for GPUs, "
            "`make setup-vllm` for the CPU"
        ) from error
    if current_platform.is_cpu():
        arguments = {"block_size": CPU_BLOCK, "kv_cache_memory_bytes": CPU_KV_BYTES, **arguments}
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config()
        if problem():
            raise ServingError(f"activated experts cannot be served: {problem()}")
        if config.use_v2_model_runner:
            raise ServingError("activated experts need vLLM's V1 model runner; unset VLLM_USE_V2_MODEL_RUNNER")
        llm = AsyncLLM.from_vllm_config(config, disable_log_stats=arguments["disable_log_stats"])
    except (VLLMError, ValueError, TypeError, RuntimeError) as error:
        raise ServingError(
            f"vLLM does not start: {last_line(error)} (a cause in another process is in this process's log)"
        ) from error
    problems = await llm.collective_rpc("see_ray_problem")
    if any(problems):
        llm.shutdown()
        raise ServingError(f"activated experts cannot be served: in a worker, {next(filter(None, problems))}")
    return llm


def set_environment(threads: int | None) -> None:
    """Set the environment variables that vLLM reads, except those that are set already. `threads`, where given,
    overrides OMP_NUM_THREADS."""
    defaults = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit torch's threads and the locks they hold
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all replicas on one host are bound to the same cores
        "OMP_NUM_THREADS": str(available_cpus()),
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def last_line(error: BaseException) -> str:
    """The last line of an error's message; in vLLM's and pydantic's errors it names the cause."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("For further information")]  # pydantic's
    return (lines or [type(error).__name__])[-1][:400]
