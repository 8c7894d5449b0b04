"""The model with its adapters and memory, and the execution of scheduled batches on it.

All methods run on the engine's worker thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from see_ray.config import BaseModelConfig
from see_ray.engine.expert_registry import LoadedExpert
from see_ray.engine.forward_batch import DecisionRows, DecodeStep, PrefillChunk, run_batch
from see_ray.engine.kernels import fastest_kernels
from see_ray.engine.kv_cache import KVCache
from see_ray.engine.lora import AdapterBank
from see_ray.engine.requests import GenerationRequest
from see_ray.engine.scheduler import ScheduledBatch
from see_ray.errors import ServingError
from see_ray.models.activation import p_accept
from see_ray.models.attention_override import supports_packing
from see_ray.models.base_model import BaseModel, load_model
from see_ray.models.prefix_kv import Prefix, logits_of

EMPTY = Prefix((), (0,))


class ModelRunner:
    """The base model, the experts' adapters, and memory for keys and values.

    Args:
        base: the base model to load.
        config: its settings.
        device: `cpu` or a CUDA device.
        kv_gb: gigabytes for keys and values of running requests.

    Raises:
        ServingError: the model's attention cannot be replaced by the engine's.
    """

    def __init__(self, base: BaseModel, config: BaseModelConfig, device: str, kv_gb: float):
        self.model = load_model(base, config, device)
        if not supports_packing(self.model):
            raise ServingError(
                f"{base.name} does not use transformers' attention interface with SDPA, which the embedded engine needs"
            )
        eos = self.model.generation_config.eos_token_id
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        self.adapters = AdapterBank(self.model)
        chunk = PrefillChunk(EMPTY, (0,))
        self.forward([chunk], [])
        self.example_kv = chunk.prefix.layers  # of one token: heads, head size, dtype and device
        # Measured, since not every configuration gives it: keys and values may have different head sizes.
        bytes_per_token = sum(tensor.nbytes for pair in self.example_kv for tensor in pair)
        max_tokens = int(kv_gb * 1e9 / bytes_per_token)
        self.kv_cache = KVCache(max_tokens, self.example_kv)
        self._base_logits: dict[tuple[tuple[int, ...], int], Tensor] = {}  # by probe and number of adapted tokens

    # --- adapters ------------------------------------------------------------------------------

    def load_adapter(self, expert: LoadedExpert) -> None:
        """Add an expert's adapter, and set its index.

        Raises:
            ServingError: the adapter does not fit the base model, or does not change its logits.
        """
        folder, activation = expert.expert.folder, expert.expert.activation
        self.adapters.add(expert.key, folder)
        expert.adapter = self.adapters.index(expert.key)
        probe = activation.generation_prompt * 2
        key = (probe, expert.num_adapted)
        if key not in self._base_logits:
            self._base_logits[key] = self.prompt_logits(probe, expert, adapter=0)
        if torch.equal(self._base_logits[key], self.prompt_logits(probe, expert, expert.adapter)):
            self.adapters.remove(expert.key)
            raise ServingError(
                f"the adapter of {expert.name} in {folder} changes nothing: all its updates are zero; fit it again"
            )

    def delete_adapters(self, experts: Iterable[LoadedExpert]) -> None:
        for expert in experts:
            self.adapters.remove(expert.key)

    # --- steps ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> None:
        """Start waiting answers for which there is a slot, then run the step. Its results are stored in the batch."""
        self.delete_adapters(batch.released)
        for request in batch.waiting:
            if not request.finished and not self._start(request):
                break
        steps = [request.next_step() for request in batch.running]
        self.forward(batch.chunks, steps)
        if steps:
            logits = self.logits(torch.stack([step.hidden for step in steps]))
            # In float32: argmax in bfloat16 takes four times as long on a CPU.
            likeliest = logits.float().argmax(-1).tolist()
            for request, row, token_id in zip(batch.running, logits, likeliest, strict=True):
                request.sample(row, token_id, self.eos)
        for decision in batch.decisions:
            decision.p_accept = self.p_accept(decision.rows, decision.experts)

    def _start(self, request: GenerationRequest) -> bool:
        """Give an answer its slot, and sample its first token where it follows the decision row. False: no room."""
        slot = self.kv_cache.allocate(request.max_length)
        if slot is None:
            return False
        request.start(slot)
        if request.decision.answer_follows:
            logits = self.logits(request.decision.last_hidden[None])[0]
            request.sample(logits, int(logits.float().argmax()), self.eos)
        return True

    def decide(self, prompts: Sequence[Sequence[int]], expert: LoadedExpert) -> list[float]:
        """P(accept) of an expert for some prompts, in one forward."""
        chunks = [_whole_prompt(prompt, expert, expert.adapter) for prompt in prompts]
        self.forward(chunks, [])
        return [self.p_accept(chunk.decision_rows[0], [expert])[0] for chunk in chunks]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[PrefillChunk], steps: Sequence[DecodeStep]) -> None:
        """Run one forward; see `engine.forward_batch`."""
        if steps or any(chunk.num_tokens for chunk in chunks):
            run_batch(self.model, self.adapters, chunks, steps)

    # --- logits --------------------------------------------------------------------------------

    @torch.inference_mode()
    def p_accept(self, rows: DecisionRows, experts: Sequence[LoadedExpert | None]) -> list[float]:
        """P(accept) of each row, 0 for the generalist. Computes the logits of the experts' indicators only."""
        if all(expert is None for expert in experts):
            return [0.0] * len(experts)
        last_of_prompt = next(expert.num_adapted for expert in experts if expert) - 1
        activations = [expert.expert.activation if expert else None for expert in experts]
        indicators = sorted({token for point in activations if point for token in (point.accept, point.refuse)})
        logits = logits_of(self.model, rows.hidden[:, last_of_prompt], indicators).float().tolist()
        return [
            p_accept(row[indicators.index(point.accept)], row[indicators.index(point.refuse)]) if point else 0.0
            for point, row in zip(activations, logits, strict=True)
        ]

    @torch.inference_mode()
    def prompt_logits(self, prompt: Sequence[int], expert: LoadedExpert, adapter: int) -> Tensor:
        """Logits [vocabulary] after a prompt; the adapter `adapter` applies from `expert`'s activation point on."""
        chunk = _whole_prompt(prompt, expert, adapter)
        self.forward([chunk], [])
        return self.logits(chunk.decision_rows[0].hidden[0, -1:])[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] of hidden states [rows, hidden size]."""
        with fastest_kernels(self.model, len(hidden)):
            return logits_of(self.model, hidden)


def _whole_prompt(prompt: Sequence[int], expert: LoadedExpert, adapter: int) -> PrefillChunk:
    """A whole prompt as one chunk, with the decision row of one expert."""
    token_ids = tuple(prompt)
    rows = DecisionRows(len(token_ids) - expert.num_adapted, token_ids[-expert.num_adapted :], (adapter,))
    return PrefillChunk(EMPTY, token_ids[:-1], adapter if expert.full_form else 0, (rows,))
