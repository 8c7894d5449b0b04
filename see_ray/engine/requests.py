"""Requests to the embedded engine: a prompt to prefill and decide on, and an answer to generate."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
from torch import Tensor

from see_ray.engine.expert_registry import LoadedExpert
from see_ray.engine.forward_batch import DecodeStep
from see_ray.engine.interface import SamplingParams, Token
from see_ray.engine.kv_cache import KVCacheSlot
from see_ray.engine.prefix_cache import CachedPrompt, DecisionRow
from see_ray.engine.sampling import sample_token, with_logprobs
from see_ray.errors import ServingError


def expert_name(expert: LoadedExpert | None) -> str | None:
    """None is the generalist's."""
    return None if expert is None else expert.name


def unloaded_error(expert: LoadedExpert | None) -> ServingError:
    """The error of a request whose expert was unloaded before it ran."""
    return ServingError(f"the expert {expert_name(expert)} was unloaded before this request had run; send it again")


@dataclass(eq=False)
class PrefillRequest:
    """A prompt to prefill, and the experts whose decision rows are to run after it.

    Attributes:
        prompt: where the results are stored.
        experts: None is the generalist, who decides nothing but may answer.
        max_indicator_rows: up to this many experts, each also runs its accept indicator, so that the first token of
            the answer is known with the decision.
        done: set when the results are there.
    """

    prompt: CachedPrompt
    experts: list[LoadedExpert | None]
    max_indicator_rows: int
    done: asyncio.Future[None]

    def pending(self) -> list[LoadedExpert | None]:
        """The experts whose rows have not run."""
        return [expert for expert in self.experts if expert_name(expert) not in self.prompt.decisions]

    def fail(self, error: BaseException) -> None:
        """Fail this request: its waiting coroutine raises the error."""
        if not self.done.done():
            self.done.set_exception(error)


class GenerationRequest:
    """An answer to generate.

    Args:
        expert: whose answer; None: the generalist's.
        prompt: prefilled, and not evicted while the request waits.
        decision: the expert's row after the prompt, from which the answer continues.
        sampling: how tokens are chosen.

    Attributes:
        max_length: most tokens of prompt, indicator and answer.
        slot: keys and values, once there is room for them.
        outputs: tokens, then None; or an error. Read on the event loop.
        finished: the answer has ended, failed or was abandoned.
    """

    def __init__(
        self, expert: LoadedExpert | None, prompt: CachedPrompt, decision: DecisionRow, sampling: SamplingParams
    ):
        self.expert, self.prompt, self.decision = expert, prompt, decision
        self.max_length = max_length(len(prompt.token_ids), sampling)
        self.slot: KVCacheSlot | None = None
        self.outputs: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()
        self.finished = False
        self._sampling = sampling
        self._tokens_left = sampling.max_tokens
        self._next_token = -1  # sampled, but not run
        self._new_outputs: list[Token | None] = []
        self._generator = torch.Generator()
        if sampling.temperature > 0:
            self._generator.manual_seed(sampling.seed) if sampling.seed is not None else self._generator.seed()

    def start(self, slot: KVCacheSlot) -> None:
        """Copy the keys and values of the prompt and of the decision row into the slot. Unless the answer follows the
        row, run the accept indicator next."""
        rows = self.decision.rows
        if rows.prefix_length:
            slot.append(self.prompt.prefix.cut(rows.prefix_length).layers)
        slot.append(rows.layers, self.decision.index)
        self.slot = slot
        if not self.decision.answer_follows:
            assert self.expert is not None, "the generalist has no indicator"
            self._next_token = self.expert.expert.activation.accept

    def next_step(self) -> DecodeStep:
        """The decode step that runs the token sampled last."""
        assert self.slot is not None, "the request has not started"
        return DecodeStep(self._next_token, self.expert.adapter if self.expert else 0, self.slot)

    def sample(self, logits: Tensor, likeliest: int, eos: frozenset[int]) -> None:
        """Sample the next token, or finish.

        Args:
            logits: [vocabulary].
            likeliest: the token with the highest logit.
            eos: tokens that end an answer.
        """
        params = self._sampling
        if self._tokens_left > 0:
            greedy = params.temperature == 0
            self._next_token = likeliest if greedy else sample_token(logits, params, self._generator)
        if self._tokens_left <= 0 or (self._next_token in eos and not params.ignore_eos):
            self._finish()
            return
        self._tokens_left -= 1
        self._new_outputs.append(with_logprobs(self._next_token, logits, params.logprobs))
        if self._tokens_left == 0:
            self._finish()

    def flush(self) -> None:
        """Put new outputs into the queue. On the event loop's thread, since asyncio queues are not thread-safe."""
        for output in self._new_outputs:
            self.outputs.put_nowait(output)
        self._new_outputs.clear()

    def fail(self, error: BaseException) -> None:
        """End the answer with an error. On the event loop's thread."""
        self.finished = True
        self.outputs.put_nowait(error)

    def _finish(self) -> None:
        self._new_outputs.append(None)
        self.finished = True


def max_length(prompt_length: int, sampling: SamplingParams) -> int:
    """Most tokens of a request: prompt, accept indicator and answer."""
    return prompt_length + 1 + sampling.max_tokens
