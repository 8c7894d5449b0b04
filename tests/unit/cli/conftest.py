"""A store with three experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from see_ray.store.expert_store import ExpertStore


@pytest.fixture
def fields() -> dict[str, Any]:
    """Of a manifest, what `ExpertStore.save` is given beside name and task."""
    return {
        "base_model": "embedded",
        "fingerprint": "f00dfeed" * 8,
        "form": "activated",
        "activation_tokens": 1,
        "generation_prompt": (1, 2, 3),
        "indicator_tokens": (17, 18),
        "threshold": 0.625,
        "metrics": {"own_accepted": 0.98},
        "r": 16,
    }


@pytest.fixture
def store(tmp_path: Path, fields: dict[str, Any]) -> ExpertStore:
    """qa@1 and sa@1 live, sa@2 only stored."""
    store = ExpertStore.open(tmp_path / "store")
    for name in ("qa", "sa", "sa"):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text('{"r": 16}')
        (folder / "adapter_model.safetensors").write_text(f"weights of {name}")
        ref = store.save(folder, name=name, task=f"tasks/{name}.jsonl", **fields).ref
        if ref.version == 1:
            store.publish(ref)
    return store
