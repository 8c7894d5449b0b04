"""The files that an expert keeps beside its adapter, each with its writer and its reader.

    rehearsal.jsonl     a sample of its task's queries; later experts learn to pass on them
    eval.jsonl          held-out rows of its task; later experts are calibrated on their queries
    calibration.json    how the threshold was chosen
    config.yaml         the configuration that made the expert

The adapter itself (`adapter_config.json`, `adapter_model.safetensors`) is written by PEFT, the gate's report by
`see_ray.admission.gate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from see_ray.config import Config
from see_ray.data.general_queries import Chat
from see_ray.data.rows import Row
from see_ray.models.activation import Activation
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, Manifest

REHEARSAL = "rehearsal.jsonl"
EVAL = "eval.jsonl"
CALIBRATION = "calibration.json"
CONFIG = "config.yaml"

MOST_KEPT = 50
"""Held-out rows that an expert keeps for the calibration of later ones."""


def write_expert_files(
    folder: Path, *, config: Config, calibration: Mapping[str, Any], rehearsal: Sequence[Chat], held_out: Sequence[Row]
) -> None:
    """Write what an expert keeps into the folder of its adapter.

    Args:
        folder: with the adapter's files.
        config: the configuration that made it.
        calibration: the fields of its calibration, as JSON values.
        rehearsal: queries of its task.
        held_out: held-out rows of its task, of which the first `MOST_KEPT` are kept.
    """
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    (folder / CALIBRATION).write_text(json.dumps(calibration, indent=2), encoding="utf-8")
    _write_lines(folder / REHEARSAL, [{"messages": chat} for chat in rehearsal])
    kept = held_out[:MOST_KEPT]
    _write_lines(folder / EVAL, [{"messages": row.messages, "response": row.response} for row in kept])


def kept_chats(store: ExpertStore, ref: ExpertRef) -> tuple[list[Chat], list[Chat]]:
    """The queries that an expert keeps for later ones: (rehearsal, held out).

    Raises:
        NotFoundError: no such expert, or it keeps none.
        StoreError: the store cannot be read.
    """
    return _read_chats(store, ref, REHEARSAL), _read_chats(store, ref, EVAL)


def activation_of_manifest(manifest: Manifest) -> Activation:
    """Where a stored expert's adapter applies, and its indicator tokens."""
    return Activation(manifest.generation_prompt, manifest.activation_tokens, *manifest.indicator_tokens)


def _read_chats(store: ExpertStore, ref: ExpertRef, file: str) -> list[Chat]:
    return [json.loads(line)["messages"] for line in store.read_text(ref, file).split("\n") if line]


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
