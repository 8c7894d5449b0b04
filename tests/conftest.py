"""One Ray, one set of fitted experts and one endpoint for the whole test run.

Fitting and starting take most of the time, so tests share them; what a test changes it undoes.
Everything is float32, so that token-for-token comparisons mean something on every machine.
With $SEE_TEST_ENGINE=vllm the endpoint answers with vLLM (`make test-vllm`).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from see_ray.cli.main import main
from see_ray.data.demo_tasks import DemoTask, demo_tasks, general_questions

if TYPE_CHECKING:
    from see_ray.config import Config
    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.models.base_model import BaseModel
    from see_ray.store.records import Manifest

See = Callable[..., tuple[int, str, str]]
"""What the fixture `see` gives."""
SeeProcess = Callable[..., subprocess.CompletedProcess[str]]
"""What the fixture `see_process` gives."""

ROOT = Path(__file__).parents[1]

SETTINGS = [
    "base_model.dtype=float32",
    "reconstruct.general_negatives=12",
    "reconstruct.mixed_negatives=4",
    "reconstruct.max_eval_rows=8",
    "gate.min_own_accepted=0.25",  # of four held-out rows
    "fit.r=8",
    "fit.learning_rate=2.0e-3",
    "fit.num_train_epochs=2",
    "fit.train_batch_size=4",
    "serve.max_wait_s=5",
    "serve.trace_sample_rate=1",
    "fit.cpus_per_worker=0.5",  # two workers fit beside the endpoint on two cores
]
if os.environ.get("SEE_TEST_ENGINE") == "vllm":
    SETTINGS += [
        "serve.engine=vllm",
        "serve.vllm={experts: 2, max_rank: 8, kv_cache_memory_bytes: 400000000, max_num_seqs: 16}",
        "serve.max_wait_s=60",
    ]


@pytest.fixture
def see(capfd: pytest.CaptureFixture[str]) -> See:
    """Runs `see` in this process; gives exit code, stdout and stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, err

    return run


@pytest.fixture
def see_process() -> SeeProcess:
    """Runs `see` in a process of its own."""

    def run(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from see_ray.cli.main import main; main()", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False, **options)

    return run


@pytest.fixture
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def tasks() -> dict[str, DemoTask]:
    """Small tasks by name: 40 training rows, 40 test rows."""
    return {task.name: task for task in demo_tasks(rows=40, test_rows=40, seed=1)}


@pytest.fixture(scope="session")
def general_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("general") / "general.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in general_questions()[:20]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fast_settings() -> list[str]:
    """Settings for fits that take seconds, as `section.field=value`."""
    return SETTINGS


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, general_file: Path) -> Config:
    """Settings for fast fits, with a store and a port of their own."""
    from see_ray.config import load_config

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = tmp_path_factory.mktemp("store") / "experts"
    tracking = tmp_path_factory.mktemp("tracking")
    own = [
        f"store.url={store}",
        f"fit.tracking_dir={tracking}",
        f"serve.port={port}",
        f"reconstruct.general_negatives_file={general_file}",
    ]
    return load_config(None, [*SETTINGS, *own])


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    from see_ray import cluster

    cluster.connect()
    yield
    cluster.disconnect()


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DemoTask, int], Path]:
    """Writes the first rows of a task as JSONL."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(task: DemoTask, rows: int) -> Path:
        path = folder / f"{task.name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in task.train[:rows]), encoding="utf-8")
        return path

    return write


@dataclass(frozen=True)
class Fitted:
    """Experts in the store: `live` ones in order of arrival, and `spare` ones that were only fitted."""

    live: list[Manifest]
    spare: dict[str, Manifest]


@pytest.fixture(scope="session")
def experts(
    config: Config, ray_here: None, tasks: dict[str, DemoTask], task_file: Callable[[DemoTask, int], Path]
) -> Fitted:
    """tickets and dates, adapted from the last prompt token on; `upper`, adapted from the whole
    generation prompt on (PEFT's own aLoRA), fitted but not live.

    With $SEE_TEST_EXPERTS, a folder, they are kept there and not fitted again in the next run: for working on
    what only serves them."""
    from see_ray.pipeline import Source, learn
    from see_ray.store.expert_store import ExpertStore

    kept = Path(os.environ.get("SEE_TEST_EXPERTS", ""))
    if kept.name and kept.is_dir():
        shutil.copytree(kept, config.store.url)
        manifests = {manifest.name: manifest for manifest in ExpertStore.open(config.store.url).experts()}
        return Fitted([manifests["tickets"], manifests["dates"]], {"upper": manifests["upper"]})
    live = [learn(Source(str(task_file(tasks[name], 40))), config) for name in ("tickets", "dates")]
    whole = config.model_copy(update={"fit": config.fit.model_copy(update={"activation_tokens": "all"})})
    upper = learn(Source(str(task_file(tasks["contacts"], 24)), name="upper"), whole)
    ExpertStore.open(config.store.url).remove("upper")
    if kept.name:
        shutil.copytree(config.store.url, kept)
    return Fitted([learned.manifest for learned in live], {"upper": upper.manifest})


@pytest.fixture(scope="session")
def endpoint(config: Config, experts: Fitted) -> Iterator[str]:
    """URL of a live endpoint with the experts tickets and dates."""
    from see_ray.serving import endpoint

    yield endpoint.start(config)
    endpoint.stop()


@pytest.fixture(scope="session")
def base(config: Config) -> BaseModel:
    from see_ray.models.base_model import find

    return find(config.base_model)


@pytest.fixture(scope="session")
def tokenizer(base: BaseModel) -> Any:
    from see_ray.models.base_model import load_tokenizer

    return load_tokenizer(base)


@pytest.fixture(scope="session")
def engine(config: Config, base: BaseModel, experts: Fitted) -> EmbeddedEngine:
    """An engine in this process with all three experts."""
    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert
    from see_ray.store.expert_files import activation_of_manifest
    from see_ray.store.expert_store import ExpertStore

    engine = EmbeddedEngine(base, config.base_model)
    store = ExpertStore.open(config.store.url)
    for manifest in (*experts.live, *experts.spare.values()):
        folder = store.fetch(manifest.ref, Path("unused"))
        engine.load(Expert(manifest.name, folder, activation_of_manifest(manifest)))
    return engine


@pytest.fixture(scope="session")
def mixed_queries(tasks: dict[str, DemoTask]) -> Sequence[str]:
    """100 queries: 30 of each task, and 10 general ones."""
    own = [row["prompt"] for task in tasks.values() for row in task.test[:30]]
    return [*own, *general_questions()[-10:]]
