"""The embedded engine: decisions and answers on transformers and PyTorch, in this process.

It holds the base model once and any number of experts beside it. Their LoRA weights are
stacked ([experts, in, r] and [experts, r, out] for each linear layer), and each row of a
forward pass names the slot that applies to it; slot 0 is all zeros, the generalist. A prompt's
prefix is read once and kept for a while, so that a decision, the winner's answer and the
generalist's all continue from the same keys and values.

The engine knows token ids only; text is `engine.text`'s business. PyTorch runs on one worker
thread, one forward pass at a time, so requests take turns token by token and a request that
is given up stops within one of them.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from see_ray.activation import Activation, p_accept
from see_ray.base_model import BaseModel, load_model
from see_ray.config import BaseModelConfig
from see_ray.errors import ServingError
from see_ray.prefix import Prefix, forward, logits_of, prefill

T = TypeVar("T")


@dataclass(frozen=True)
class Expert:
    """An expert as the engine needs it: its PEFT folder and where it is activated."""

    name: str
    folder: Path
    activation: Activation


@dataclass(frozen=True)
class Draw:
    """How the next token is chosen. `temperature` 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class EmbeddedEngine:
    """Base model, experts, and a bounded store of prefixes.

    Args:
        base: the base model to load.
        config: its settings (dtype).
        device: `cpu` or a CUDA device; None takes a GPU if there is one.
        prefix_tokens: prefixes of at most this many tokens in all are kept; the last one always is.
    """

    def __init__(
        self, base: BaseModel, config: BaseModelConfig, *, device: str | None = None, prefix_tokens: int = 8192
    ):
        self.model = load_model(base, config, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        eos = self.model.generation_config.eos_token_id
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        self._bank = _Bank(self.model)
        self._experts: dict[str, Expert] = {}
        self._prefixes: OrderedDict[tuple[str | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._room = prefix_tokens
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    # --- experts ---------------------------------------------------------------------------

    def load(self, expert: Expert) -> None:
        """Add an expert.

        Raises:
            ServingError: its adapter does not fit the base model, or changes nothing. Either
                would make the base model answer in the expert's name.
        """
        self._bank.add(expert.name, expert.folder)
        self._experts[expert.name] = expert
        probe = [*expert.activation.generation_prompt] * 2
        if torch.equal(self._next_logits(probe, [None]), self._next_logits(probe, [expert.name])):
            self.unload(expert.name)
            raise ServingError(
                f"the adapter of {expert.name} in {expert.folder} changes nothing: "
                "all its updates are zero; fit it again"
            )

    def unload(self, name: str) -> None:
        """Forget an expert."""
        del self._experts[name]
        self._bank.remove(name)
        for key in [key for key in self._prefixes if key[0] == name]:
            del self._prefixes[key]

    # --- decisions and answers -----------------------------------------------------------

    async def decide(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        """P(accept) of each named expert for one prompt (token ids)."""
        return await self._run(lambda: self.decide_now(prompt, experts))

    def decide_now(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        """As :meth:`decide`, on the calling thread."""
        decisions: dict[str, float] = {}
        for group in self._grouped(experts):
            logits = self._next_logits(prompt, group)
            for name, row in zip(group, logits, strict=True):
                decisions[name] = self._decision(name, row)
        return [decisions[name] for name in experts]

    def decide_batch(self, prompts: Sequence[Sequence[int]], expert: str, rows: int = 16) -> list[float]:
        """P(accept) of one expert for many prompts, read in length-sorted batches."""
        activation = self._expert(expert).activation
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result = [0.0] * len(prompts)
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            splits = [activation.split(list(prompts[i])) for i in batch]
            with torch.inference_mode():
                before = prefill(self.model, [left for left, _ in splits])
                with self._bank.active([expert] * len(batch)):
                    hidden, _ = forward(self.model, before, [right for _, right in splits])
                last = torch.tensor([len(right) - 1 for _, right in splits], device=hidden.device)
                logits = logits_of(self.model, hidden[torch.arange(len(batch), device=hidden.device), last])
            for i, row in zip(batch, logits, strict=True):
                result[i] = self._decision(expert, row)
        return result

    async def generate(
        self, prompt: Sequence[int], expert: str | None, max_tokens: int, draw: Draw | None = None
    ) -> AsyncIterator[int]:
        """Token ids of an answer, one by one; ends before an end-of-turn token.

        Args:
            prompt: token ids up to and including the generation prompt.
            expert: who answers; None is the generalist. An expert's answer starts behind its
                accept indicator, as it was fitted.
            max_tokens: most tokens to yield.
            draw: how tokens are chosen; greedy where None.
        """
        draw = draw or Draw()
        generator = torch.Generator()
        if draw.temperature > 0:
            generator.manual_seed(draw.seed) if draw.seed is not None else generator.seed()
        state = await self._run(lambda: self._start(prompt, expert))
        for number in range(max_tokens):
            token = _choose(state.logits, draw, generator)
            if token in self.eos:
                return
            yield token
            if number + 1 < max_tokens:
                await self._run(lambda token=token: self._step(state, token))  # type: ignore[misc]

    # --- forward passes, on the worker thread ---------------------------------------------------

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @torch.inference_mode()
    def _next_logits(self, prompt: Sequence[int], experts: Sequence[str | None]) -> Tensor:
        """Logits behind the prompt for each of some experts that share one prefix: [experts, vocabulary]."""
        before, rest = self._split(prompt, experts[0])
        with self._bank.active(experts):
            hidden, _ = forward(self.model, before.repeat(len(experts)), [rest] * len(experts))
        return logits_of(self.model, hidden[:, -1])

    @torch.inference_mode()
    def _start(self, prompt: Sequence[int], expert: str | None) -> _Answer:
        before, rest = self._split(prompt, expert)
        if expert is not None:
            rest = [*rest, self._expert(expert).activation.accept]
        with self._bank.active([expert]):
            hidden, cache = forward(self.model, before, [rest])
        return _Answer(expert, cache, len(prompt) + (expert is not None), self._answer_logits(hidden))

    @torch.inference_mode()
    def _step(self, state: _Answer, token: int) -> None:
        ids = torch.tensor([[token]], device=self.model.device)
        positions = torch.tensor([[state.length]], device=self.model.device)
        with self._bank.active([state.expert]):
            hidden = self.model.get_decoder()(
                input_ids=ids, position_ids=positions, past_key_values=state.cache, use_cache=True
            ).last_hidden_state
        state.length += 1
        state.logits = self._answer_logits(hidden)

    def _answer_logits(self, hidden: Tensor) -> Tensor:
        return logits_of(self.model, hidden[0, -1])

    def _split(self, prompt: Sequence[int], expert: str | None) -> tuple[Prefix, list[int]]:
        """The kept prefix of a prompt and the tokens that follow it."""
        tokens = self._expert(expert).activation.tokens if expert is not None else 1
        if tokens is None:  # full form: the prefix is the expert's own
            return self._prefix(expert, prompt), list(prompt[-1:])
        # Any activation point is served by the prefix up to the last token, cut shorter.
        before = self._prefix(None, prompt)
        return before.cut(len(prompt) - tokens), list(prompt[-tokens:])

    def _prefix(self, owner: str | None, prompt: Sequence[int]) -> Prefix:
        key = (owner, tuple(prompt[:-1]))
        found = self._prefixes.get(key)
        if found is None:
            with self._bank.active([owner]):
                found = prefill(self.model, [prompt[:-1]])
            self._prefixes[key] = found
            while len(self._prefixes) > 1 and sum(len(ids) for _, ids in self._prefixes) > self._room:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return found

    def _grouped(self, experts: Sequence[str]) -> list[list[str]]:
        """Experts that can share one forward pass: those activated at the same point."""
        groups: dict[Any, list[str]] = {}
        for name in experts:
            tokens = self._expert(name).activation.tokens
            groups.setdefault(tokens if tokens is not None else name, []).append(name)
        return list(groups.values())

    def _decision(self, name: str, logits: Tensor) -> float:
        activation = self._expert(name).activation
        return p_accept(float(logits[activation.accept]), float(logits[activation.refuse]))

    def _expert(self, name: str) -> Expert:
        try:
            return self._experts[name]
        except KeyError:
            raise ServingError(f"this engine holds no expert {name}; it holds {sorted(self._experts)}") from None


@dataclass
class _Answer:
    """An answer in progress: whose it is, its cache, its length in tokens, its next logits."""

    expert: str | None
    cache: Any
    length: int
    logits: Tensor


def _choose(logits: Tensor, draw: Draw, generator: torch.Generator) -> int:
    if draw.temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits.float().cpu() / draw.temperature, dim=-1)
    if draw.top_p < 1:
        ranked, order = chances.sort(descending=True)
        ranked[ranked.cumsum(0) - ranked >= draw.top_p] = 0  # the first is always kept
        chances = torch.zeros_like(chances).scatter(0, order, ranked)
    return int(torch.multinomial(chances, 1, generator=generator))


# --- stacked adapters ------------------------------------------------------------------------


class _Bank:
    """All experts' LoRA weights, stacked in every linear layer that any of them adapts."""

    def __init__(self, model: Any):
        self._model = model
        self._layers: dict[str, _StackedLinear] = {}
        self._slots: dict[str, int] = {}
        self.rows: Tensor | int = 0  # slot of each row, or one slot for all rows

    def active(self, experts: Sequence[str | None]) -> _Rows:
        slots = [0 if name is None else self._slots[name] for name in experts]
        return _Rows(self, slots[0] if len(set(slots)) == 1 else torch.tensor(slots, device=self._model.device))

    def add(self, name: str, folder: Path) -> None:
        updates = _read_adapter(folder)
        taken = set(self._slots.values())
        slot = self._slots.get(name) or min(set(range(1, len(taken) + 2)) - taken)
        modules = dict(self._model.named_modules())
        for path, (down, up) in updates.items():
            linear = self._layers.get(path) or modules.get(path)
            inner = linear.linear if isinstance(linear, _StackedLinear) else linear
            if not isinstance(inner, nn.Linear):
                raise ServingError(
                    f"the adapter in {folder} changes {path}, which is no linear layer of this base model; "
                    "it was made for another one"
                )
            if (inner.in_features, inner.out_features) != (down.shape[0], up.shape[1]):
                raise ServingError(
                    f"the adapter in {folder} has shape {down.shape[0]}x{up.shape[1]} at {path}, the base model "
                    f"{inner.in_features}x{inner.out_features}; it was made for another one"
                )
        for path, (down, up) in updates.items():
            if path not in self._layers:
                parent, _, child = path.rpartition(".")
                self._layers[path] = _StackedLinear(modules[path], self)
                setattr(modules[parent], child, self._layers[path])
            self._layers[path].put(slot, down, up)
        self._slots[name] = slot

    def remove(self, name: str) -> None:
        slot = self._slots.pop(name)
        for layer in self._layers.values():
            layer.clear(slot)


class _Rows:
    """Names the active slot of each row for the forward passes inside a `with` block."""

    def __init__(self, bank: _Bank, rows: Tensor | int):
        self._bank, self._rows = bank, rows

    def __enter__(self) -> None:
        self._bank.rows = self._rows

    def __exit__(self, *_: object) -> None:
        self._bank.rows = 0


class _StackedLinear(nn.Module):
    """A linear layer with a stack of low-rank updates, one slot an expert, slot 0 zero."""

    def __init__(self, linear: nn.Linear, bank: _Bank):
        super().__init__()
        self.linear = linear
        self._bank = bank
        weight = linear.weight
        self.down = weight.new_zeros(1, linear.in_features, 1)
        self.up = weight.new_zeros(1, 1, linear.out_features)

    def put(self, slot: int, down: Tensor, up: Tensor) -> None:
        slots, rank = max(slot + 1, self.down.shape[0]), max(down.shape[1], self.down.shape[2])
        new_down = self.down.new_zeros(slots, self.down.shape[1], rank)
        new_up = self.up.new_zeros(slots, rank, self.up.shape[2])
        new_down[: self.down.shape[0], :, : self.down.shape[2]] = self.down
        new_up[: self.up.shape[0], : self.up.shape[1]] = self.up
        new_down[slot], new_up[slot] = 0, 0
        new_down[slot, :, : down.shape[1]] = down
        new_up[slot, : up.shape[0]] = up
        self.down, self.up = new_down, new_up

    def clear(self, slot: int) -> None:
        if slot < self.down.shape[0]:
            self.down[slot], self.up[slot] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self._bank.rows
        y = self.linear(x)
        if isinstance(rows, int):
            if rows == 0 or rows >= self.down.shape[0]:
                return y
            return y + (x @ self.down[rows]) @ self.up[rows]
        slots = rows.where(rows < self.down.shape[0], 0)
        return y + torch.bmm(torch.bmm(x, self.down[slots]), self.up[slots])


def _read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A PEFT LoRA folder as {module path: (down [in, r], up [r, out], scale folded in)}."""
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ServingError(f"cannot read the adapter in {folder}: {error}") from error
    unsupported = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise ServingError(f"the adapter in {folder} is not plain LoRA ({unsupported or config.get('peft_type')})")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    updates = {}
    for key, value in weights.items():
        path, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if kind == "A.weight":
            up = weights[key.replace(".lora_A.", ".lora_B.")]
            updates[path] = (value.T, up.T * scale)
        elif kind != "B.weight":
            raise ServingError(f"the adapter in {folder} has {key}, which is not a LoRA weight")
    if not updates:
        raise ServingError(f"the adapter in {folder} holds no weights")
    return updates
