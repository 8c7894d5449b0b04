"""The shared topology beside the endpoint of the other one: the same routes and answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from ray import serve

from see_ray.config import Config
from see_ray.engine.interface import GenerateRequest, SamplingParams
from see_ray.models.activation import encode_prompt
from see_ray.routing.chain import GENERALIST
from see_ray.serving.api_keys import ApiKeys
from see_ray.serving.app_names import ENSEMBLE_APP
from see_ray.serving.endpoint import ingress_app
from see_ray.serving.ensemble import Ensemble, ensemble_app
from see_ray.serving.topology import PerExpert, Shared
from see_ray.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from tests.conftest import Fitted

GREEDY = SamplingParams(max_tokens=12)
ADDRESS = "/shared"


@pytest.fixture(scope="module")
def shared_url(endpoint: str, config: Config) -> Iterator[Any]:
    """A second ingress, under another address of the same server, with an ensemble behind it."""
    settings = config.model_copy(update={"serve": config.serve.model_copy(update={"topology": "shared"})})
    serve.run_many(
        [
            serve.RunTarget(ensemble_app(settings), name=ENSEMBLE_APP, route_prefix=None),
            serve.RunTarget(ingress_app(settings, ApiKeys()), name="see-shared", route_prefix=ADDRESS),
        ]
    )
    url = endpoint + ADDRESS
    while httpx.get(f"{url}/health").status_code != 200:
        time.sleep(0.2)
    yield url
    serve.delete("see-shared")
    serve.delete(ENSEMBLE_APP)


@pytest.fixture(scope="module")
def outcomes(shared_url: Any, config: Config, tokenizer: Any, mixed_queries: Sequence[str]) -> Any:
    """Trace and answer of every tenth mixed query, by topology; per_expert with and without handing prefixes on."""
    deployer = serve.get_deployment_handle("Deployer", "see")
    alone = config.serve.model_copy(update={"share_prefix": False})
    topologies = {
        "per_expert": PerExpert(config.serve, deployer),
        "reading alone": PerExpert(alone, deployer),
        "shared": Shared(config.serve, ENSEMBLE_APP),
    }

    async def ask(topology: Any, live: Any, text: str) -> Any:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        request = GenerateRequest(tuple(prompt), sampling=GREEDY, stream=True)
        trace, chunks = await topology.answer(live, request, None)
        return trace, "".join([chunk.text async for chunk in chunks])

    async def all_of(topology: Any) -> Any:
        live = await topology.live()
        return await asyncio.gather(*(ask(topology, live, text) for text in mixed_queries[::10]))

    return {name: asyncio.run(all_of(topology)) for name, topology in topologies.items()}


def test_both_topologies_route_alike(outcomes: Any) -> None:
    routes = {
        name: [[(a.expert, a.accepted) for a in trace.asked] for trace, _ in found] for name, found in outcomes.items()
    }
    chances = {name: [a.p_accept for trace, _ in found for a in trace.asked] for name, found in outcomes.items()}
    assert routes["shared"] == routes["per_expert"] == routes["reading alone"]
    # What is computed beside other work differs by rounding.
    assert chances["shared"] == pytest.approx(chances["per_expert"], abs=1e-4)
    assert chances["reading alone"] == pytest.approx(chances["per_expert"], abs=1e-4)
    who = {trace.answered_by for trace, _ in outcomes["shared"]}
    assert {GENERALIST, "tickets", "dates"} == who


async def test_a_replica_that_has_just_started_waits_until_it_knows_the_experts(
    experts: Fitted, config: Config, tokenizer: Any
) -> None:
    """Or it would pass everything on to the generalist."""
    here = config.model_copy(update={"serve": config.serve.model_copy(update={"engine": "embedded"})})
    replica = Ensemble(here.model_dump(mode="json"))
    trace = await replica.route(encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}]))
    assert trace.sequence_version == ExpertStore.open(config.store.url).head().version
    assert [asked.expert for asked in trace.asked] == ["dates", "tickets"]
    replica._following.cancel()


def test_both_topologies_answer_alike(outcomes: Any) -> None:
    answers = {name: [answer for _, answer in found] for name, found in outcomes.items()}
    assert answers["shared"] == answers["per_expert"] == answers["reading alone"]


def test_the_shared_topology_speaks_to_the_openai_package(
    shared_url: Any, outcomes: Any, mixed_queries: Sequence[str]
) -> None:
    client = openai.OpenAI(base_url=f"{shared_url}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["see", "see:dates", "see:tickets", "see:generalist"]
    taken = [trace.answered_by == "tickets" for trace, _ in outcomes["shared"]]
    text = mixed_queries[::10][taken.index(True)]
    question: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
    routed = client.chat.completions.create(model="see", **question)
    named = client.chat.completions.create(model="see:tickets", **question)
    assert routed.model_extra["see"]["answered_by"] == "tickets"
    assert routed.choices[0].message.content == named.choices[0].message.content
    streamed = client.chat.completions.create(model="see", **question, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == named.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="see:nobody"):
        client.chat.completions.create(model="see:nobody", **question)


def test_an_expert_joins_and_leaves_the_shared_topology_beside_traffic(
    shared_url: Any, config: Config, experts: Fitted
) -> None:
    store = ExpertStore.open(config.store.url)
    client = openai.OpenAI(base_url=f"{shared_url}/v1", api_key="unused", max_retries=0)

    def names() -> list[str]:
        return [expert["name"] for expert in httpx.get(f"{shared_url}/health").json()["experts"]]

    def within(seconds: float, wanted: bool) -> None:
        until = time.monotonic() + seconds
        while ("upper" in names()) != wanted:
            assert time.monotonic() < until
            answer = client.chat.completions.create(
                model="see", messages=[{"role": "user", "content": "Hello"}], max_tokens=2
            )
            assert answer.choices[0].finish_reason
            time.sleep(0.1)

    before = serve.get_app_handle(ENSEMBLE_APP).about.remote().result()["pid"]
    store.publish(experts.spare["upper"].ref)
    try:
        within(20, True)
        asked = httpx.post(f"{shared_url}/v1/route", json={"model": "see", "prompt": "Hello"}).json()["see"]["asked"]
        assert asked[0]["expert"] == "upper"
    finally:
        store.remove("upper")
    within(20, False)
    assert serve.get_app_handle(ENSEMBLE_APP).about.remote().result()["pid"] == before
