"""Teach one served language model task after task, without forgetting: a sequence of LoRA experts on Ray.

    import see_ray

    config = see_ray.Config()
    see_ray.learn("tickets.jsonl", config)           # fits one new expert; earlier experts are not changed
    with see_ray.serve(config) as endpoint:          # an OpenAI-compatible endpoint, stopped at the end of the block
        print(endpoint.client.ask("I cannot log in."))

What `__all__` lists is the public Python API. Each name is imported when it is first used, so that `import see_ray`
takes milliseconds and needs neither Ray nor PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from see_ray import errors
    from see_ray.client import Client
    from see_ray.config import Config, load_config
    from see_ray.python_api import Endpoint, learn, serve
    from see_ray.store.expert_store import ExpertStore

__all__ = ["Client", "Config", "Endpoint", "ExpertStore", "errors", "learn", "load_config", "serve"]

_MODULE_OF = {
    "Client": "see_ray.client",
    "Config": "see_ray.config",
    "Endpoint": "see_ray.python_api",
    "ExpertStore": "see_ray.store.expert_store",
    "learn": "see_ray.python_api",
    "load_config": "see_ray.config",
    "serve": "see_ray.python_api",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("see_ray.errors")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'see_ray' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
