"""What all methods of a comparison share: one loaded base model, one way to fit, one way to ask.

Every adapter is fitted by `fit_here` on examples in which each target begins with an indicator, and answers
through the engine, so methods differ in their data and their routing alone. A fit is named by everything that
makes it: methods that need the same one (the oracle and all routers, or any method's first task) share it, and
an interrupted comparison finds it again.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.cpus import available_cpus
from see_ray.data.general_queries import Chat, general_cache, needed_general, read_general_file, sample_general
from see_ray.data.reconstruct import Example
from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.evaluate.baselines import routers
from see_ray.evaluate.baselines.plan import Data, Plan, read
from see_ray.evaluate.batch_inference import Asker, cached_by_prompt, digest, write_json
from see_ray.fit.launch import CHANGES_NOTHING
from see_ray.fit.local import fit_here
from see_ray.fit.report import Comparison
from see_ray.models.activation import Activation, activation_of, encode_prompt
from see_ray.models.base_model import BaseModel, find, load_model, load_tokenizer
from see_ray.routing.chain import GENERALIST

if TYPE_CHECKING:
    import numpy

    from see_ray.engine.interface import Expert

KEPT_PREFIX_GB = 2.0
"""For keys and values of prompts, kept from one adapter's answers to the next one's: every test query is asked anew
after each task, and reading it takes longer than a short answer to it."""


@dataclass(frozen=True)
class Fit:
    """One fitted adapter.

    Attributes:
        key: its name; equal fits have equal names.
        folder: its PEFT folder.
        form: `activated` or `full`.
        rows: examples that it was fitted on.
        seconds: that it took, when it was fitted.
        decisions: P(accept) of its held-out rows.
        comparison: with the generalist on those of them that are own; None without any.
    """

    key: str
    folder: Path
    form: str
    rows: int
    seconds: float
    decisions: list[float]
    comparison: Comparison | None


@dataclass(frozen=True)
class Query:
    """One query that is asked after every task.

    Attributes:
        owner: the task it belongs to; None if nobody's.
        source: the task, or where a query of nobody's comes from.
        prompt: token ids.
        messages: the same as a chat.
        reference: the right answer; empty if nobody's.
    """

    owner: str | None
    source: str
    prompt: tuple[int, ...]
    messages: Chat
    reference: str


class Workbench:
    """A plan with one seed, in one process.

    Args:
        plan: the comparison.
        seed: draws rows and seeds fits.
        folder: where fits and answers are kept.
    """

    def __init__(self, plan: Plan, seed: int, folder: Path):
        self.seed, self.config = seed, plan.config(seed)
        # Names below are of fits and prompts; what the base model is loaded as is in no name but this one.
        self.folder = folder / digest(self.config.base_model.model_dump(mode="json"))
        self.base, self.tokenizer, self.model, self.engine = _models(self.config.base_model)
        self.data: Data = read(plan, seed)
        self.tasks: tuple[Task, ...] = self.data.tasks
        self.asker = Asker(self.engine, self.tokenizer)
        self._max_tokens = plan.max_tokens
        self._hidden: dict[tuple[int, ...], numpy.ndarray] = {}
        own = [(name, name, row.messages, row.response) for name, rows in self.data.tests.items() for row in rows]
        foreign = [(None, source, chat, "") for source, chats in self.data.foreign.items() for chat in chats]
        self.queries = [
            Query(owner, source, tuple(encode_prompt(self.tokenizer, messages)), messages, reference)
            for owner, source, messages, reference in (*own, *foreign)
        ]

    @functools.cached_property
    def general(self) -> list[Chat]:
        """General queries for reconstruction, as `learn` takes them."""
        from filelock import FileLock

        config = self.config
        if config.reconstruct.general_negatives_file is not None:
            return read_general_file(config.reconstruct.general_negatives_file)
        cached = general_cache(self.base, config.base_model, self.seed)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            return sample_general(self.base, config.base_model, needed_general(config.reconstruct), self.seed)

    def activation(self, form: str) -> Activation:
        """Where adapters of a form apply."""
        return activation_of(self.tokenizer, self.config.base_model, self._fit_config(form))

    def accept(self, rows: Sequence[Row], form: str = "activated") -> list[Example]:
        """Rows as accept examples."""
        return [accept_example(row, self.tokenizer, self.activation(form)) for row in rows]

    def fit(
        self,
        examples: Sequence[Example],
        *,
        form: str = "activated",
        held_out: Sequence[Example] = (),
        start: Fit | None = None,
        learning_rate: float | None = None,
    ) -> Fit:
        """Fit an adapter, or find the same fit from before.

        Args:
            examples: to fit on.
            form: where the adapter applies.
            held_out: rows on which it decides in the end.
            start: an adapter to go on from.
            learning_rate: if not the configuration's.
        """
        from filelock import FileLock

        config, activation = self._fit_config(form, learning_rate), self.activation(form)
        settings = config.model_dump(mode="json", exclude=set(CHANGES_NOTHING))
        rows = [[[e.prompt, e.target] for e in some] for some in (examples, held_out)]
        key = digest([self.base.fingerprint, settings, asdict(activation), rows, start and start.key])
        folder = self.folder / "adapters" / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "fit_here.json").is_file():  # written last
                shutil.rmtree(folder, ignore_errors=True)
                made = fit_here(
                    examples, self.model, self.base, activation, config, folder,
                    held_out=held_out, start=start.folder if start else None,
                )  # fmt: skip
                write_json(folder / "fit_here.json", asdict(made) | {"form": form, "rows": len(examples)})
        return self.found(key)

    def found(self, key: str) -> Fit:
        """A fit from before, by its name."""
        folder = self.folder / "adapters" / key
        made = json.loads((folder / "fit_here.json").read_text(encoding="utf-8"))
        comparison = made["comparison"] and Comparison(**made["comparison"])
        return Fit(key, folder, made["form"], made["rows"], made["seconds"], made["decisions"], comparison)

    def _fit_config(self, form: str, learning_rate: float | None = None) -> FitConfig:
        rate = learning_rate or self.config.fit.learning_rate
        return self.config.fit.model_copy(update={"form": form, "learning_rate": rate})

    def answers(self, prompts: Sequence[Sequence[int]], fit: Fit | None) -> list[str]:
        """Answers of an adapter, or of the generalist."""
        expert = self._expert(fit) if fit else None
        name = f"answers-{fit.key if fit else GENERALIST}-{self._max_tokens}.json"
        return cached_by_prompt(
            self.folder / "asked" / name,
            prompts,
            lambda missing: self.asker.answers(missing, expert, self._max_tokens),
        )

    def decisions(self, fit: Fit) -> list[float]:
        """P(accept) of an adapter for every query."""
        return cached_by_prompt(
            self.folder / "asked" / f"decisions-{fit.key}.json",
            [query.prompt for query in self.queries],
            lambda missing: self.asker.decisions(missing, self._expert(fit)),
        )

    def hidden_states(self, prompts: Sequence[tuple[int, ...]]) -> numpy.ndarray:
        """The base model's hidden state at each prompt's end [prompts, hidden size]; each is read once a process."""
        import numpy

        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._hidden]:
            self._hidden |= zip(missing, routers.hidden_states(self.engine.model, missing), strict=True)
        return numpy.stack([self._hidden[prompt] for prompt in prompts])

    def _expert(self, fit: Fit) -> Expert:
        from see_ray.engine.interface import Expert

        return Expert(fit.key, fit.folder, self.activation(fit.form))


def accept_example(row: Row, tokenizer: Any, activation: Activation) -> Example:
    """A row as an accept example."""
    response = tokenizer(row.response, add_special_tokens=False)["input_ids"]
    target = (activation.accept, *response, tokenizer.eos_token_id)
    return Example(tuple(encode_prompt(tokenizer, row.messages)), target, "accept", row.where)


@functools.lru_cache(maxsize=1)
def _models(config: BaseModelConfig) -> tuple[BaseModel, Any, Any, Any]:
    """Base model, tokenizer, the model to fit on and an engine; they share the mapped weights."""
    import torch

    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.models.prefix_kv import kv_bytes_per_token

    base = find(config)
    model = load_model(base, config, "cuda" if torch.cuda.is_available() else "cpu")
    kept = int(KEPT_PREFIX_GB * 1e9 / kv_bytes_per_token(model, model.dtype))
    engine = EmbeddedEngine(base, config, prefix_tokens=kept)
    return base, load_tokenizer(base), model, engine


def set_threads(config: FitConfig) -> None:
    """Torch threads of this process: as many as it has CPUs reserved, so that several run side by side."""
    import torch

    torch.set_num_threads(config.threads_per_worker or min(available_cpus(), max(1, int(config.cpus_per_worker))))
