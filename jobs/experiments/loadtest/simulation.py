"""A model of the endpoint in simulated time: how it would do with experts, nodes and load that are not here.

    arrivals ──► line (overload.AdmissionController) ──► walk over deployments ──► answer
                                             each: replicas ◄── autoscaling ◄── nodes

A discrete-event simulation (simpy) with service times that were measured. A replica is what the engine is: one
thread that runs pass after pass, each of which reads and decides what has come and takes a step of every answer in
progress; a pass costs a fixed part and something for each of these. `per_expert` asks one deployment
after another, over a prompt that the generalist has read, or each reads itself; `shared` reads once and decides for
all in one pass.
What comes out has the form of a measured run, so that the two can be compared (`jobs/experiments/simulate.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import simpy

from loadtest.generator import Arrival, Outcome
from loadtest.report import Run, Second
from see_ray.config import ServeConfig
from see_ray.errors import RequestError
from see_ray.serving.admission_control import AdmissionController

Steps = Generator[Any, Any, Any]
GENERALIST = "generalist"

SLICE_S = 0.02
"""Seconds for which work holds a processor before others take their turn."""


@dataclass(frozen=True)
class Work:
    """What is done in a pass: seconds that it takes however much there is, and seconds for each piece.

    A pass reads the weights and starts a few hundred operations once, whatever is in it, so work that is done
    together, `one & other`, takes the greater of the fixed parts and the sum of the others.
    """

    fixed: float = 0.0
    each: float = 0.0

    @staticmethod
    def of(alone: float, more: float) -> Work:
        """From the seconds of one piece alone in its pass, and of each more."""
        return Work(max(0.0, alone - more), min(alone, more))

    def __and__(self, other: Work) -> Work:
        return Work(max(self.fixed, other.fixed), self.each + other.each)

    def __mul__(self, pieces: int) -> Work:
        return Work(self.fixed, self.each * pieces) if pieces else Work()

    @property
    def seconds(self) -> float:
        return self.fixed + self.each


@dataclass(frozen=True)
class Times:
    """Seconds of work, on one replica's thread unless said otherwise.

    Attributes:
        read: reading a prompt, without its end (the prefix); `read_more`: each further prompt in the pass.
        decide: one expert's decision over a prefix; `decide_more`: each further prompt's in the pass;
            `decide_also`: each further expert's on the same prompt.
        token: a step of one answer; `token_more`: each further answer in the step.
        hop: what everything but the replicas' computing takes of a processor for each call of a deployment: HTTP,
            Serve, Ray and the kernel.
        hand: taking over what another replica has read.
        start: of a processor, until a replica that is asked for answers; `node`: until a node is there.
        idle: processors that are busy while nothing is asked.
        crowd: by how much work takes longer while all of a machine's processors are at work, which share memory and
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

    def reading(self) -> Work:
        return Work.of(self.read, self.read_more)

    def deciding(self, experts: int = 1) -> Work:
        """Decisions of so many experts on a prompt."""
        one = Work.of(self.decide, self.decide_more)
        return Work(one.fixed, one.each + self.decide_also * (experts - 1)) if experts else Work()

    def writing(self) -> Work:
        return Work.of(self.token, self.token_more)


@dataclass(frozen=True)
class Design:
    """How the endpoint is built and may scale; the names are those of `config.ServeConfig`.

    `cores`: processors of all nodes together where they are one machine, on which replicas wait for each other;
    0: every replica has its own. `prompts_per_pass`: how many fit into `serve.max_num_batched_tokens`.
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
    prompts_per_pass: int = 6

    @staticmethod
    def of(serve: ServeConfig, experts: tuple[str, ...], **more: Any) -> Design:
        """The design of an endpoint with these settings and experts, the one that is asked first at the front."""
        shared = set(Design.__dataclass_fields__) & set(ServeConfig.model_fields)
        return Design(experts=experts, **{name: getattr(serve, name) for name in shared}, **more)


def simulate(coming: Sequence[Arrival], times: Times, design: Design, seconds: float, name: str = "") -> Run:
    """Run arrivals through the model.

    Args:
        coming: their `kind` says who will accept: an expert's name; anything else is the generalist's.
        seconds: length of the load; the run goes on until the last answer.
        name: of the profile, for the report.
    """
    world = _World(times, design)
    world.env.process(world.load(coming))
    world.env.process(world.watch())
    world.env.run(until=world.over(len(coming)))
    return Run(name, f"simulated {design.topology}", seconds, world.outcomes, world.looks)


def work_s(who: str, times: Times, design: Design) -> float:
    """Processor seconds of a query that this expert, or the generalist, answers, and that is alone."""
    world = _World(times, replace(design, cores=0))
    world.env.process(world.load([Arrival(0.0, who, "")]))
    world.env.run(until=world.over(1))
    return world.worked


class _World:
    """Everything that goes on in simulated time."""

    def __init__(self, times: Times, design: Design):
        self.env = simpy.Environment()
        self.times, self.design = times, design
        self.cores = simpy.PriorityResource(self.env, design.cores) if design.cores else None
        self.worked = 0.0
        names = [*design.experts, GENERALIST] if design.topology == "per_expert" else ["shared"]
        self.deployments = {name: _Deployment(self, name) for name in names}
        self.line = AdmissionController(design.max_wait_s, lambda: self.env.now)
        self.outcomes: list[Outcome] = []
        self.looks: list[Second] = []
        self._all = self.env.event()
        self._expected = 0

    def over(self, expected: int) -> simpy.Event:
        """Happens once so many have an outcome."""
        self._expected = expected
        if expected == 0:
            self._all.succeed()
        return self._all

    def load(self, coming: Sequence[Arrival]) -> Steps:
        for arrival in coming:
            yield self.env.timeout(max(0.0, arrival.at - self.env.now))
            self.env.process(self._request(arrival))

    def _request(self, arrival: Arrival) -> Steps:
        who = arrival.kind if arrival.kind in self.design.experts else GENERALIST
        status, retry = 200, None
        try:
            with self.line.admit():
                done = yield from self._first_token(who)
            yield done
        except RequestError as error:
            status, retry = error.status, error.retry_after_s
        seconds = self.env.now - arrival.at
        self.outcomes.append(Outcome(arrival.at, arrival.kind, 0.0, status, seconds, who, retry))
        if len(self.outcomes) == self._expected:
            self._all.succeed()

    def _first_token(self, who: str) -> Steps:
        """The walk, and the answer's first step; gives the event of the answer's end."""
        times, design = self.times, self.design
        if design.topology == "shared":
            replica = yield from self.deployments["shared"].ask(times.reading() & times.deciding(len(design.experts)))
            return (yield from self.deployments["shared"].answer(replica))
        reader = self.env.process(self.deployments[GENERALIST].ask(times.reading())) if design.share_prefix else None
        own = (Work(0.0, times.hand) if reader else times.reading()) & times.deciding()
        replica = None
        waiting: deque[tuple[str, simpy.Process]] = deque()
        ahead = iter(design.experts)
        while True:  # as chain.walk; what is asked too much is not cancelled, since most of it has begun
            while len(waiting) < design.lookahead and (name := next(ahead, None)) is not None:
                waiting.append((name, self.env.process(self.deployments[name].ask(own, reader))))
            if not waiting:
                break
            name, decision = waiting.popleft()
            replica = yield decision
            if name == who:
                break
        # Who answers has read the prompt already, if the answer goes to the replica that decided, or read for all.
        if who == GENERALIST:
            if reader:
                yield reader
            replica = reader.value if reader else None
        return (yield from self.deployments[who].answer(replica, times.reading() if replica is None else None))

    def hop(self) -> Steps:
        """A call of a deployment; before computing, which has a lower priority (`replica.NICE`)."""
        yield from self.busy(self.times.hop, priority=0)

    def busy(self, seconds: float, priority: int = 1) -> Steps:
        """Work on a processor: on one of the machine's where replicas share it, else on one of its own."""
        self.worked += seconds
        if self.cores is None:
            yield self.env.timeout(seconds)
            return
        seconds *= self.design.cores / (self.design.cores - self.times.idle)  # what else runs takes its share
        while seconds > 0:  # in slices, as an operating system lets them take turns
            with self.cores.request(priority) as core:
                yield core
                others = (self.cores.count - 1) / max(1, self.design.cores - 1)
                yield self.env.timeout(min(seconds, SLICE_S) * (1 + (self.times.crowd - 1) * others))
            seconds -= SLICE_S

    def watch(self) -> Steps:
        while True:
            running = {name: len(d.replicas) for name, d in self.deployments.items()}
            self.looks.append(Second(self.env.now, self.nodes(), running))
            yield self.env.timeout(1)

    def nodes(self) -> int:
        """Nodes that the replicas, running and starting, take."""
        held = sum(len(d.replicas) + d.starting for d in self.deployments.values())
        return math.ceil(held / self.design.replicas_per_node)


class _Deployment:
    """Replicas of one application, and who wants how many of them."""

    def __init__(self, world: _World, name: str):
        self.world, self.name = world, name
        self.replicas = [_Replica(world) for _ in range(world.design.min_replicas)]
        self.starting = 0
        self.ongoing = 0
        self._waiting: list[simpy.Event] = []
        if world.design.max_replicas > world.design.min_replicas:
            world.env.process(self._autoscale())

    def ask(self, work: Work, after: simpy.Event | None = None) -> Steps:
        """Work at the replica that has least to do, once `after` has happened; gives the replica."""
        self.ongoing += 1
        try:
            yield from self.world.hop()
            if after:
                yield after
            replica = yield from self._chosen()
            yield replica.work(work)
            return replica
        finally:
            self.ongoing -= 1

    def answer(self, replica: _Replica | None, before: Work | None = None) -> Steps:
        """An answer's first token, after work `before` it; gives the event of its last one."""
        self.ongoing += 1
        yield from self.world.hop()
        if replica is None or replica not in self.replicas:
            replica = yield from self._chosen()
        if before:
            yield replica.work(before)
        first, done = replica.write(self.world.design.tokens)
        done.callbacks.append(lambda event: self._end())
        yield first
        return done

    def _end(self) -> None:
        self.ongoing -= 1

    def _chosen(self) -> Steps:
        while not self.replicas:
            event = self.world.env.event()
            self._waiting.append(event)
            yield event
        return min(self.replicas, key=lambda replica: replica.load())

    def _autoscale(self) -> Steps:
        """As Serve does it: ongoing requests, averaged, over the target; a wish must last before it is granted."""
        env, design = self.world.env, self.world.design
        every = min(1.0, design.look_back_period_s / 3)
        seen: list[float] = []
        up = down = 0.0
        while True:
            yield env.timeout(every)
            seen = [*seen, self.ongoing][-max(1, round(design.look_back_period_s / every)) :]
            wanted = math.ceil(sum(seen) / len(seen) / design.target_ongoing_requests)
            wanted = min(max(wanted, design.min_replicas), design.max_replicas)
            have = len(self.replicas) + self.starting
            up, down = (up + every if wanted > have else 0.0), (down + every if wanted < have else 0.0)
            if not have and self.ongoing:
                wanted, up = max(1, wanted), math.inf  # from zero at once
            if wanted > have and up >= design.upscale_delay_s:
                for _ in range(wanted - have):
                    self.starting += 1
                    env.process(self._start())
                up = 0.0
            elif wanted < len(self.replicas) and down >= design.downscale_delay_s:
                del self.replicas[wanted:]  # what they have to do yet, they do
                down = 0.0

    def _start(self) -> Steps:
        world = self.world
        new_node = world.nodes() > math.ceil((sum(len(d.replicas) + d.starting for d in world.deployments.values()) - 1)
                                             / world.design.replicas_per_node)  # fmt: skip
        if new_node:
            yield world.env.timeout(world.times.node)
        yield from world.busy(world.times.start)
        self.starting -= 1
        if world.nodes() <= world.design.max_nodes:
            self.replicas.append(_Replica(world))
            for event in self._waiting:
                event.succeed()
            self._waiting = []


class _Replica:
    """One thread that runs pass after pass: what has come, and a step of all answers."""

    def __init__(self, world: _World):
        self.world = world
        self._coming: list[tuple[Work, simpy.Event]] = []
        self._writing: list[_Writing] = []
        self._called = world.env.event()
        world.env.process(self._run())

    def load(self) -> int:
        return len(self._coming) + len(self._writing)

    def work(self, work: Work) -> simpy.Event:
        """Put work in; the event happens when it is done."""
        event = self.world.env.event()
        self._coming.append((work, event))
        self._call()
        return event

    def write(self, tokens: int) -> tuple[simpy.Event, simpy.Event]:
        """An answer of so many tokens; the events happen with the first and with the last."""
        answer = _Writing(tokens, self.world.env.event(), self.world.env.event())
        self._writing.append(answer)
        self._call()
        return answer.first, answer.done

    def _call(self) -> None:
        if not self._called.triggered:
            self._called.succeed()

    def _run(self) -> Steps:
        times, most = self.world.times, self.world.design.prompts_per_pass
        while True:
            if not self.load():
                self._called = self.world.env.event()
                yield self._called
            reads, self._coming = self._coming[:most], self._coming[most:]
            steps = list(self._writing)
            done = times.writing() * len(steps)
            for work, _ in reads:
                done &= work
            yield from self.world.busy(done.seconds)
            for _, event in reads:
                event.succeed()
            for answer in steps:
                answer.step()
            self._writing = [answer for answer in self._writing if answer.left > 0]


@dataclass
class _Writing:
    """An answer in progress: tokens that are left, and the events of the first and the last."""

    left: int
    first: simpy.Event
    done: simpy.Event

    def step(self) -> None:
        self.left -= 1
        if not self.first.triggered:
            self.first.succeed()
        if self.left == 0:
            self.done.succeed()
