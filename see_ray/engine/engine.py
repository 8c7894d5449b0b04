"""The embedded engine: decisions and answers on transformers and PyTorch, in this process.

It holds the base model once and any number of experts beside it (`engine.adapters`). Requests share forward
passes (`engine.passes`): each pass reads on in prompts that have arrived, lets all experts that are asked
decide where a prompt ends, and takes one more token of every answer in progress, whoever gives it. A request
joins between two passes; one that is finished or given up leaves. No token of a prompt is read twice: decision,
answer and generalist go on from the same keys and values (`engine.prompts`), and answers are written in slots
of bounded memory (`engine.slots`).

PyTorch runs on one worker thread, one pass at a time; loading, too: each thread that computes has OpenMP threads of
its own, and where there are more of these than cores they sleep between two operations instead of waiting awake,
which makes small operations many times slower. The engine knows token ids only; text is `engine.text`'s
business.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from see_ray.config import BaseModelConfig
from see_ray.engine.forward_batch import DecisionRows, DecodeStep, PrefillChunk, run
from see_ray.engine.interface import Expert, GenerateRequest, Token
from see_ray.engine.kernels import kernels
from see_ray.engine.kv_cache import SlotPool, bytes_per_token, of_tokens
from see_ray.engine.lora import AdapterBank
from see_ray.engine.prefix_cache import PrefixCache, Row
from see_ray.engine.requests import GenerationRequest, Loaded
from see_ray.engine.turns import PrefillRequest, ScheduledBatch, left_error, name_of
from see_ray.errors import ServingError
from see_ray.models.activation import p_accept
from see_ray.models.attention_override import supports_packing
from see_ray.models.base_model import BaseModel, load_model
from see_ray.models.prefix_kv import Prefix, logits_of

T = TypeVar("T")

STEP_ROWS = 64
"""Answers that one pass goes on with at most; the others take the next turn."""

FEED_AT_MOST = 16
"""Experts that are asked at once up to which each also reads its accept indicator, if an answer is to follow and
nothing else is going on: the answer's first token is then known with the decision, for less than what a pass of its
own would cost. Beside other answers the winner alone reads it, with their next tokens."""

SHORT = 32
"""Tokens of a prompt that are not worth a part in a pass, if the rest does not fit."""


class EmbeddedEngine:
    """Base model, experts, prompts that were read, and answers in progress.

    Args:
        base: the base model to load.
        config: its settings (dtype).
        device: `cpu` or a CUDA device; None takes a GPU if there is one.
        prefix_tokens: prompts of at most this many tokens in all are kept; the last one always is.
        kv_gb: gigabytes for keys and values of answers in progress; those that do not fit wait.
        max_num_batched_tokens: most tokens of a pass; a longer prompt is read in several, so that answers in progress
            do not stand still meanwhile.
        nice: added to the niceness of the thread that computes, so that what is short and urgent on the same cores
            (taking requests, refusing them) goes first.
        told: hears of prompt tokens that were found read (`hit`) or not (`miss`), and of the answers that a pass
            goes on with (`rows`).

    Raises:
        ServingError: the model's attention cannot be run packed.
    """

    def __init__(
        self,
        base: BaseModel,
        config: BaseModelConfig,
        *,
        device: str | None = None,
        prefix_tokens: int = 8192,
        kv_gb: float = 4.0,
        max_num_batched_tokens: int = 512,
        nice: int = 0,
        told: Callable[[str, float], None] = lambda what, value: None,
    ):
        # On Linux a thread has a niceness of its own, which the threads that it starts inherit, OpenMP's, too;
        # elsewhere it is the whole process's.
        nice = nice if sys.platform == "linux" else 0
        self._thread = ThreadPoolExecutor(1, "engine", initializer=os.nice, initargs=(nice,))
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self._on_thread(lambda: load_model(base, config, chosen))
        if not supports_packing(self.model):
            raise ServingError(
                f"{base.name} does not take transformers' attention interface, which the embedded engine needs"
            )
        eos = self.model.generation_config.eos_token_id
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        self._bank = AdapterBank(self.model)
        self._unchanged: dict[tuple[tuple[int, ...], int], Tensor] = {}  # the base model's logits, to compare with
        self._experts: dict[str, Loaded] = {}
        self._leaving: list[Loaded] = []
        self._prompts = PrefixCache(prefix_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._told = told
        self._asks: list[PrefillRequest] = []
        self._begun: list[GenerationRequest] = []  # wait for a slot
        self._answers: list[GenerationRequest] = []
        self._worker: asyncio.Task[None] | None = None
        self._lock = threading.Lock()  # of what both the event loop's and the worker's thread change
        self._like = self._on_thread(lambda: self._read_now([0], 0).layers)
        self._pool = SlotPool(int(kv_gb * 1e9 / bytes_per_token(self._like)))
        self._numbers = {"passes": 0, "tokens": 0, "answers": 0}

    # --- experts ---------------------------------------------------------------------------

    def load(self, expert: Expert) -> None:
        """Add an expert, in the place of one of the same name. Requests go on meanwhile.

        Raises:
            ServingError: its adapter does not fit the base model, or changes nothing. Either
                would make the base model answer in the expert's name.
        """
        loaded = Loaded(expert)
        self._on_thread(lambda: self._add(loaded))
        with self._lock:
            self._part_from(expert.name)
            self._experts[expert.name] = loaded

    def _add(self, loaded: Loaded) -> None:
        expert, probe = loaded.expert, loaded.expert.activation.generation_prompt * 2
        self._bank.add(loaded.key, expert.folder)
        loaded.slot = self._bank.slot(loaded.key)
        if (probe, loaded.adapted) not in self._unchanged:
            self._unchanged[probe, loaded.adapted] = self._logits(probe, loaded, 0)
        if torch.equal(self._unchanged[probe, loaded.adapted], self._logits(probe, loaded, loaded.slot)):
            self._bank.remove(loaded.key)
            raise ServingError(
                f"the adapter of {expert.name} in {expert.folder} changes nothing: all its updates are zero; "
                "fit it again"
            )

    def unload(self, name: str) -> None:
        """Forget an expert; answers that it has begun are finished."""
        self._expert(name)
        with self._lock:
            self._part_from(name)
            gone = self._take_leave()
        self._on_thread(lambda: self._clear(gone))

    def _part_from(self, name: str) -> None:
        if name in self._experts:
            self._leaving.append(self._experts.pop(name))
            self._prompts.forget(name)

    def _take_leave(self) -> list[Loaded]:
        """Experts that have left and whose last answer has ended; under the lock."""
        busy = {answer.expert for answer in (*self._begun, *self._answers)}
        gone = [loaded for loaded in self._leaving if loaded not in busy]
        for loaded in gone:
            loaded.gone = True
            self._leaving.remove(loaded)
        return gone

    def _clear(self, gone: Sequence[Loaded]) -> None:
        for loaded in gone:
            self._bank.remove(loaded.key)

    @property
    def experts(self) -> list[str]:
        """Names of the experts that it holds."""
        return list(self._experts)

    def figures(self) -> dict[str, float]:
        """What the engine does, for metrics: counts since its start, and how things are now."""
        return {
            **self._numbers,
            "prefix_tokens_wanted": self._prompts.wanted,
            "prefix_tokens_found": self._prompts.found,
            "answering": len(self._answers),
            "waiting": len(self._asks) + len(self._begun),
            "kv_tokens_reserved": self._pool.reserved,
            "kv_tokens": self._pool.tokens,
        }

    # --- decisions and answers -----------------------------------------------------------

    async def decide(self, prompt: Sequence[int], experts: Sequence[str], *, fallback: bool = False) -> list[float]:
        """P(accept) of each named expert for one prompt (token ids), all in one batch.

        Args:
            prompt: token ids up to and including the generation prompt.
            experts: who is asked.
            fallback: an answer is to follow here, and be it the generalist's, who is made ready, too.
        """
        loaded = [self._expert(name) for name in experts]
        feed = FEED_AT_MOST if fallback else 0
        own = [self._ask(prompt, [one], feed) for one in loaded if one.full]
        shared: list[Loaded | None] = [one for one in loaded if not one.full]
        if shared or fallback:
            own.append(self._ask(prompt, [*shared, None] if fallback else shared, feed))
        rows: dict[str | None, Row] = {}
        for found in await asyncio.gather(*own):
            rows |= found
        return [float(rows[name].p_accept or 0) for name in experts]

    def decide_batch(self, prompts: Sequence[Sequence[int]], expert: str, most: int = 2048) -> list[float]:
        """P(accept) of one expert for many prompts, `most` tokens a pass; not beside other requests."""
        loaded = self._expert(expert)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result = [0.0] * len(prompts)
        while order:
            batch, tokens = [order.pop()], 0
            while order and (tokens := tokens + len(prompts[batch[-1]])) + len(prompts[order[-1]]) <= most:
                batch.append(order.pop())
            reads = [self._whole(prompts[i], loaded, loaded.slot) for i in batch]
            self._on_thread(lambda reads=reads: self._pass(reads, []))  # type: ignore[misc]
            for i, read in zip(batch, reads, strict=True):
                result[i] = self._decisions(read.branches[0], [loaded])[0]
        return result

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Token]:
        """Tokens of an answer, one by one; ends before an end-of-turn token.

        An expert's answer starts after its accept indicator, as it was fitted.

        Raises:
            ServingError: no such expert, or a longer answer than there is memory for.
        """
        prompt, expert, max_tokens = request.prompt, request.expert, request.sampling.max_tokens
        loaded = None if expert is None else self._expert(expert)
        length = len(prompt) + 1 + max_tokens
        if not self._pool.fits(length):
            raise ServingError(
                f"an answer of {max_tokens} tokens to a prompt of {len(prompt)} needs more memory for keys and values "
                f"than there is ({self._pool.tokens} tokens); ask for fewer, or raise serve.kv_gb"
            )
        answer = GenerationRequest(loaded, length, request.sampling)
        # The prompt is held from here on, so that what was read of it for the decision is there for the answer.
        kept = self._prompts.get(prompt, loaded.name if loaded and loaded.full else None)
        kept.users += 1
        try:
            answer.row = (await self._ask(prompt, [loaded], feed=1))[expert]
            answer.prompt = kept
            with self._lock:
                if loaded and loaded.gone:
                    raise left_error(loaded)
                self._begun.append(answer)
            self._wake()
            while (token := await answer.tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            answer.over = True
            kept.users -= 1

    async def read(self, prompt: Sequence[int]) -> list[Any]:
        """Keys and values of a prompt as the base model reads it, as arrays for :meth:`adopt`."""
        await self._ask(prompt, [None], feed=0)
        prefix = self._prompts.get(tuple(prompt), None).prefix
        return await asyncio.get_running_loop().run_in_executor(self._thread, prefix.arrays)

    def adopt(self, prompt: Sequence[int], arrays: Sequence[Any]) -> None:
        """Take over what another engine of the same base model has read of a prompt."""
        if arrays:
            self._prompts.put(tuple(prompt), None, Prefix.of_arrays(arrays, self._like[0][0]))

    async def _ask(self, prompt: Sequence[int], who: Sequence[Loaded | None], feed: int) -> dict[str | None, Row]:
        """Have somebody go on from a prompt (None is the generalist); see :class:`PrefillRequest` for `feed`."""
        owner = who[0].name if who and who[0] is not None and who[0].full else None
        kept = self._prompts.get(tuple(prompt), owner)
        self._told("hit", kept.prefix.lengths[0])
        self._told("miss", kept.left)
        kept.users += 1
        ask = PrefillRequest(kept, list(who), feed, asyncio.get_running_loop().create_future())
        try:
            if ask.missing():
                self._asks.append(ask)
                self._wake()
                await ask.done
            if missing := ask.missing():
                raise left_error(missing[0])
            return {name: kept.rows[name] for name in map(name_of, who)}
        finally:
            ask.done.cancel()
            kept.users -= 1

    # --- passes ---------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        """Run passes as long as there is anything to do."""
        while self._asks or self._begun or self._answers:
            with self._lock:
                turn = self._plan()
            error: BaseException | None = None
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._take, turn)
            except Exception as raised:
                error = raised
            with self._lock:
                self._settle(turn, error)

    def _plan(self) -> ScheduledBatch:
        """What the next pass does."""
        for ask in self._asks:
            gone = [one for one in ask.who if one and self._experts.get(one.name) is not one]
            if gone and not ask.done.done():
                ask.done.set_exception(left_error(gone[0]))
        self._asks = [ask for ask in self._asks if not ask.done.done()]
        turn = ScheduledBatch(self._begun, [answer for answer in self._answers if not answer.over][:STEP_ROWS])
        turn.gone = self._take_leave()
        room = self._max_num_batched_tokens - len(turn.answers)
        busy = bool(turn.answers) or len(self._asks) > 1
        begun: set[int] = set()
        for ask in self._asks:
            if room <= 0:
                break
            if id(ask.prompt) in begun:
                continue  # two requests with one prompt: the second finds what the first has read
            begun.add(id(ask.prompt))
            left = ask.prompt.left
            if left > room and room < min(SHORT, left) and (turn.reads or turn.answers):
                break
            ids = ask.prompt.ids[ask.prompt.prefix.lengths[0] :][: min(left, room)]
            room -= len(ids)
            branches: list[DecisionRows] = []
            if len(ids) == left:
                missing = ask.missing()
                who = missing[: max(room, SHORT)]
                fed = len(missing) <= (min(ask.feed, 1) if busy else ask.feed)
                for branch, members in self._branches(ask.prompt.ids, who, fed):
                    branches.append(branch)
                    turn.rows.append((ask.prompt, branch, members, fed))
                    room -= len(branch.ids) * len(members)
            owner = self._experts.get(ask.prompt.owner or "")
            turn.reads.append(PrefillChunk(ask.prompt.prefix, tuple(ids), owner.slot if owner else 0, tuple(branches)))
            turn.asks.append(ask)
        return turn

    def _branches(
        self, ids: tuple[int, ...], who: Sequence[Loaded | None], fed: bool
    ) -> list[tuple[DecisionRows, list[Loaded | None]]]:
        """Rows that read the same tokens stand in one branch."""
        groups: dict[tuple[int, tuple[int, ...]], list[Loaded | None]] = {}
        # In the order of their slots: adapters that stand in a row are used where they are.
        for one in sorted(who, key=lambda one: one.slot if one else 0):
            adapted = one.adapted if one else 1
            more = (one.expert.activation.accept,) if one and fed else ()
            groups.setdefault((len(ids) - adapted, (*ids[-adapted:], *more)), []).append(one)
        return [
            (DecisionRows(seen, row, tuple(one.slot if one else 0 for one in members)), members)
            for (seen, row), members in groups.items()
        ]

    def _take(self, turn: ScheduledBatch) -> None:
        """Begin answers for which there is a slot, then run the pass. On the worker thread."""
        self._clear(turn.gone)
        with torch.inference_mode():
            for answer in turn.begun:
                if not answer.over and not self._begin(answer):
                    break
            steps = [answer.step() for answer in turn.answers]
            self._pass(turn.reads, steps)
            if steps:
                logits = self._all_logits(torch.stack([step.hidden for step in steps]))
                # In float32: PyTorch's search in bfloat16 takes four times as long on a CPU.
                likeliest = logits.float().argmax(-1).tolist()
                for answer, row, best in zip(turn.answers, logits, likeliest, strict=True):
                    answer.choose(row, best, self.eos)
            for _, branch, members, _ in turn.rows:
                turn.decisions.append(self._decisions(branch, members))

    def _begin(self, answer: GenerationRequest) -> bool:
        """Give an answer its slot, with prompt and row in it; False while there is no room."""
        assert answer.prompt is not None
        assert answer.row is not None
        slot = self._pool.take(answer.length, self._like)
        if slot is None:
            return False
        branch = answer.row.branch
        if branch.seen:
            slot.append(of_tokens(answer.prompt.prefix.layers, 0, branch.seen))
        slot.append(branch.layers, answer.row.number)
        answer.slot = slot
        if answer.row.fed:
            logits = self._all_logits(answer.row.last[None])[0]
            answer.choose(logits, int(logits.float().argmax()), self.eos)
        else:
            assert answer.expert is not None
            answer.token = answer.expert.expert.activation.accept
        return True

    def _settle(self, turn: ScheduledBatch, error: BaseException | None) -> None:
        """Hand on what a pass gave, and put away what has ended. On the event loop's thread."""
        if error is not None:
            for ask in turn.asks:
                if not ask.done.done():
                    ask.done.set_exception(error)
            for answer in (*turn.answers, *turn.begun):
                answer.fail(error)
        else:
            self._numbers["passes"] += 1
            if turn.answers:
                self._told("rows", len(turn.answers))
            self._numbers["tokens"] += len(turn.answers) + sum(read.tokens for read in turn.reads)
            for ask, read in zip(turn.asks, turn.reads, strict=True):
                if read.prefix.lengths[0] > ask.prompt.prefix.lengths[0]:
                    ask.prompt.prefix = read.prefix
            for (prompt, branch, members, fed), decisions in zip(turn.rows, turn.decisions, strict=True):
                for number, (one, p) in enumerate(zip(members, decisions, strict=True)):
                    if one is None or self._experts.get(one.name) is one:
                        row = Row(branch, number, None if one is None else p, fed or one is None)
                        prompt.rows[name_of(one)] = row
            for ask in self._asks:
                if not ask.done.done() and not ask.missing():
                    ask.done.set_result(None)
        begun = [answer for answer in self._begun if answer.slot is not None]
        self._numbers["answers"] += len(begun)
        # Those that had their turn go to the end.
        self._answers = [*[answer for answer in self._answers if answer not in turn.answers], *turn.answers, *begun]
        self._begun = [answer for answer in self._begun if answer.slot is None and not answer.over]
        for answer in self._answers:
            answer.flush()
            if answer.over and answer.slot is not None:
                self._pool.give_back(answer.slot)
                answer.slot = None
        self._answers = [answer for answer in self._answers if not answer.over]
        self._prompts.trim()

    @torch.inference_mode()
    def _pass(self, reads: Sequence[PrefillChunk], steps: Sequence[DecodeStep]) -> None:
        if steps or any(read.tokens for read in reads):
            run(self.model, self._bank, reads, steps)

    def _decisions(self, branch: DecisionRows, members: Sequence[Loaded | None]) -> list[float]:
        """P(accept) of each row; only the indicators' logits are computed."""
        if all(one is None for one in members):
            return [0.0] * len(members)
        place = next(one.adapted for one in members if one) - 1  # of the prompt's last token
        experts = [one.expert.activation if one else None for one in members]
        pairs = sorted({token for a in experts if a for token in (a.accept, a.refuse)})
        with torch.inference_mode():
            logits = logits_of(self.model, branch.hidden[:, place], pairs).float().tolist()
        return [
            p_accept(row[pairs.index(a.accept)], row[pairs.index(a.refuse)]) if a else 0.0
            for a, row in zip(experts, logits, strict=True)
        ]

    def _read_now(self, ids: Sequence[int], adapter: int) -> Prefix:
        read = PrefillChunk(Prefix((), (0,)), tuple(ids), adapter)
        self._pass([read], [])
        return read.prefix

    def _whole(self, prompt: Sequence[int], loaded: Loaded, slot: int) -> PrefillChunk:
        """A whole prompt with one expert going on from it."""
        ids = tuple(prompt)
        branch = DecisionRows(len(ids) - loaded.adapted, ids[-loaded.adapted :], (slot,))
        return PrefillChunk(Prefix((), (0,)), ids[:-1], slot if loaded.full else 0, (branch,))

    @torch.inference_mode()
    def _logits(self, prompt: Sequence[int], loaded: Loaded, slot: int) -> Tensor:
        """All logits behind a prompt, with the adapter in that slot where the expert is activated."""
        read = self._whole(prompt, loaded, slot)
        self._pass([read], [])
        return self._all_logits(read.branches[0].hidden[0, -1:])[0]

    def _all_logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary]"""
        with kernels(self.model, len(hidden)):
            return logits_of(self.model, hidden)

    def _on_thread(self, work: Callable[[], T]) -> T:
        return self._thread.submit(work).result()

    def _expert(self, name: str) -> Loaded:
        try:
            return self._experts[name]
        except KeyError:
            raise ServingError(f"this engine holds no expert {name}; it holds {sorted(self._experts)}") from None
