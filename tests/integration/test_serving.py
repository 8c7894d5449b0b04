"""The endpoint over HTTP: a real Serve on loopback, really fitted experts, the `openai` package."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam

from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import DemoTask
from see_ray.errors import ServingError
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import BaseModel, load_model
from see_ray.routing.chain import ChainEntry, Trace, walk
from see_ray.serving import endpoint as endpoint_module
from see_ray.serving.app_names import expert_app
from see_ray.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from tests.conftest import Fitted

LIVE_WITHIN_S = 15


@pytest.fixture
def client(endpoint: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def ticket(endpoint: str, tasks: dict[str, DemoTask]) -> str:
    """A ticket that is taken for one: an expert of so few rows passes on some of its own."""
    for row in tasks["tickets"].test[:20]:
        if post(endpoint, "/v1/route", messages=chat(row["prompt"])).json()["see"]["answered_by"] == "tickets":
            return row["prompt"]
    raise AssertionError("the expert takes none of 20 tickets")


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def user(text: str) -> list[ChatCompletionMessageParam]:
    """A chat as the openai package types it."""
    return [{"role": "user", "content": text}]


def post(endpoint: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{endpoint}{path}", json=body, timeout=60)


# --- the openai package ------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["see", "see:dates", "see:tickets", "see:generalist"]


def test_one_model_is_shown(client: openai.OpenAI) -> None:
    extra = client.models.retrieve("see:dates").model_extra
    assert extra is not None
    assert extra["parent"] == "see:generalist"


def test_a_routed_answer_names_who_gave_it_and_why(client: openai.OpenAI, ticket: str) -> None:
    answer = client.chat.completions.create(model="see", messages=user(ticket), max_tokens=4)
    assert answer.model_extra is not None
    trace = answer.model_extra["see"]
    assert [asked["expert"] for asked in trace["asked"]] == ["dates", "tickets"]
    assert (trace["answered_by"], trace["reason"]) == ("tickets", "accepted")


def test_the_answering_expert_stands_in_a_header(client: openai.OpenAI, ticket: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model="see", messages=user(ticket), max_tokens=2)
    assert raw.headers["x-see-expert"] == "tickets"


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    question: dict[str, Any] = {
        "model": "see:generalist",
        "messages": chat("What is the capital of France?"),
        "max_tokens": 8,
    }
    whole = client.chat.completions.create(**question).choices[0].message.content
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert len(chunks) > 4
    assert chunks[0].model_extra["see"]["answered_by"] == "generalist"
    assert chunks[-1].usage.completion_tokens > 0


def test_several_answers_differ_and_each_is_repeated_by_its_seed(client: openai.OpenAI) -> None:
    question: dict[str, Any] = {
        "model": "see:generalist",
        "messages": chat("Tell me a story."),
        "max_tokens": 12,
        "temperature": 1.0,
    }
    several = client.chat.completions.create(**question, n=3, seed=5)
    alone = client.chat.completions.create(**question, seed=6)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[1] == alone.choices[0].message.content
    assert several.usage.completion_tokens == 36


def test_a_stream_of_several_answers_names_each_piece(client: openai.OpenAI) -> None:
    question: dict[str, Any] = {
        "model": "see",
        "messages": chat("Tell me a story."),
        "max_tokens": 6,
        "temperature": 1.0,
        "seed": 5,
    }
    whole = [choice.message.content for choice in client.chat.completions.create(**question, n=2).choices]
    pieces = ["", ""]
    for chunk in client.chat.completions.create(**question, n=2, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == whole


def test_log_probabilities_come_with_the_tokens(client: openai.OpenAI, ticket: str) -> None:
    question: dict[str, Any] = {"model": "see:tickets", "messages": chat(ticket), "max_tokens": 6}
    answer = client.chat.completions.create(**question, logprobs=True, top_logprobs=2).choices[0]
    tokens = answer.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)  # greedy
    streamed = client.chat.completions.create(**question, logprobs=True, top_logprobs=2, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token.token for part in pieces if part for token in part.content] == [token.token for token in tokens]


def test_a_bare_completion_is_answered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="see:generalist", prompt="What is the capital of France?", max_tokens=8)
    assert "Paris" in answer.choices[0].text


def test_an_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="see:nobody"):
        client.chat.completions.create(model="see:nobody", messages=user("Hi"))


def test_a_bad_body_is_a_400_that_names_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="see", messages=user("Hi"), temperature=9)


# --- refusals ----------------------------------------------------------------------------------


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(endpoint: str) -> None:
    error = post(endpoint, model="see", messages=chat("word " * 9000)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]
    assert "90" in error["message"]


def test_max_tokens_beyond_the_room_left_is_refused_with_the_numbers(endpoint: str) -> None:
    answer = post(endpoint, model="see", messages=chat("Hi"), max_tokens=8190)
    assert answer.status_code == 400
    assert "8190" in answer.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused_with_both_numbers(endpoint: str, config: Config) -> None:
    answer = post(endpoint, model="see", messages=chat("x" * 1_100_000))
    assert answer.status_code == 400
    assert str(config.serve.max_body_bytes) in answer.json()["error"]["message"].replace(",", "")


def test_an_unknown_address_is_an_openai_error(endpoint: str) -> None:
    answer = httpx.get(f"{endpoint}/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_the_request_id_comes_back(endpoint: str) -> None:
    answer = httpx.get(f"{endpoint}/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_an_open_address_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEE_API_KEY", raising=False)
    with pytest.raises(ServingError, match="--no-auth"):
        endpoint_module.check_exposure(load_config(None, [f"serve.host='{host}'"]))


@pytest.mark.parametrize("allowed", ["serve.host=127.0.0.1", "serve.host=localhost", "serve.no_auth=true"])
def test_loopback_or_a_word_needs_none(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEE_API_KEY", raising=False)
    assert not endpoint_module.check_exposure(load_config(None, [allowed])).required


def test_a_key_is_asked_for_once_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEE_API_KEY", "secret")
    assert endpoint_module.check_exposure(load_config(None, ["serve.host=0.0.0.0"])).required


def test_a_second_endpoint_on_the_same_cluster_is_refused(endpoint: str, config: Config) -> None:
    with pytest.raises(ServingError, match="already"):
        endpoint_module.start(config)


# --- the chain -----------------------------------------------------------------------------------


def test_route_decides_without_answering(endpoint: str, ticket: str) -> None:
    body = post(endpoint, "/v1/route", messages=chat(ticket)).json()
    assert body["see"]["answered_by"] == "tickets"
    assert "choices" not in body


def test_a_named_expert_is_not_asked(endpoint: str) -> None:
    trace = post(endpoint, model="see:tickets", messages=chat("Hi"), max_tokens=1).json()["see"]
    assert (trace["asked"], trace["reason"]) == ([], "named by the request")


def test_lookahead_changes_no_outcome(
    endpoint: str, config: Config, experts: Fitted, tokenizer: Any, mixed_queries: Sequence[str]
) -> None:
    from ray import serve

    handles = {manifest.name: serve.get_app_handle(expert_app(manifest.ref)) for manifest in experts.live}
    links = [ChainEntry(manifest.name, manifest.threshold) for manifest in reversed(experts.live)]

    async def outcome(text: str, lookahead: int) -> tuple[str, str, list[tuple[str, bool]], Trace]:
        prompt = encode_prompt(tokenizer, chat(text))
        trace = await walk(links, lambda name: handles[name].decide.remote(prompt), lookahead=lookahead)
        return trace.answered_by, trace.reason, [(a.expert, a.accepted) for a in trace.asked], trace

    async def both() -> list[tuple[Any, Any]]:
        return [(await outcome(text, 1), await outcome(text, 4)) for text in mixed_queries]

    outcomes = asyncio.run(both())
    assert len(outcomes) == 100
    assert [one[:3] for one, _ in outcomes] == [four[:3] for _, four in outcomes]
    assert {one[0] for one, _ in outcomes} == {"tickets", "dates", "generalist"}
    for one, four in outcomes:  # what is computed beside other work differs by rounding
        chances = [[asked.p_accept for asked in trace.asked] for trace in (one[3], four[3])]
        assert chances[0] == pytest.approx(chances[1], abs=1e-4)


# --- joining a live endpoint ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(endpoint: str, config: Config, experts: Fitted) -> Iterator[Any]:
    """The spare expert `upper` published at the live endpoint; replicas' processes before and
    after, seconds until it was live, and every answer's status while it joined."""
    store = ExpertStore.open(config.store.url)
    until = time.monotonic() + 120
    while not httpx.get(f"{endpoint}/health").json()["spare"] and time.monotonic() < until:
        time.sleep(0.5)  # the replica that the next expert takes over, started with the endpoint
    before = endpoint_module.about_replicas()
    store.publish(experts.spare["upper"].ref)
    began, statuses, seconds = time.monotonic(), [], None
    while seconds is None and time.monotonic() - began < 60:
        statuses.append(post(endpoint, "/v1/route", messages=chat("Hello")).status_code)
        if "upper" in [expert["name"] for expert in httpx.get(f"{endpoint}/health").json()["experts"]]:
            seconds = time.monotonic() - began
        time.sleep(0.3)
    yield before, endpoint_module.about_replicas(), seconds, statuses
    store.remove("upper")


def test_a_published_expert_is_live_soon(joined: Any) -> None:
    assert joined[2] is not None
    assert joined[2] < LIVE_WITHIN_S


def test_no_other_replica_restarts_when_one_joins(joined: Any) -> None:
    before, after, _, _ = joined
    assert before.keys() == {"generalist", "tickets", "dates"}
    assert {name: after[name] for name in before} == before
    assert len({replica["pid"] for replica in after.values()}) == 4


def test_no_request_is_lost_while_one_joins(joined: Any) -> None:
    assert set(joined[3]) == {200}


def test_answers_are_those_of_plain_peft_token_for_token(
    joined: Any,
    endpoint: str,
    config: Config,
    base: BaseModel,
    experts: Fitted,
    tokenizer: Any,
    tasks: dict[str, DemoTask],
) -> None:
    """Every expert and the generalist, through Serve, against PEFT's own greedy generation."""
    from peft import PeftModel
    from transformers import DynamicCache

    store = ExpertStore.open(config.store.url)
    checked = 0
    for manifest in (*experts.live, experts.spare["upper"], None):
        model = load_model(base, config.base_model)
        name = manifest.name if manifest else "generalist"
        rows = tasks[{"upper": "contacts", "generalist": "tickets"}.get(name, name)].test[:3]
        peft = PeftModel.from_pretrained(model, store.fetch(manifest.ref, Path("unused"))).eval() if manifest else None
        for row in rows:
            prompt = encode_prompt(tokenizer, chat(row["prompt"]))
            ids, cache = torch.tensor([prompt]), DynamicCache()
            if peft is None or manifest is None:
                made = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0, len(prompt) :]
            else:
                start = torch.tensor([[*prompt, manifest.indicator_tokens[0]]])
                if manifest.activation_tokens == 1:  # PEFT has no rule for this point: read the prefix without it
                    with peft.disable_adapter(), torch.no_grad():
                        peft.get_base_model()(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
                    made = peft.generate(input_ids=start, past_key_values=cache, max_new_tokens=16, do_sample=False)
                else:
                    made = peft.generate(input_ids=start, max_new_tokens=16, do_sample=False)
                made = made[0, start.shape[1] :]
            tokens = [token for token in made.tolist() if token != tokenizer.eos_token_id]
            answer = post(endpoint, model=f"see:{name}", messages=chat(row["prompt"]), max_tokens=16).json()
            assert answer["choices"][0]["message"]["content"] == tokenizer.decode(tokens, skip_special_tokens=True)
            assert answer["usage"]["completion_tokens"] == len(tokens)
            checked += 1
    assert checked == 12


def test_a_routed_answer_is_the_named_experts_answer(endpoint: str, ticket: str) -> None:
    routed = post(endpoint, model="see", messages=chat(ticket), max_tokens=8).json()
    named = post(endpoint, model="see:tickets", messages=chat(ticket), max_tokens=8).json()
    assert routed["choices"][0]["message"] == named["choices"][0]["message"]
