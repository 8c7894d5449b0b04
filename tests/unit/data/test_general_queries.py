"""General queries: read from a file, or written by the base model, once."""

import json
from pathlib import Path
from typing import Any

import pytest

from see_ray.config import BaseModelConfig
from see_ray.data import general_queries as module
from see_ray.data.general_queries import LONGEST_QUERY, OPENINGS, general_cache, read_general_file, sample_general
from see_ray.errors import ConfigError
from see_ray.models.base_model import BaseModel, find, load_tokenizer


@pytest.fixture(scope="module")
def base() -> Any:
    return find(BaseModelConfig())


def chat(text: Any) -> Any:
    return [{"role": "user", "content": text}]


def chats(kind: Any, count: Any) -> Any:
    return [chat(f"{kind} query {number}") for number in range(count)]


# --- from a file -----------------------------------------------------------------------------


def written(tmp_path: Path, *lines: Any) -> Any:
    path = tmp_path / "general.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def refusal(path: Any) -> Any:
    with pytest.raises(ConfigError) as caught:
        read_general_file(path)
    return str(caught.value)


def test_a_line_is_a_prompt_or_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "S"}, *chat("日本"), {"role": "assistant", "content": "A"}, *chat("more")]
    path = written(tmp_path, json.dumps({"prompt": "Hi"}), json.dumps({"messages": turns}))
    assert read_general_file(path) == [chat("Hi"), turns]


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "", '{"prompt": "Hi"}', "  ", "oops")
    assert f"{path}:4:" in refusal(path)


def test_other_keys_are_ignored(tmp_path: Path) -> None:
    line = json.dumps({"id": 3, "messages": [{"role": "user", "content": "Hi", "name": "x"}]})
    assert read_general_file(written(tmp_path, line)) == [chat("Hi")]


@pytest.mark.parametrize(
    "line",
    [
        "Hi",
        '"Hi"',
        "[]",
        "3",
        "null",
        "{}",
        '{"query": "Hi"}',
        '{"messages": "Hi"}',
        '{"messages": [{"role": "user"}]}',
    ],
)
def test_a_line_of_another_form_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, '{"prompt": "Hi"}', line)
    message = refusal(path)
    assert message.startswith(f"{path}:2:")
    assert '"prompt"' in message
    assert '"messages"' in message


def test_a_missing_file_is_named_with_its_setting(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no.jsonl")
    assert str(tmp_path / "no.jsonl") in message
    assert "reconstruct.general_negatives_file" in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "general.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    "line", ['{"prompt": null}', '{"prompt": 5}', '{"messages": [{"role": "user", "content": []}]}']
)
def test_a_query_that_is_not_text_is_refused(tmp_path: Path, line: str) -> None:
    assert ":1:" in refusal(written(tmp_path, line))


def test_a_line_ends_only_at_a_newline(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    assert read_general_file(written(tmp_path, line)) == [chat(text)]


# --- from the base model ---------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the base model fails, and says so."""

    def load_model(*_: Any) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(module, "load_model", load_model)


def cached(base: BaseModel, tmp_path: Path, count: Any, seed: Any = 0) -> Any:
    config = BaseModelConfig(cache_dir=tmp_path)
    path = general_cache(base, config, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": query}) + "\n" for query in chats("general", count)))
    return config


@pytest.mark.parametrize("count", [0, 3, 5])
def test_cached_queries_are_given_without_the_base_model(
    base: BaseModel, tmp_path: Path, no_model: Any, count: int
) -> None:
    assert sample_general(base, cached(base, tmp_path, 5), count, seed=0) == chats("general", count)


def test_too_few_cached_queries_need_the_base_model(base: BaseModel, tmp_path: Path, no_model: Any) -> None:
    with pytest.raises(AssertionError, match="was loaded"):
        sample_general(base, cached(base, tmp_path, 5), 6, seed=0)


def test_queries_of_another_seed_are_not_given(base: BaseModel, tmp_path: Path, no_model: Any) -> None:
    with pytest.raises(AssertionError, match="was loaded"):
        sample_general(base, cached(base, tmp_path, 5, seed=1), 5, seed=0)


def test_queries_of_another_base_model_are_not_given(base: BaseModel, tmp_path: Path, no_model: Any) -> None:
    other = BaseModel(base.name, base.folder, "0" * 64)
    with pytest.raises(AssertionError, match="was loaded"):
        sample_general(other, cached(base, tmp_path, 5), 5, seed=0)


def test_the_cache_of_queries_lies_in_the_cache_folder(base: BaseModel, tmp_path: Path) -> None:
    assert tmp_path in general_cache(base, BaseModelConfig(cache_dir=tmp_path), 0).parents


@pytest.fixture(scope="module")
def sampled(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight queries of seed 3, how the progress was told, and the configuration with their cache."""
    config = BaseModelConfig(cache_dir=tmp_path_factory.mktemp("cache"))
    told = []
    return sample_general(base, config, 8, 3, lambda *now: told.append(now)), told, config


def test_every_second_query_opens_as_an_instruction(sampled: Any) -> None:
    texts = [query[0]["content"] for query in sampled[0]]
    assert len(set(texts)) == len(texts) == 8
    assert all(text.startswith(OPENINGS) for text in texts[1::2])
    assert not all(text.startswith(OPENINGS) for text in texts[::2])


def test_an_opened_query_says_more_than_its_opening(sampled: Any) -> None:
    assert all(query[0]["content"] not in OPENINGS for query in sampled[0])


def test_queries_are_no_longer_than_allowed(base: BaseModel, sampled: Any) -> None:
    tokenizer = load_tokenizer(base)
    longest = LONGEST_QUERY + max(len(tokenizer(opening)["input_ids"]) for opening in OPENINGS)
    assert all(len(tokenizer(query[0]["content"])["input_ids"]) <= longest for query in sampled[0])


def test_sampled_queries_are_kept_in_the_cache(base: BaseModel, sampled: Any, no_model: Any) -> None:
    queries, told, config = sampled
    assert sample_general(base, config, 8, 3) == queries
    assert sample_general(base, config, 3, 3) == queries[:3]
    assert told[-1] == (8, 8)


@pytest.mark.parametrize(
    ("text", "whole"),
    [("One. Two", "One."), ("One", ""), ("Is it 3.5? Or", "Is it 3.5?"), ("One. Two!", "One. Two!"), ("e.g.x", "")],
)
def test_a_query_that_was_cut_off_ends_with_its_last_whole_sentence(text: str, whole: str) -> None:
    assert module._whole_sentences(text) == whole
