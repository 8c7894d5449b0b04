"""`see eval` finds what asking the live experts one after another finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from see_ray.config import Config
from see_ray.data.demo_tasks import DemoTask
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import GenerateRequest, SamplingParams
from see_ray.errors import ConfigError, TaskError
from see_ray.evaluate.answer_scores import mean_scores, scores_by_task
from see_ray.evaluate.live_store import EvalConfig, evaluate, report, rows_of
from see_ray.models.activation import encode_prompt
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST, ChainEntry, walk
from see_ray.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from tests.conftest import Fitted

ROWS, TOKENS = 4, 6


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tasks: dict[str, DemoTask]) -> dict[str, str]:
    """Test rows of the demo's tasks as files: two that were learned, one that is nobody's."""
    folder = tmp_path_factory.mktemp("sources")
    for name, task in tasks.items():
        path = folder / f"{name}.test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in task.test[:ROWS]), encoding="utf-8")
    return {name: str(folder / f"{name}.test.jsonl") for name in tasks}


@pytest.fixture(scope="module")
def evaluation(sources: dict[str, str]) -> EvalConfig:
    return EvalConfig((sources["tickets"], sources["dates"]), (sources["contacts"],), ROWS, TOKENS)


@pytest.fixture(scope="module")
def found(evaluation: EvalConfig, config: Config, experts: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("eval")
    return evaluate(evaluation, config, folder, Listener()), folder


async def answered(engine: EmbeddedEngine, tokenizer: Any, prompt: str, links: list[ChainEntry]) -> tuple[str, str]:
    """Who answers a query and what, asking expert after expert as an endpoint does."""
    ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}])

    async def decide(expert: str) -> float:
        return (await engine.decide(ids, [expert]))[0]

    who = (await walk(links, decide)).answered_by
    tokens = [
        token.id
        async for token in engine.generate(
            GenerateRequest(tuple(ids), None if who == GENERALIST else who, SamplingParams(TOKENS))
        )
    ]
    return who, tokenizer.decode(tokens, skip_special_tokens=True)


async def test_every_row_of_r_is_that_of_asking_one_after_another(
    found: Any, engine: EmbeddedEngine, tokenizer: Any, tasks: dict[str, DemoTask], experts: Fitted
) -> None:
    result, _ = found
    links = [ChainEntry(manifest.name, manifest.threshold) for manifest in experts.live]
    assert result.tasks == ("tickets", "dates")
    for learned, scores in enumerate(result.scores):
        newest_first = links[:learned][::-1]
        asked = [(name, row) for name in result.tasks for row in tasks[name].test[:ROWS]]
        answers = [await answered(engine, tokenizer, row["prompt"], newest_first) for _, row in asked]
        wanted = mean_scores(
            scores_by_task((name, text, row["response"]) for (name, row), (_, text) in zip(asked, answers, strict=True))
        )
        assert scores == wanted
    assert [who for _, _, who in result.routes][: len(answers)] == [who for who, _ in answers]


async def test_queries_of_nobody_are_routed_and_not_scored(
    found: Any, engine: EmbeddedEngine, tokenizer: Any, tasks: dict[str, DemoTask], experts: Fitted
) -> None:
    result, _ = found
    links = [ChainEntry(manifest.name, manifest.threshold) for manifest in reversed(experts.live)]
    foreign = [who for owner, source, who in result.routes if (owner, source) == (GENERALIST, "contacts")]
    walked = [(await answered(engine, tokenizer, row["prompt"], links))[0] for row in tasks["contacts"].test[:ROWS]]
    assert foreign == walked
    assert set(result.scores[0]) == {"tickets", "dates"}


def test_what_was_asked_is_not_asked_again(found: Any, evaluation: EvalConfig, config: Config) -> None:
    result, folder = found
    before = {path: path.stat().st_mtime_ns for path in (folder / "asked").glob("*.json")}
    assert len(before) >= 2 + 1  # decisions of two experts, answers of at least the generalist
    assert evaluate(evaluation, config, folder, Listener()) == result
    assert {path: path.stat().st_mtime_ns for path in (folder / "asked").glob("*.json")} == before


def test_the_report_says_what_was_measured(found: Any, evaluation: EvalConfig, config: Config) -> None:
    result, folder = found
    text = report(evaluation, config, folder, Listener())
    assert f"| see | 1 | {100 * sum(result.matrix[-1]) / 2:.1f} |" in text
    assert "dates@1" in text
    assert (folder / "report.json").is_file()


def test_a_task_that_was_never_learned_is_an_error_that_names_those_that_were(
    sources: dict[str, str], config: Config, experts: Fitted, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=r"never learned contacts; it learned tickets, dates.*--foreign"):
        evaluate(EvalConfig((sources["contacts"],)), config, tmp_path, Listener())


def test_an_unknown_kind_of_score_is_an_error(
    sources: dict[str, str], config: Config, experts: Fitted, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot score tickets by bleu"):
        evaluate(EvalConfig((sources["tickets"],), metrics=(("tickets", "bleu"),)), config, tmp_path, Listener())


def test_a_training_file_is_asked_by_its_held_out_rows_only(tmp_path: Path, config: Config) -> None:
    lines = [json.dumps({"prompt": f"q{number}", "response": "r"}) for number in range(40)]
    (tmp_path / "sa.jsonl").write_text("\n".join(lines))
    (tmp_path / "sa.test.jsonl").write_text("\n".join(lines))
    assert len(rows_of(str(tmp_path / "sa.jsonl"), config, 100)[1]) == 4  # reconstruct.eval_share
    name, rows = rows_of(str(tmp_path / "sa.test.jsonl"), config, 100)
    assert (name, len(rows)) == ("sa", 40)
    assert len(rows_of(str(tmp_path / "sa.test.jsonl"), config, 7)[1]) == 7


def test_the_store_is_as_before(found: Any, config: Config, experts: Fitted) -> None:
    assert [ref.id for ref in ExpertStore.open(config.store.url).head().experts] == [m.id for m in experts.live]
