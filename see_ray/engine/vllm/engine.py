"""The vLLM engine: decisions and answers of many experts on vLLM, with the embedded engine's interface.

vLLM brings continuous batching, paged keys and values, tensor parallelism and quantized base models; our plugin
(`engine.vllm_activation`) brings activated experts, so that a prompt is read once for all of them.

A decision is a request for one token that must be one of the two indicators; their log-probabilities make
P(accept). An expert's answer begins behind its accept indicator. vLLM's `AsyncLLM` lives on an event loop of its
own, on a thread of its own, so that this engine can be called from any thread and any event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from see_ray.config import BaseModelConfig
from see_ray.cpus import available_cpus
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams, Token
from see_ray.engine.lora import read_adapter
from see_ray.engine.vllm.plugin import ACTIVATION_POINT, WorkerExtension, problem
from see_ray.errors import ServingError
from see_ray.models.activation import p_accept
from see_ray.models.base_model import BaseModel, context_length, dtype_of

T = TypeVar("T")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks that vLLM can make room for."""

CPU_BLOCK = 32
"""Tokens of a KV block on the CPU: the smallest that vLLM's attention there likes. Only whole blocks are shared."""

CPU_KV_BYTES = 2 << 30
"""Memory for keys and values on the CPU, where nothing else is said. vLLM would take nine tenths of all there is."""


@dataclass(frozen=True)
class _Loaded:
    """An expert in vLLM. `adapter` is a LoRARequest, its name and number never used before in this engine, so that
    keys and values of an expert that had this name earlier are not taken for this one's."""

    expert: Expert
    adapter: Any


class VllmEngine:
    """Base model and experts on vLLM.

    Args:
        base: the base model to load.
        config: its settings (dtype, context length).
        experts: so many adapters take part in one step; vLLM reserves memory for each. More can be loaded, and
            take turns.
        max_rank: highest LoRA rank of an adapter; memory is reserved for it.
        threads: threads that compute, on the CPU; None: all cores that this process may use.
        more: any of vLLM's engine arguments, such as `tensor_parallel_size`, `gpu_memory_utilization`,
            `kv_cache_memory_bytes`, `quantization` or `max_num_seqs`.

    Raises:
        ServingError: vLLM is missing, of an unknown version, or does not start.
    """

    def __init__(
        self,
        base: BaseModel,
        config: BaseModelConfig,
        *,
        experts: int = 16,
        max_rank: int = 64,
        threads: int | None = None,
        **more: Any,
    ):
        if max_rank > RANKS[-1]:
            raise ServingError(f"vLLM takes adapters up to rank {RANKS[-1]}, not {max_rank}")
        self._max_rank = next(rank for rank in RANKS if rank >= max_rank)
        self.eos = _end_tokens(base.folder)
        self._experts: dict[str, _Loaded] = {}
        self._numbers = itertools.count(1)
        self._request_numbers = itertools.count()
        self._folders = Path(tempfile.mkdtemp(prefix="see-ray-adapters-"))
        arguments = {
            "model": str(base.folder),
            "dtype": str(dtype_of(config)).removeprefix("torch."),
            "max_model_len": context_length(base, config),
            "load_format": "safetensors",
            "disable_log_stats": True,
            "max_cpu_loras": max(experts, 64),
            **more,
            "trust_remote_code": False,
            "skip_tokenizer_init": True,  # this engine knows token ids only
            "enable_lora": True,
            "max_loras": experts,
            "max_lora_rank": self._max_rank,
            "specialize_active_lora": False,  # would size GPU kernels by adapters, without those for "none"
            "enable_prefix_caching": True,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        }
        _set_environment(threads)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._wait(_start(arguments))
        except BaseException:
            self._stop_loop()
            raise
        self._block = self._llm.vllm_config.cache_config.block_size

    @property
    def running(self) -> bool:
        """Whether vLLM's processes are there; once they are not, this engine must be made anew."""
        return not self._llm.errored

    def close(self) -> None:
        """End vLLM's processes; again changes nothing."""
        if self._thread.is_alive():
            self._llm.shutdown()
            self._stop_loop()

    # --- experts ---------------------------------------------------------------------------

    def load(self, expert: Expert) -> None:
        """Add an expert; one that has its name already is replaced.

        Raises:
            ServingError: its adapter does not fit the base model, or changes nothing, or the prefix is not shared.
                Any of these would make the base model answer in the expert's name, or slowly.
        """
        weights = read_adapter(expert.folder).values()
        if not any(down.any() and up.any() for down, up in weights):
            raise ServingError(
                f"the adapter of {expert.name} in {expert.folder} changes nothing: "
                "all its updates are zero; fit it again"
            )
        rank = max(down.shape[0] for down, _ in weights)
        if rank > self._max_rank:
            raise ServingError(
                f"the adapter of {expert.name} in {expert.folder} has rank {rank}, this engine has room for "
                f"{self._max_rank}; start it with max_rank={rank}"
            )
        self._wait(self._load(expert))

    def unload(self, name: str) -> None:
        """Forget an expert. Answers of it that are being written end as usual."""
        loaded = self._expert(name)
        del self._experts[name]
        self._wait(self._llm.remove_lora(loaded.adapter.lora_int_id))

    async def _load(self, expert: Expert) -> None:
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        folder = await asyncio.to_thread(self._plain_lora, expert.folder, number)
        loaded = _Loaded(expert, LoRARequest(f"{expert.name}@{number}", number, str(folder)))
        try:
            await self._llm.add_lora(loaded.adapter)
            await self._check(loaded)
        except Exception as error:
            await self._llm.remove_lora(number)
            if isinstance(error, ServingError):
                raise
            raise ServingError(
                f"vLLM cannot load the adapter of {expert.name} in {expert.folder}: {_last_line(error)}"
            ) from error
        former = self._experts.get(expert.name)
        self._experts[expert.name] = loaded
        if former is not None:
            await self._llm.remove_lora(former.adapter.lora_int_id)

    async def _check(self, loaded: _Loaded) -> None:
        """See that the adapter fits, applies, and shares the base model's prefix."""
        expert = loaded.expert
        where = f"the adapter of {expert.name} in {expert.folder}"
        of_workers = await self._llm.collective_rpc("see_ray_misfits", args=(loaded.adapter.lora_int_id,))
        # With pipeline parallelism a layer is on one worker only.
        misfits = [text for text in of_workers[0] if all(text in others for others in of_workers)]
        if misfits:
            raise ServingError(
                f"{where} was made for another base model: {misfits[0]}"
                + (f" ({len(misfits)} such places)" if len(misfits) > 1 else "")
            )
        activation = expert.activation
        once, tokens = activation.generation_prompt, activation.tokens or 1
        prompt = [*once] * (2 + (self._block + tokens) // len(once))
        seen = sorted({activation.accept, activation.refuse, *once})

        async def probe(who: _Loaded | None, **more: Any) -> Any:
            params = self._params(max_tokens=1, temperature=0.0, logprob_token_ids=seen, **more)
            return await self._result(prompt, who, params)

        alone, adapted = [await probe(who, skip_reading_prefix_cache=True) for who in (None, loaded)]
        if alone.outputs[0].logprobs == adapted.outputs[0].logprobs:
            raise ServingError(
                f"{where} changes nothing: the base model's probabilities stay what they are; fit it again"
            )
        if activation.tokens is None:
            return
        whole = (len(prompt) - tokens) // self._block * self._block
        for _ in range(3):  # a busy engine may have thrown the prefix out in between
            await probe(None)
            if (await probe(loaded)).num_cached_tokens >= whole:
                return
        raise ServingError(f"{where} does not share the base model's prefix: the plugin is not at work in vLLM")

    def _plain_lora(self, folder: Path, number: int) -> Path:
        """The adapter as vLLM takes it: without the note on activation, which it refuses and the plugin replaces."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not config.pop("alora_invocation_tokens", None):
            return folder.resolve()
        plain = self._folders / str(number)
        plain.mkdir()
        (plain / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (plain / "adapter_model.safetensors").symlink_to((folder / "adapter_model.safetensors").resolve())
        return plain

    # --- decisions and answers -----------------------------------------------------------

    async def decide(self, prompt: Sequence[int], experts: Sequence[str], *, fallback: bool = False) -> list[float]:
        """P(accept) of each named expert for one prompt (token ids); the generalist is always ready, as the prefix
        that vLLM keeps is its own."""
        return await asyncio.wrap_future(self._submit(self._decide(prompt, experts)))

    def decide_now(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        """As :meth:`decide`, waiting on the calling thread."""
        return self._wait(self._decide(prompt, experts))

    def decide_batch(self, prompts: Sequence[Sequence[int]], expert: str) -> list[float]:
        """P(accept) of one expert for many prompts."""
        loaded = self._expert(expert)

        async def decide() -> list[float]:
            return list(await asyncio.gather(*(self._decision(prompt, loaded) for prompt in prompts)))

        return self._wait(decide())

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Token]:
        """Tokens of an answer, one by one; ends before an end-of-turn token.

        An expert's answer starts after its accept indicator, as it was fitted.
        """
        loaded = None if request.expert is None else self._expert(request.expert)
        if request.sampling.max_tokens < 1:
            return
        here, tokens = asyncio.get_running_loop(), asyncio.Queue[Token | BaseException | None]()

        async def pump() -> None:
            end: BaseException | None = None
            try:
                async for token in self._answer(request.prompt, loaded, request.sampling):
                    here.call_soon_threadsafe(tokens.put_nowait, token)
            except Exception as error:
                end = error
            here.call_soon_threadsafe(tokens.put_nowait, end)

        pumping = self._submit(pump())
        try:
            while (token := await tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            pumping.cancel()  # vLLM gives up the request, if it is not over

    # --- on vLLM's event loop ---------------------------------------------------------------

    async def _decide(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        # The first request reads the prefix; vLLM gives its blocks to the others even within the same step.
        loaded = [self._expert(name) for name in experts]
        return list(await asyncio.gather(*(self._decision(prompt, one) for one in loaded)))

    async def _decision(self, prompt: Sequence[int], loaded: _Loaded) -> float:
        activation = loaded.expert.activation
        pair = [activation.accept, activation.refuse]
        params = self._params(max_tokens=1, temperature=0.0, allowed_token_ids=pair, logprob_token_ids=pair)
        output = await self._result(prompt, loaded, params)
        found = output.outputs[0].logprobs[0]
        return p_accept(found[activation.accept].logprob, found[activation.refuse].logprob)

    async def _answer(
        self, prompt: Sequence[int], loaded: _Loaded | None, sampling: SamplingParams
    ) -> AsyncIterator[Token]:
        from vllm.sampling_params import RequestOutputKind

        ends: frozenset[int] = frozenset() if sampling.ignore_eos else self.eos
        params = self._params(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sorted(ends),
            output_kind=RequestOutputKind.DELTA,
        )
        forced = [] if loaded is None else [loaded.expert.activation.accept]
        async for output in self._outputs(prompt, loaded, params, forced):
            made = output.outputs[0]
            for number, token in enumerate(made.token_ids):
                if token not in ends:
                    yield _token(token, made.logprobs[number] if made.logprobs else None, sampling.logprobs)

    async def _result(self, prompt: Sequence[int], loaded: _Loaded | None, params: Any) -> Any:
        """vLLM's last output for a request."""
        last = None
        async for output in self._outputs(prompt, loaded, params):
            last = output
        return last

    async def _outputs(
        self, prompt: Sequence[int], loaded: _Loaded | None, params: Any, forced: Sequence[int] = ()
    ) -> AsyncIterator[Any]:
        """vLLM's outputs for a prompt and the tokens of the answer that are `forced`."""
        from vllm.exceptions import VLLMClientError, VLLMServerError

        if loaded is not None and loaded.expert.activation.tokens is not None:
            # The prompt's end counts, not the answer's: this is where the expert was fitted to begin.
            params.extra_args = {ACTIVATION_POINT: len(prompt) - loaded.expert.activation.tokens}
        name = f"see-{next(self._request_numbers)}"
        adapter = None if loaded is None else loaded.adapter
        outputs = self._llm.generate(
            {"prompt_token_ids": [*prompt, *forced]}, params, request_id=name, lora_request=adapter
        )
        try:
            async for output in outputs:
                if output.outputs[0].finish_reason == "error":
                    raise ServingError(f"vLLM gave up request {name}; its log says why")
                yield output
        except (VLLMClientError, ValueError) as error:  # it cannot be served as it stands
            raise ServingError(f"vLLM refuses the request: {_last_line(error)}") from error
        except VLLMServerError as error:
            cause = error.__cause__ or error
            raise ServingError(f"vLLM cannot answer: {_last_line(cause)}; its log says more") from error
        finally:
            await outputs.aclose()

    def _params(self, **named: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(detokenize=False, **named)

    def _expert(self, name: str) -> _Loaded:
        try:
            return self._experts[name]
        except KeyError:
            raise ServingError(f"this engine holds no expert {name}; it holds {sorted(self._experts)}") from None

    # --- between the threads -----------------------------------------------------------------

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        shutil.rmtree(self._folders, ignore_errors=True)


async def _start(arguments: dict[str, Any]) -> Any:
    """vLLM with the plugin in every process."""
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.exceptions import VLLMError
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ServingError(
            f"vLLM cannot be imported ({_last_line(error)}); install it: `pip install 'see_ray[vllm]'` for GPUs, "
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
            f"vLLM does not start: {_last_line(error)} (a cause in another process is in this process's log)"
        ) from error
    problems = await llm.collective_rpc("see_ray_problem")
    if any(problems):
        llm.shutdown()
        raise ServingError(f"activated experts cannot be served: in a worker, {next(filter(None, problems))}")
    return llm


def _set_environment(threads: int | None) -> None:
    """What vLLM reads from the environment; what the user set there stays."""
    ours = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit torch's threads, and locks they hold
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas on one host would all be bound to the same cores
        "OMP_NUM_THREADS": str(threads or available_cpus()),
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in ours.items():
        if name == "OMP_NUM_THREADS" and threads is not None:
            os.environ[name] = value
        os.environ.setdefault(name, value)


def _end_tokens(folder: Path) -> frozenset[int]:
    """End-of-turn tokens as the base model's folder names them."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("For further information")]  # pydantic's
    return (lines or [type(error).__name__])[-1][:400]


def _token(token: int, logprobs: dict[int, Any] | None, count: int | None) -> Token:
    """A token with vLLM's log-probabilities; vLLM names the chosen one beside the likeliest."""
    if logprobs is None or count is None:
        return Token(token)
    ranked = sorted(((number, found.logprob) for number, found in logprobs.items()), key=lambda pair: -pair[1])
    return Token(token, logprobs[token].logprob, tuple(ranked[:count]))
