"""What each step of the engine runs: one token of every running answer, prefill chunks, and the experts' decisions.

Requests join and leave between two steps. The number of tokens of a step is bounded: a long prompt is prefilled in
chunks over several steps, so that running answers do not stall.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from see_ray.engine.expert_registry import ExpertRegistry, LoadedExpert
from see_ray.engine.forward_batch import DecisionRows, PrefillChunk
from see_ray.engine.kv_cache import KVCache
from see_ray.engine.prefix_cache import CachedPrompt, DecisionRow, PrefixCache
from see_ray.engine.requests import GenerationRequest, PrefillRequest, unloaded_error

MAX_NUM_SEQS = 64
"""Most answers that decode in one step. Others decode in the next."""

MIN_PREFILL_CHUNK = 32
"""Fewest tokens of a prompt that are prefilled in a step with other work, unless fewer are left."""


@dataclass(eq=False)
class ScheduledDecision:
    """Decision rows of a step: for which prompt, of which experts, and their results.

    Attributes:
        prompt: that the rows continue.
        rows: as they go through the model.
        experts: of each row; None is the generalist.
        with_indicator: the rows end with the experts' accept indicators.
        p_accept: of each row, after the step; 0 for the generalist.
    """

    prompt: CachedPrompt
    rows: DecisionRows
    experts: list[LoadedExpert | None]
    with_indicator: bool
    p_accept: list[float] = field(default_factory=list)


@dataclass(eq=False)
class ScheduledBatch:
    """One step.

    Attributes:
        waiting: answers to start as far as there are slots, before the forward.
        running: answers that decode one token.
        released: experts whose adapters are deleted before the forward.
        prefills: requests whose prompts are prefilled.
        chunks: the tokens of each of them.
        decisions: the decision rows of the chunks.
    """

    waiting: list[GenerationRequest]
    running: list[GenerationRequest]
    released: list[LoadedExpert]
    prefills: list[PrefillRequest] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)
    decisions: list[ScheduledDecision] = field(default_factory=list)


class Scheduler:
    """Queues of requests, and what the next step runs of them.

    Methods run on the event loop's thread, except `add_expert` and `remove_expert`, which may run on any.

    Args:
        prefix_cache: prompts that were prefilled.
        kv_cache: from which finished answers free their slots.
        max_num_batched_tokens: most tokens of a step.
        on_stats: is called with ("rows", number of running answers) after each step that has any.
    """

    def __init__(
        self,
        prefix_cache: PrefixCache,
        kv_cache: KVCache,
        max_num_batched_tokens: int,
        on_stats: Callable[[str, float], None],
    ):
        self.experts = ExpertRegistry()
        self.prefills: list[PrefillRequest] = []
        self.waiting: list[GenerationRequest] = []  # for a slot
        self.running: list[GenerationRequest] = []
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_cache, self.kv_cache = prefix_cache, kv_cache
        self._on_stats = on_stats
        self._lock = threading.Lock()  # of the queues and the registry
        self._num_steps = self._num_tokens = self._num_started = 0

    @property
    def has_requests(self) -> bool:
        return bool(self.prefills or self.waiting or self.running)

    def stats(self) -> dict[str, float]:
        """Counts since the start, and current sizes."""
        return {
            "num_steps": self._num_steps,
            "num_tokens": self._num_tokens,
            "num_started": self._num_started,
            "num_running": len(self.running),
            "num_waiting": len(self.prefills) + len(self.waiting),
            "prefix_cache_queries": self.prefix_cache.queries,
            "prefix_cache_hits": self.prefix_cache.hits,
            "kv_cache_allocated_tokens": self.kv_cache.allocated_tokens,
            "kv_cache_max_tokens": self.kv_cache.max_tokens,
        }

    # --- requests and experts ----------------------------------------------------------------

    def add_prefill(self, request: PrefillRequest) -> None:
        self.prefills.append(request)

    def add_generation(self, request: GenerationRequest) -> None:
        """Raises ServingError if the expert's adapter is gone."""
        with self._lock:
            if request.expert is not None and request.expert.released:
                raise unloaded_error(request.expert)
            self.waiting.append(request)

    def add_expert(self, expert: LoadedExpert) -> None:
        """Make an expert available. One of the same name is removed."""
        with self._lock:
            self.experts.add(expert)
            self.prefix_cache.invalidate(expert.name)

    def remove_expert(self, name: str) -> list[LoadedExpert]:
        """Remove an expert. Returns the experts whose adapters can be deleted now.

        Raises:
            ServingError: there is no expert of that name.
        """
        with self._lock:
            self.experts.remove(name)
            self.prefix_cache.invalidate(name)
            return self._release_experts()

    def _release_experts(self) -> list[LoadedExpert]:
        return self.experts.release({request.expert for request in (*self.waiting, *self.running)})

    # --- before a step -------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch:
        """What the next step runs."""
        with self._lock:
            for request in self.prefills:
                removed = [expert for expert in request.experts if expert and not self.experts.is_current(expert)]
                if removed:
                    request.fail(unloaded_error(removed[0]))
            self.prefills = [request for request in self.prefills if not request.done.done()]
            running = [request for request in self.running if not request.finished][:MAX_NUM_SEQS]
            batch = ScheduledBatch(list(self.waiting), running, self._release_experts())
            self._schedule_prefills(batch)
            return batch

    def _schedule_prefills(self, batch: ScheduledBatch) -> None:
        token_budget = self.max_num_batched_tokens - len(batch.running)
        alone = not batch.running and len(self.prefills) == 1
        scheduled: set[int] = set()
        for request in self.prefills:
            if token_budget <= 0:
                break
            if id(request.prompt) in scheduled:
                continue  # requests of one prompt: the second uses what the first has prefilled
            scheduled.add(id(request.prompt))
            remaining = request.prompt.num_uncached
            too_short = token_budget < min(MIN_PREFILL_CHUNK, remaining)
            if too_short and (batch.chunks or batch.running):
                break
            token_budget -= self._schedule_prefill(batch, request, token_budget, alone)

    def _schedule_prefill(self, batch: ScheduledBatch, request: PrefillRequest, token_budget: int, alone: bool) -> int:
        """Add a request's next chunk, with decision rows if it is the last one. Returns their number of tokens."""
        prompt = request.prompt
        start, remaining = prompt.num_cached, prompt.num_uncached
        token_ids = prompt.token_ids[start : start + min(remaining, token_budget)]
        decisions: list[ScheduledDecision] = []
        if len(token_ids) == remaining:
            pending = request.pending()
            # Beside other requests only a single row runs its indicator: otherwise it costs more than it saves.
            max_indicator_rows = request.max_indicator_rows if alone else min(request.max_indicator_rows, 1)
            experts = pending[: max(token_budget - remaining, MIN_PREFILL_CHUNK)]
            decisions = _decision_rows(prompt, experts, with_indicator=len(pending) <= max_indicator_rows)
        owner = self.experts.find(prompt.owner)
        rows = tuple(decision.rows for decision in decisions)
        chunk = PrefillChunk(prompt.prefix, token_ids, owner.adapter if owner else 0, rows)
        batch.prefills.append(request)
        batch.chunks.append(chunk)
        batch.decisions += decisions
        return chunk.num_tokens

    # --- after a step --------------------------------------------------------------------------

    def process_outputs(self, batch: ScheduledBatch, error: BaseException | None = None) -> None:
        """Store what a step has computed, hand it to the requests, and remove those that have ended.

        Args:
            batch: the step, executed.
            error: that it failed with: all its requests fail.
        """
        with self._lock:
            if error is None:
                self._count(batch)
                self._store_results(batch)
                for prefill in self.prefills:
                    if not prefill.done.done() and not prefill.pending():
                        prefill.done.set_result(None)
            else:
                for prefill in batch.prefills:
                    prefill.fail(error)
                for request in (*batch.running, *batch.waiting):
                    request.fail(error)
            self._update_queues(batch.running)
            self.prefix_cache.evict()

    def _count(self, batch: ScheduledBatch) -> None:
        self._num_steps += 1
        self._num_tokens += len(batch.running) + sum(chunk.num_tokens for chunk in batch.chunks)
        if batch.running:
            self._on_stats("rows", len(batch.running))

    def _store_results(self, batch: ScheduledBatch) -> None:
        for request, chunk in zip(batch.prefills, batch.chunks, strict=True):
            if chunk.prefix.lengths[0] > request.prompt.num_cached:
                request.prompt.prefix = chunk.prefix
        for decision in batch.decisions:
            for index, (expert, p_accept) in enumerate(zip(decision.experts, decision.p_accept, strict=True)):
                if expert is None:
                    decision.prompt.decisions[None] = DecisionRow(decision.rows, index, None, answer_follows=True)
                elif self.experts.is_current(expert):
                    row = DecisionRow(decision.rows, index, p_accept, decision.with_indicator)
                    decision.prompt.decisions[expert.name] = row

    def _update_queues(self, decoded: Sequence[GenerationRequest]) -> None:
        started = [request for request in self.waiting if request.slot is not None]
        self._num_started += len(started)
        self.waiting = [request for request in self.waiting if request.slot is None and not request.finished]
        # Answers that have decoded are queued after those that have not.
        skipped = [request for request in self.running if request not in decoded]
        self.running = [*skipped, *decoded, *started]
        for request in self.running:
            request.flush()
            if request.finished and request.slot is not None:
                self.kv_cache.free(request.slot)
                request.slot = None
        self.running = [request for request in self.running if not request.finished]


def _decision_rows(
    prompt: CachedPrompt, experts: Iterable[LoadedExpert | None], with_indicator: bool
) -> list[ScheduledDecision]:
    """Group experts whose rows have the same tokens."""
    groups: dict[tuple[int, tuple[int, ...]], list[LoadedExpert | None]] = {}
    # In the order of their adapters: consecutive ones are used in place, see `engine.lora`.
    for expert in sorted(experts, key=lambda expert: expert.adapter if expert else 0):
        num_adapted = expert.num_adapted if expert else 1
        indicator = (expert.expert.activation.accept,) if expert and with_indicator else ()
        token_ids = (*prompt.token_ids[-num_adapted:], *indicator)
        groups.setdefault((len(prompt.token_ids) - num_adapted, token_ids), []).append(expert)
    return [
        ScheduledDecision(
            prompt,
            DecisionRows(prefix_length, token_ids, tuple(expert.adapter if expert else 0 for expert in members)),
            members,
            with_indicator,
        )
        for (prefix_length, token_ids), members in groups.items()
    ]
