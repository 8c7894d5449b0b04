"""A discrete-event simulation of the endpoint (simpy), for more experts, nodes and load than a machine has.

    arrivals ──► AdmissionController ──► walk over deployments ──► answer
                                          each: replicas ◄── autoscaling ◄── nodes

Service times are measured (`loadtest.service_times`). A replica is what the engine is: one thread that runs batch after
batch, each of which prefills and decides for what has arrived, and decodes a token of every answer in progress. A batch
costs a fixed part, and something for each of these. `per_expert` asks one deployment after another, over a prompt that
the generalist has prefilled, or each prefills it itself; `shared` prefills once and decides for all in one batch.
The result has the form of a measured run, so that the two can be compared (`jobs/experiments/simulate.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import simpy

from loadtest.generator import Arrival, Outcome
from loadtest.report import ClusterSample, Run
from see_ray.config import ServeConfig
from see_ray.errors import RequestError
from see_ray.routing.chain import GENERALIST
from see_ray.serving.admission_control import AdmissionController

Process = Generator[Any, Any, Any]
"""A simpy process: yields events, and may return a value."""

TIME_SLICE_S = 0.02
"""Seconds for which work holds a processor before others get it."""


@dataclass(frozen=True)
class Work:
    """Work in one batch: seconds that it takes however many items there are, and seconds for the items.

    A batch reads the weights and starts a few hundred operations once, whatever is in it. So work that is batched,
    `one & other`, takes the greater of the fixed parts and the sum of the others.
    """

    fixed: float = 0.0
    items: float = 0.0

    @staticmethod
    def of(alone: float, each_more: float) -> Work:
        """Of one item, from the seconds of one alone in its batch and of each further one."""
        return Work(max(0.0, alone - each_more), min(alone, each_more))

    def __and__(self, other: Work) -> Work:
        return Work(max(self.fixed, other.fixed), self.items + other.items)

    def __mul__(self, count: int) -> Work:
        return Work(self.fixed, self.items * count) if count else Work()

    @property
    def seconds(self) -> float:
        return self.fixed + self.items


@dataclass(frozen=True)
class ServiceTimes:
    """Seconds of work, on one replica's thread unless said otherwise. `times.json` holds these fields.

    Attributes:
        read: prefill of a prompt, without its end (the prefix); `read_more`: of each further prompt in the batch.
        decide: one expert's decision over a prefix; `decide_more`: of each further prompt in the batch;
            `decide_also`: of each further expert on the same prompt.
        token: a decode step of one answer; `token_more`: of each further answer in the batch.
        hop: processor seconds of one call of a deployment beside the replica's computing: HTTP, Serve, Ray, kernel.
        hand: taking over the keys and values that another replica has computed.
        start: processor seconds until a new replica answers.
        node: seconds until a new node is there.
        idle: processors that are busy while there are no requests.
        crowd: factor by which work takes longer while all processors of the machine are busy: they share memory and
            caches, or are two threads of one core.
    """

    read: float
    read_more: float
    decide: float
    decide_more: float
    decide_also: float
    token: float
    token_more: float
    hop: float
    start: float
    node: float
    hand: float = 0.0
    idle: float = 0.0
    crowd: float = 1.0

    def prefill(self) -> Work:
        return Work.of(self.read, self.read_more)

    def decisions(self, experts: int = 1) -> Work:
        """Decisions of so many experts on one prompt."""
        one = Work.of(self.decide, self.decide_more)
        return Work(one.fixed, one.items + self.decide_also * (experts - 1)) if experts else Work()

    def decode(self) -> Work:
        return Work.of(self.token, self.token_more)


@dataclass(frozen=True)
class EndpointDesign:
    """How the endpoint is built and may scale.

    Attributes:
        topology, min_replicas … max_wait_s: as in `see_ray.config.ServeConfig`.
        experts: names, the one that is asked first at the front.
        replicas_per_node, max_nodes: size and number of the nodes.
        cores: processors of the machine that holds all nodes, which replicas then share; 0: each replica has its own.
        tokens: decode steps of an answer.
        prompts_per_batch: prompts that fit into `serve.max_num_batched_tokens`.
    """

    topology: Literal["per_expert", "shared"]
    experts: tuple[str, ...]
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 4
    look_back_period_s: float = 30
    upscale_delay_s: float = 30
    downscale_delay_s: float = 600
    lookahead: int = 1
    share_prefix: bool = False
    max_wait_s: float = 20
    replicas_per_node: int = 1
    max_nodes: int = 1 << 30
    cores: int = 0
    tokens: int = 8
    prompts_per_batch: int = 6

    @staticmethod
    def from_config(serve: ServeConfig, experts: tuple[str, ...], **more: Any) -> EndpointDesign:
        """The design of an endpoint with these settings and experts; `more` sets the other fields."""
        shared = set(EndpointDesign.__dataclass_fields__) & set(ServeConfig.model_fields)
        return EndpointDesign(experts=experts, **{name: getattr(serve, name) for name in shared}, **more)


def simulate(
    arrivals: Sequence[Arrival], times: ServiceTimes, design: EndpointDesign, seconds: float, name: str = ""
) -> Run:
    """Simulate the endpoint under a load.

    Args:
        arrivals: their `kind` is the expert that accepts; any other string means the generalist.
        times: measured service times.
        design: the endpoint.
        seconds: length of the load; the run goes on until the last answer.
        name: of the profile, for the report.
    """
    simulation = _Simulation(times, design)
    simulation.run(arrivals, sample=True)
    return Run(name, f"simulated {design.topology}", seconds, simulation.outcomes, simulation.samples)


def processor_seconds(answered_by: str, times: ServiceTimes, design: EndpointDesign) -> float:
    """Processor seconds of one query, alone at the endpoint, that this expert or the generalist answers."""
    simulation = _Simulation(times, replace(design, cores=0))
    simulation.run([Arrival(0.0, answered_by, "")])
    return simulation.busy_s


class _Simulation:
    """The endpoint, its requests and its machine in simulated time."""

    def __init__(self, times: ServiceTimes, design: EndpointDesign):
        self.env = simpy.Environment()
        self.times, self.design = times, design
        self.busy_s = 0.0
        self.outcomes: list[Outcome] = []
        self.samples: list[ClusterSample] = []
        self._cores = simpy.PriorityResource(self.env, design.cores) if design.cores else None
        names = [*design.experts, GENERALIST] if design.topology == "per_expert" else ["shared"]
        self._deployments = {name: _Deployment(self, name) for name in names}
        self._admission = AdmissionController(design.max_wait_s, lambda: self.env.now)

    def run(self, arrivals: Sequence[Arrival], sample: bool = False) -> None:
        """Run until every arrival has its outcome; with `sample`, sample the cluster once a second."""
        self._all_done = self.env.event()
        self._expected = len(arrivals)
        if not arrivals:
            self._all_done.succeed()
        self.env.process(self._arrive(arrivals))
        if sample:
            self.env.process(self._sample())
        self.env.run(until=self._all_done)

    def _arrive(self, arrivals: Sequence[Arrival]) -> Process:
        for arrival in arrivals:
            yield self.env.timeout(max(0.0, arrival.at - self.env.now))
            self.env.process(self._request(arrival))

    def _request(self, arrival: Arrival) -> Process:
        answered_by = arrival.kind if arrival.kind in self.design.experts else GENERALIST
        status, retry_after = 200, None
        try:
            with self._admission.admit():
                done = yield from self._first_token(answered_by)
            yield done
        except RequestError as error:
            status, retry_after = error.status, error.retry_after_s
        seconds = self.env.now - arrival.at
        self.outcomes.append(Outcome(arrival.at, arrival.kind, 0.0, status, seconds, answered_by, retry_after))
        if len(self.outcomes) == self._expected:
            self._all_done.succeed()

    def _first_token(self, answered_by: str) -> Process:
        """Route a request and decode its first token; returns the event of the answer's end."""
        if self.design.topology == "shared":
            work = self.times.prefill() & self.times.decisions(len(self.design.experts))
            replica = yield from self._deployments["shared"].compute(work)
            return (yield from self._deployments["shared"].generate(replica))
        reader = None
        if self.design.share_prefix:
            reader = self.env.process(self._deployments[GENERALIST].compute(self.times.prefill()))
        replica = yield from self._walk(answered_by, reader)
        # The answer goes to the replica that decided, or that read for all: it has the prompt in its cache.
        if answered_by == GENERALIST:
            if reader:
                yield reader
            replica = reader.value if reader else None
        prefill = self.times.prefill() if replica is None else None
        return (yield from self._deployments[answered_by].generate(replica, prefill))

    def _walk(self, answered_by: str, reader: simpy.Process | None) -> Process:
        """Ask experts as `chain.walk` does, `lookahead` at once; returns the replica that accepted, or None.

        Decisions that turn out to be unneeded are not cancelled, since most of them have begun.
        """
        work = (Work(0.0, self.times.hand) if reader else self.times.prefill()) & self.times.decisions()
        pending: deque[tuple[str, simpy.Process]] = deque()
        ahead = iter(self.design.experts)
        while True:
            while len(pending) < self.design.lookahead and (name := next(ahead, None)) is not None:
                pending.append((name, self.env.process(self._deployments[name].compute(work, reader))))
            if not pending:
                return None
            name, decision = pending.popleft()
            replica = yield decision
            if name == answered_by:
                return replica

    def hop(self) -> Process:
        """Call a deployment. It precedes computing, which replicas do at a lower priority."""
        yield from self.work(self.times.hop, priority=0)

    def work(self, seconds: float, priority: int = 1) -> Process:
        """Work on a processor: one of the machine's where replicas share it, else one of the replica's own."""
        self.busy_s += seconds
        if self._cores is None:
            yield self.env.timeout(seconds)
            return
        seconds *= self.design.cores / (self.design.cores - self.times.idle)  # what else runs takes its share
        while seconds > 0:  # in slices, as an operating system schedules
            with self._cores.request(priority) as core:
                yield core
                others_busy = (self._cores.count - 1) / max(1, self.design.cores - 1)
                yield self.env.timeout(min(seconds, TIME_SLICE_S) * (1 + (self.times.crowd - 1) * others_busy))
            seconds -= TIME_SLICE_S

    def _sample(self) -> Process:
        while True:
            running = {name: len(deployment.replicas) for name, deployment in self._deployments.items()}
            self.samples.append(ClusterSample(self.env.now, self.nodes(), running))
            yield self.env.timeout(1)

    def nodes(self, without: int = 0) -> int:
        """Nodes that the replicas, running and starting, need; `without` so many of them."""
        replicas = sum(len(d.replicas) + d.starting for d in self._deployments.values())
        return math.ceil((replicas - without) / self.design.replicas_per_node)


class _Deployment:
    """The replicas of one application and their autoscaling."""

    def __init__(self, simulation: _Simulation, name: str):
        self.name = name
        self.replicas = [_Replica(simulation) for _ in range(simulation.design.min_replicas)]
        self.starting = 0
        self._simulation = simulation
        self._ongoing = 0
        self._waiting: list[simpy.Event] = []
        if simulation.design.max_replicas > simulation.design.min_replicas:
            simulation.env.process(self._autoscale())

    def compute(self, work: Work, after: simpy.Event | None = None) -> Process:
        """Work at the least loaded replica, once `after` has happened; returns the replica."""
        self._ongoing += 1
        try:
            yield from self._simulation.hop()
            if after:
                yield after
            replica = yield from self._choose_replica()
            yield replica.submit(work)
            return replica
        finally:
            self._ongoing -= 1

    def generate(self, replica: _Replica | None, prefill: Work | None = None) -> Process:
        """Decode the first token of an answer, after its prefill; returns the event of its last token."""
        self._ongoing += 1
        yield from self._simulation.hop()
        if replica is None or replica not in self.replicas:
            replica = yield from self._choose_replica()
        if prefill:
            yield replica.submit(prefill)
        first, done = replica.decode(self._simulation.design.tokens)
        done.callbacks.append(lambda event: self._end())
        yield first
        return done

    def _end(self) -> None:
        self._ongoing -= 1

    def _choose_replica(self) -> Process:
        while not self.replicas:
            event = self._simulation.env.event()
            self._waiting.append(event)
            yield event
        return min(self.replicas, key=lambda replica: replica.load())

    def _autoscale(self) -> Process:
        """As Serve does it: average ongoing requests over the target; a change must be wanted for the delay."""
        env, design = self._simulation.env, self._simulation.design
        interval = min(1.0, design.look_back_period_s / 3)
        history: list[float] = []
        up_s = down_s = 0.0  # for how long more, or fewer, have been wanted
        while True:
            yield env.timeout(interval)
            history = [*history, self._ongoing][-max(1, round(design.look_back_period_s / interval)) :]
            wanted = math.ceil(sum(history) / len(history) / design.target_ongoing_requests)
            wanted = min(max(wanted, design.min_replicas), design.max_replicas)
            current = len(self.replicas) + self.starting
            up_s = up_s + interval if wanted > current else 0.0
            down_s = down_s + interval if wanted < current else 0.0
            if not current and self._ongoing:
                wanted, up_s = max(1, wanted), math.inf  # from zero at once
            if wanted > current and up_s >= design.upscale_delay_s:
                for _ in range(wanted - current):
                    self.starting += 1
                    env.process(self._start())
                up_s = 0.0
            elif wanted < len(self.replicas) and down_s >= design.downscale_delay_s:
                del self.replicas[wanted:]  # these still finish their work
                down_s = 0.0

    def _start(self) -> Process:
        simulation = self._simulation
        if simulation.nodes() > simulation.nodes(without=1):
            yield simulation.env.timeout(simulation.times.node)
        yield from simulation.work(simulation.times.start)
        self.starting -= 1
        if simulation.nodes() <= simulation.design.max_nodes:
            self.replicas.append(_Replica(simulation))
            for event in self._waiting:
                event.succeed()
            self._waiting = []


class _Replica:
    """One thread that runs batch after batch: the work that has arrived, and a token of every answer."""

    def __init__(self, simulation: _Simulation):
        self._simulation = simulation
        self._submitted: list[tuple[Work, simpy.Event]] = []
        self._answers: list[_Answer] = []
        self._wake_up = simulation.env.event()
        simulation.env.process(self._run())

    def load(self) -> int:
        return len(self._submitted) + len(self._answers)

    def submit(self, work: Work) -> simpy.Event:
        """Add work to the next batches; the event happens when it is done."""
        event = self._simulation.env.event()
        self._submitted.append((work, event))
        self._wake()
        return event

    def decode(self, tokens: int) -> tuple[simpy.Event, simpy.Event]:
        """Add an answer of so many tokens; the events happen with its first token and its last."""
        answer = _Answer(tokens, self._simulation.env.event(), self._simulation.env.event())
        self._answers.append(answer)
        self._wake()
        return answer.first, answer.done

    def _wake(self) -> None:
        if not self._wake_up.triggered:
            self._wake_up.succeed()

    def _run(self) -> Process:
        simulation = self._simulation
        limit = simulation.design.prompts_per_batch
        while True:
            if not self.load():
                self._wake_up = simulation.env.event()
                yield self._wake_up
            prompts, self._submitted = self._submitted[:limit], self._submitted[limit:]
            answers = list(self._answers)
            batch = simulation.times.decode() * len(answers)
            for work, _ in prompts:
                batch &= work
            yield from simulation.work(batch.seconds)
            for _, event in prompts:
                event.succeed()
            for answer in answers:
                answer.add_token()
            self._answers = [answer for answer in self._answers if answer.tokens_left > 0]


@dataclass
class _Answer:
    """An answer in progress: tokens that are left, and the events of the first and the last."""

    tokens_left: int
    first: simpy.Event
    done: simpy.Event

    def add_token(self) -> None:
        self.tokens_left -= 1
        if not self.first.triggered:
            self.first.succeed()
        if self.tokens_left == 0:
            self.done.succeed()
