"""What all methods of a comparison share: one base model, one way to fit, and one way to decide and answer.

Every adapter is fitted by `fit_local` on examples whose target begins with an indicator, and answers through the
engine, so that methods differ in their data and their routing alone. A fit is identified by everything that
determines it: methods that need the same fit share it (the oracle and the routers; the first task of most methods),
and an interrupted comparison finds it again.
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
from see_ray.data.general_queries import Chat, general_cache, needed_general, read_general_file, sample_general
from see_ray.data.reconstruct import Example, ExampleEncoder
from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.evaluate.baselines import routers
from see_ray.evaluate.baselines.plan import Plan, read_data
from see_ray.evaluate.batch_inference import BatchInference
from see_ray.evaluate.queries import encode_queries
from see_ray.evaluate.result_cache import cached_by_prompt, digest, write_json
from see_ray.fit.local import fit_local
from see_ray.fit.report import Comparison
from see_ray.fit.spec import SETTINGS_WITHOUT_EFFECT_ON_RESULT, FitSpec
from see_ray.models.activation import Activation, activation_of
from see_ray.models.base_model import BaseModel, find, load_model, load_tokenizer
from see_ray.routing.chain import GENERALIST

if TYPE_CHECKING:
    import numpy

    from see_ray.engine.interface import Expert

KEPT_PREFIX_GB = 2.0
"""Memory for keys and values of prompts, kept from one adapter to the next: all adapters answer the same test queries,
and reading a prompt takes longer than writing a short answer to it."""


@dataclass(frozen=True)
class Fit:
    """One fitted adapter.

    Attributes:
        key: identifies it by everything that determines it.
        folder: its PEFT folder.
        form: `activated` or `full`.
        rows: number of examples that it was fitted on.
        seconds: that the fit took.
        decisions: P(accept) of its held-out examples.
        comparison: with the generalist on those of them that are the task's own; None if there are none.
    """

    key: str
    folder: Path
    form: str
    rows: int
    seconds: float
    decisions: list[float]
    comparison: Comparison | None


class Experiment:
    """A plan with one seed, in one process.

    Args:
        plan: the comparison.
        seed: draws rows and seeds fits.
        folder: where fits, decisions and answers are kept.
    """

    def __init__(self, plan: Plan, seed: int, folder: Path):
        self.seed, self.config = seed, plan.config(seed)
        # The keys of fits and prompts do not contain how the base model is loaded; the folder's name does.
        self.folder = folder / digest(self.config.base_model.model_dump(mode="json"))
        self.base, self.tokenizer, self.model, self.engine = _models(self.config.base_model)
        data = read_data(plan, seed)
        self.tasks: tuple[Task, ...] = data.tasks
        self.queries = encode_queries(data.tests, data.foreign.items(), self.tokenizer)
        self.inference = BatchInference(self.engine, self.tokenizer)
        self._max_tokens = plan.max_tokens
        self._hidden: dict[tuple[int, ...], numpy.ndarray] = {}

    @functools.cached_property
    def general(self) -> list[Chat]:
        """General queries for reconstruction, the same as `see learn` uses."""
        from filelock import FileLock

        config = self.config
        if config.reconstruct.general_negatives_file is not None:
            return read_general_file(config.reconstruct.general_negatives_file)
        cached = general_cache(self.base, config.base_model, self.seed)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            return sample_general(self.base, config.base_model, needed_general(config.reconstruct), self.seed)

    def activation(self, form: str) -> Activation:
        """From where adapters of a form apply."""
        return activation_of(self.tokenizer, self.config.base_model, self._fit_config(form))

    def accept_examples(self, rows: Sequence[Row], form: str = "activated") -> list[Example]:
        """Rows as accept examples."""
        encoder = ExampleEncoder(self.tokenizer, self.activation(form))
        return [encoder.accept(row) for row in rows]

    def fit(
        self,
        examples: Sequence[Example],
        *,
        form: str = "activated",
        held_out: Sequence[Example] = (),
        start: Fit | None = None,
        learning_rate: float | None = None,
    ) -> Fit:
        """Fit an adapter, or load the same fit from before.

        Args:
            examples: to fit on.
            form: `activated` or `full`.
            held_out: examples that the fitted adapter decides on.
            start: an adapter to continue from.
            learning_rate: instead of the configuration's.
        """
        from filelock import FileLock

        config, activation = self._fit_config(form, learning_rate), self.activation(form)
        settings = config.model_dump(mode="json", exclude=set(SETTINGS_WITHOUT_EFFECT_ON_RESULT))
        rows = [[[e.prompt, e.target] for e in part] for part in (examples, held_out)]
        key = digest([self.base.fingerprint, settings, asdict(activation), rows, start and start.key])
        folder = self._adapter_folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "fit_here.json").is_file():  # written last, so that it marks a complete folder
                shutil.rmtree(folder, ignore_errors=True)
                spec = FitSpec(examples, self.base, self.config.base_model, activation, config, held_out)
                fitted = fit_local(spec, self.model, folder, start=start.folder if start else None)
                write_json(folder / "fit_here.json", asdict(fitted) | {"form": form, "rows": len(examples)})
        return self.load_fit(key)

    def load_fit(self, key: str) -> Fit:
        """A fit from before."""
        folder = self._adapter_folder(key)
        saved = json.loads((folder / "fit_here.json").read_text(encoding="utf-8"))
        comparison = Comparison(**saved["comparison"]) if saved["comparison"] else None
        return Fit(key, folder, saved["form"], saved["rows"], saved["seconds"], saved["decisions"], comparison)

    def _adapter_folder(self, key: str) -> Path:
        return self.folder / "adapters" / key

    def _fit_config(self, form: str, learning_rate: float | None = None) -> FitConfig:
        rate = learning_rate or self.config.fit.learning_rate
        return self.config.fit.model_copy(update={"form": form, "learning_rate": rate})

    def answers(self, prompts: Sequence[Sequence[int]], fit: Fit | None) -> list[str]:
        """Answers of an adapter, or of the generalist if `fit` is None."""
        expert = self._expert(fit) if fit else None
        return cached_by_prompt(
            self.folder / "asked" / f"answers-{fit.key if fit else GENERALIST}-{self._max_tokens}.json",
            prompts,
            lambda missing: self.inference.answers(missing, expert, self._max_tokens),
        )

    def decisions(self, fit: Fit) -> list[float]:
        """P(accept) of an adapter for every test query."""
        return cached_by_prompt(
            self.folder / "asked" / f"decisions-{fit.key}.json",
            [query.prompt for query in self.queries],
            lambda missing: self.inference.decisions(missing, self._expert(fit)),
        )

    def hidden_states(self, prompts: Sequence[tuple[int, ...]]) -> numpy.ndarray:
        """The base model's hidden state at each prompt's last token [prompts, hidden size], cached in this process."""
        import numpy

        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._hidden]:
            self._hidden |= zip(missing, routers.hidden_states(self.engine.model, missing), strict=True)
        return numpy.stack([self._hidden[prompt] for prompt in prompts])

    def _expert(self, fit: Fit) -> Expert:
        from see_ray.engine.interface import Expert

        return Expert(fit.key, fit.folder, self.activation(fit.form))


@functools.lru_cache(maxsize=1)
def _models(config: BaseModelConfig) -> tuple[BaseModel, Any, Any, Any]:
    """Base model, tokenizer, the model to fit on, and an engine; the latter two share the mapped weights."""
    import torch

    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.models.prefix_kv import kv_bytes_per_token

    base = find(config)
    model = load_model(base, config, "cuda" if torch.cuda.is_available() else "cpu")
    prefix_tokens = int(KEPT_PREFIX_GB * 1e9 / kv_bytes_per_token(model, model.dtype))
    engine = EmbeddedEngine(base, config, prefix_tokens=prefix_tokens)
    return base, load_tokenizer(base), model, engine
