"""The vLLM engine: decisions and answers of many experts on vLLM.

vLLM provides continuous batching, paged attention, tensor parallelism and quantized base models; our plugin
(`engine.vllm.plugin`) adds activated experts, so that a prompt is prefilled once for all of them.

A decision is a request for one token, restricted to the two indicators; P(accept) follows from their
log-probabilities. An expert's answer is generated after its accept indicator. vLLM's `AsyncLLM` runs on an event loop
and a thread of its own, so that this engine can be called from any thread and any event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from see_ray.config import BaseModelConfig
from see_ray.engine.interface import Expert, GenerateRequest, PrefixArrays, SamplingParams, Token
from see_ray.engine.lora import read_adapter
from see_ray.engine.vllm.launch import last_line, launch, set_environment
from see_ray.engine.vllm.plugin import ACTIVATION_POINT, WorkerExtension
from see_ray.errors import ServingError
from see_ray.models.activation import p_accept
from see_ray.models.base_model import BaseModel, context_length, dtype_of

T = TypeVar("T")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as `max_lora_rank`."""

PREFIXES_STAY = "the vLLM engine cannot hand on keys and values between replicas; each replica computes its own"


@dataclass(frozen=True)
class _Loaded:
    """An expert in vLLM. `adapter` is a LoRARequest whose name and id are unique in this engine, since vLLM caches keys
    and values by them, also after an expert of that name was replaced."""

    expert: Expert
    adapter: Any


class VllmEngine:
    """Base model and experts on vLLM.

    Args:
        base: the base model to load.
        config: its settings (dtype, context length).
        experts: most adapters in one step (vLLM's `max_loras`); vLLM reserves memory for each. More can be
            loaded; they then run in different steps.
        max_rank: highest LoRA rank of an adapter; vLLM reserves memory for it.
        threads: OpenMP threads on the CPU; None: all cores that this process may use.
        engine_args: vLLM's engine arguments, such as `tensor_parallel_size`, `gpu_memory_utilization`,
            `kv_cache_memory_bytes`, `quantization` or `max_num_seqs`.

    Raises:
        ServingError: vLLM is missing, of an unsupported version, or does not start.
    """

    def __init__(
        self,
        base: BaseModel,
        config: BaseModelConfig,
        *,
        experts: int = 16,
        max_rank: int = 64,
        threads: int | None = None,
        **engine_args: Any,
    ):
        if max_rank > RANKS[-1]:
            raise ServingError(f"max_rank is {max_rank}; vLLM supports adapters up to rank {RANKS[-1]}")
        self._max_rank = next(rank for rank in RANKS if rank >= max_rank)
        self.eos = _end_tokens(base.folder)
        self._experts: dict[str, _Loaded] = {}
        self._adapter_ids = itertools.count(1)
        self._request_ids = itertools.count()
        self._folders = Path(tempfile.mkdtemp(prefix="see-ray-adapters-"))
        arguments = {
            "model": str(base.folder),
            "dtype": str(dtype_of(config)).removeprefix("torch."),
            "max_model_len": context_length(base, config),
            "load_format": "safetensors",
            "disable_log_stats": True,
            "max_cpu_loras": max(experts, 64),
            **engine_args,
            "trust_remote_code": False,
            "skip_tokenizer_init": True,  # this engine knows token ids only
            "enable_lora": True,
            "max_loras": experts,
            "max_lora_rank": self._max_rank,
            "specialize_active_lora": False,  # would choose GPU kernels by adapters alone, not counting "none"
            "enable_prefix_caching": True,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        }
        set_environment(threads)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._wait(launch(arguments))
        except BaseException:
            self._stop_loop()
            raise
        self._block = self._llm.vllm_config.cache_config.block_size

    def check_health(self) -> None:
        """Raise ServingError if vLLM's processes have ended; this engine must then be created anew."""
        if self._llm.errored:
            raise ServingError("vLLM's processes have ended; their log says why")

    def close(self) -> None:
        """End vLLM's processes. Has no effect the second time."""
        if self._thread.is_alive():
            self._llm.shutdown()
            self._stop_loop()

    # --- experts ---------------------------------------------------------------------------

    def load(self, expert: Expert) -> None:
        """Add an expert; replaces one of the same name.

        Raises:
            ServingError: the adapter does not fit the base model, changes nothing, or does not share the base model's
                prefix. In the first two cases the answers would be the base model's, under the expert's name; in the
                last, each decision would prefill the whole prompt.
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
                f"the adapter of {expert.name} in {expert.folder} has rank {rank}, but this engine supports ranks "
                f"up to {self._max_rank}; start it with max_rank={rank}"
            )
        self._wait(self._load(expert))

    def unload(self, name: str) -> None:
        """Remove an expert. Answers of it that are in progress are finished."""
        loaded = self._expert(name)
        del self._experts[name]
        self._wait(self._llm.remove_lora(loaded.adapter.lora_int_id))

    async def _load(self, expert: Expert) -> None:
        from vllm.lora.request import LoRARequest

        adapter_id = next(self._adapter_ids)
        folder = await asyncio.to_thread(self._plain_lora, expert.folder, adapter_id)
        loaded = _Loaded(expert, LoRARequest(f"{expert.name}@{adapter_id}", adapter_id, str(folder)))
        try:
            await self._llm.add_lora(loaded.adapter)
            await self._check(loaded)
        except Exception as error:
            await self._llm.remove_lora(adapter_id)
            if isinstance(error, ServingError):
                raise
            raise ServingError(
                f"vLLM cannot load the adapter of {expert.name} in {expert.folder}: {last_line(error)}"
            ) from error
        former = self._experts.get(expert.name)
        self._experts[expert.name] = loaded
        if former is not None:
            await self._llm.remove_lora(former.adapter.lora_int_id)

    async def _check(self, loaded: _Loaded) -> None:
        """Check that the adapter fits, applies, and shares the base model's prefix."""
        description = f"the adapter of {loaded.expert.name} in {loaded.expert.folder}"
        by_worker = await self._llm.collective_rpc("see_ray_misfits", args=(loaded.adapter.lora_int_id,))
        # With pipeline parallelism each layer is on one worker only, and a misfit to all others.
        misfits = [text for text in by_worker[0] if all(text in others for others in by_worker)]
        if misfits:
            raise ServingError(
                f"{description} was fitted on another base model: {misfits[0]}"
                + (f" ({len(misfits)} such layers)" if len(misfits) > 1 else "")
            )
        activation = loaded.expert.activation
        generation_prompt, adapted_tokens = activation.generation_prompt, activation.tokens or 1
        prompt = [*generation_prompt] * (2 + (self._block + adapted_tokens) // len(generation_prompt))
        compared_ids = sorted({activation.accept, activation.refuse, *generation_prompt})

        async def probe(expert: _Loaded | None, **params: Any) -> Any:
            sampling = self._params(max_tokens=1, temperature=0.0, logprob_token_ids=compared_ids, **params)
            return await self._result(prompt, expert, sampling)

        base, adapted = [await probe(expert, skip_reading_prefix_cache=True) for expert in (None, loaded)]
        if base.outputs[0].logprobs == adapted.outputs[0].logprobs:
            raise ServingError(
                f"{description} changes nothing: the base model's probabilities stay what they are; fit it again"
            )
        if activation.tokens is None:
            return
        shared = (len(prompt) - adapted_tokens) // self._block * self._block
        for _ in range(3):  # a busy engine may have evicted the prefix in between
            await probe(None)
            if (await probe(loaded)).num_cached_tokens >= shared:
                return
        raise ServingError(f"{description} does not share the base model's prefix: vLLM runs without the plugin")

    def _plain_lora(self, folder: Path, adapter_id: int) -> Path:
        """A folder of the adapter without `alora_invocation_tokens`, which vLLM rejects and the plugin replaces."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not config.pop("alora_invocation_tokens", None):
            return folder.resolve()
        plain = self._folders / str(adapter_id)
        plain.mkdir()
        (plain / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (plain / "adapter_model.safetensors").symlink_to((folder / "adapter_model.safetensors").resolve())
        return plain

    # --- decisions and answers -----------------------------------------------------------

    async def decide(self, prompt: Sequence[int], experts: Sequence[str], *, fallback: bool = False) -> list[float]:
        """P(accept) of each named expert for a prompt (token ids). `fallback` has no effect: vLLM caches the prefix
        that the generalist continues from in any case."""
        return await asyncio.wrap_future(self._submit(self._decide(prompt, experts)))

    def decide_now(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        """As `decide`, blocking the calling thread."""
        return self._wait(self._decide(prompt, experts))

    def decide_batch(self, prompts: Sequence[Sequence[int]], expert: str) -> list[float]:
        """P(accept) of one expert for many prompts."""
        loaded = self._expert(expert)

        async def decide() -> list[float]:
            return list(await asyncio.gather(*(self._decision(prompt, loaded) for prompt in prompts)))

        return self._wait(decide())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Token, None]:
        """The tokens of an answer, one by one, without an end-of-turn token. An expert's follow its accept indicator,
        as in fitting."""
        loaded = None if request.expert is None else self._expert(request.expert)
        if request.sampling.max_tokens < 1:
            return
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[Token | BaseException | None]()

        async def pump() -> None:
            end: BaseException | None = None
            try:
                async for token in self._answer(request.prompt, loaded, request.sampling):
                    loop.call_soon_threadsafe(tokens.put_nowait, token)
            except Exception as error:
                end = error
            loop.call_soon_threadsafe(tokens.put_nowait, end)

        pumping = self._submit(pump())
        try:
            while (token := await tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            pumping.cancel()  # aborts the request in vLLM, if it is not finished

    async def export_prefix(self, prompt: Sequence[int]) -> PrefixArrays:
        """Not supported.

        Raises:
            ServingError: always.
        """
        raise ServingError(PREFIXES_STAY)

    def import_prefix(self, prompt: Sequence[int], arrays: PrefixArrays) -> None:
        """Not supported.

        Raises:
            ServingError: always.
        """
        raise ServingError(PREFIXES_STAY)

    # --- on vLLM's event loop ---------------------------------------------------------------

    async def _decide(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        # The first request prefills the prefix; vLLM shares its blocks with the others even within one step.
        loaded = [self._expert(name) for name in experts]
        return list(await asyncio.gather(*(self._decision(prompt, expert) for expert in loaded)))

    async def _decision(self, prompt: Sequence[int], loaded: _Loaded) -> float:
        activation = loaded.expert.activation
        pair = [activation.accept, activation.refuse]
        params = self._params(max_tokens=1, temperature=0.0, allowed_token_ids=pair, logprob_token_ids=pair)
        output = await self._result(prompt, loaded, params)
        logprobs = output.outputs[0].logprobs[0]
        return p_accept(logprobs[activation.accept].logprob, logprobs[activation.refuse].logprob)

    async def _answer(
        self, prompt: Sequence[int], loaded: _Loaded | None, sampling: SamplingParams
    ) -> AsyncIterator[Token]:
        from vllm.sampling_params import RequestOutputKind

        eos: frozenset[int] = frozenset() if sampling.ignore_eos else self.eos
        params = self._params(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=sorted(eos),
            output_kind=RequestOutputKind.DELTA,
        )
        forced = [] if loaded is None else [loaded.expert.activation.accept]
        async for output in self._outputs(prompt, loaded, params, forced):
            delta = output.outputs[0]
            for position, token in enumerate(delta.token_ids):
                if token not in eos:
                    yield _token(token, delta.logprobs[position] if delta.logprobs else None, sampling.logprobs)

    async def _result(self, prompt: Sequence[int], loaded: _Loaded | None, params: Any) -> Any:
        """vLLM's last output for a request."""
        last = None
        async for output in self._outputs(prompt, loaded, params):
            last = output
        return last

    async def _outputs(
        self, prompt: Sequence[int], loaded: _Loaded | None, params: Any, forced: Sequence[int] = ()
    ) -> AsyncIterator[Any]:
        """vLLM's outputs for a prompt followed by the `forced` first tokens of the answer."""
        from vllm.exceptions import VLLMClientError, VLLMServerError

        if loaded is not None and loaded.expert.activation.tokens is not None:
            # Counted from the end of the prompt, as in fitting, not from the end of the forced tokens.
            params.extra_args = {ACTIVATION_POINT: len(prompt) - loaded.expert.activation.tokens}
        request_id = f"see-{next(self._request_ids)}"
        adapter = None if loaded is None else loaded.adapter
        outputs = self._llm.generate(
            {"prompt_token_ids": [*prompt, *forced]}, params, request_id=request_id, lora_request=adapter
        )
        try:
            async for output in outputs:
                if output.outputs[0].finish_reason == "error":
                    raise ServingError(f"vLLM aborted request {request_id}; its log says why")
                yield output
        except (VLLMClientError, ValueError) as error:
            raise ServingError(f"vLLM rejects the request: {last_line(error)}") from error
        except VLLMServerError as error:
            cause = error.__cause__ or error
            raise ServingError(f"vLLM cannot answer: {last_line(cause)}; its log says more") from error
        finally:
            await outputs.aclose()

    def _params(self, **params: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(detokenize=False, **params)

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
        """Cancel what still runs on the event loop's thread, end the thread and close the loop."""
        with contextlib.suppress(TimeoutError):
            self._submit(_cancel_other_tasks()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()
        shutil.rmtree(self._folders, ignore_errors=True)


def _end_tokens(folder: Path) -> frozenset[int]:
    """End-of-turn token ids in a base model's folder."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            eos = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if eos is not None:
                return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def _token(token: int, logprobs: dict[int, Any] | None, count: int | None) -> Token:
    """A token with vLLM's log-probabilities, which are those of the `count` likeliest tokens and of the sampled one."""
    if logprobs is None or count is None:
        return Token(token)
    ranked = sorted(((other, entry.logprob) for other, entry in logprobs.items()), key=lambda pair: -pair[1])
    return Token(token, logprobs[token].logprob, tuple(ranked[:count]))


async def _cancel_other_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
