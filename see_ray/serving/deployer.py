"""Keeps the running Serve applications in step with the expert store.

It looks at the head of the sequence every few seconds. A new expert takes over the spare, an application
whose replicas have loaded the base model and wait, or gets an application started for it; once every expert of
the new version runs (or has failed for good), the new version is *live* and the ingress walks it from then on.
Applications that no version needs any more are deleted a little later, when no walk can still be asking them.
Nothing else is touched, so no other replica restarts. After a crash the same look brings everything back.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from see_ray.config import Config
from see_ray.errors import SeeError
from see_ray.serving.replica import replica_app
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence

logger = logging.getLogger("ray.serve")

SPARE = "see-spare-"
EXPERT = "see-expert-"
LINGER_S = 10.0
"""Seconds that an application outlives the last version that needed it; longer than the
ingress takes to notice a new version."""


@dataclass(frozen=True)
class LiveExpert:
    """An expert whose application runs."""

    name: str
    version: int
    threshold: float
    created: int
    app: str
    activated: bool = True


@dataclass(frozen=True)
class Live:
    """What the ingress may walk: the experts of one sequence version, newest first.

    Attributes:
        version: of the sequence; -1 before the first look at the store.
        failed: experts of this version that could not be started, and why.
        pending: a newer version that is being started, or None.
        spare: whether a replica waits for the next expert.
        store_error: why the store could not be read last time, or None.
    """

    version: int = -1
    experts: tuple[LiveExpert, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    pending: int | None = None
    spare: bool = False
    store_error: str | None = None

    @property
    def shares_prefix(self) -> bool:
        """Whether there are experts that go on from what the base model has read."""
        return any(expert.activated for expert in self.experts)

    def after(self, before: Live) -> Live:
        """This, or what was known before, if who says this has not looked at the store yet."""
        return before if self.version < 0 <= before.version else self

    def with_(self, **changes: Any) -> Live:
        """The same but for some fields."""
        return replace(self, **changes)


def app_name(ref: ExpertRef) -> str:
    """Name of the Serve application that is started for an expert; one that took over a spare keeps the spare's."""
    return f"{EXPERT}{ref.name}-{ref.version}"


class Deployer:
    """The one replica that starts and deletes experts' applications."""

    def __init__(self, config: dict[str, Any]):
        self._config = Config.model_validate(config)
        self._live = Live()
        self._unneeded: dict[str, float] = {}
        self._taken: dict[str, ExpertRef] = {}  # spares that have an expert
        self._recovered = False
        self._loop = asyncio.get_running_loop().create_task(self._keep_up())

    async def live(self) -> Live:
        """What may be walked now."""
        return self._live

    async def expert_of(self, spare: str) -> tuple[str, int] | None:
        """Which expert a spare is for; None while it is for none. Replicas that start later ask, too."""
        ref = self._taken.get(spare)
        return (ref.name, ref.version) if ref else None

    async def check_health(self) -> None:
        """Fails when the loop died, so that Serve starts this replica anew."""
        if self._loop.done():
            raise RuntimeError("the deployer's loop ended")

    async def _keep_up(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._look)
            except SeeError as error:  # what runs goes on running; the store may come back
                logger.warning("expert store: %s", error)
                self._live = self._live.with_(store_error=str(error))
            except Exception:
                logger.exception("could not bring the applications in step with the expert store")
            await asyncio.sleep(self._config.serve.poll_s)

    def _look(self) -> None:
        if not self._recovered:
            self._recover()
        store = ExpertStore.open(self._config.store.url)
        head = store.head()
        if head.version != self._live.version:
            self._live = self._live.with_(pending=head.version)
            self._adopt(head, store)
        elif self._live.store_error or self._live.pending is not None:
            self._live = self._live.with_(store_error=None, pending=None)
        for name, since in list(self._unneeded.items()):
            if time.monotonic() - since > LINGER_S:
                serve.delete(name, _blocking=False)
                del self._unneeded[name]
                self._taken.pop(name, None)
        if not self._live.spare and self._config.serve.spare and self._config.serve.min_replicas > 0:
            self._keep_spare()

    def _recover(self) -> None:
        """Learn from spares that were there before this replica which expert they took."""
        for app in [name for name in serve.status().applications if name.startswith(SPARE)]:
            about = _about(app)
            if about is None:  # it may have an expert and must not be given another
                serve.delete(app, _blocking=False)
            elif found := about["expert"]:
                self._taken[app] = ExpertRef(name=found[0], version=found[1])
        self._recovered = True

    def _keep_spare(self) -> None:
        states = self._spares(serve.status().applications)
        # One that failed is not started anew: what failed it would fail the next one, every few seconds.
        if all(status == "DELETING" for status in states.values()):
            name = f"{SPARE}{uuid.uuid4().hex[:6]}"
            _start([serve.RunTarget(replica_app(self._config, None, name), name=name, route_prefix=None)])
        self._live = self._live.with_(spare="RUNNING" in states.values())

    def _spares(self, running: dict[str, Any]) -> dict[str, str]:
        """Status of each spare that no expert has taken over."""
        return {
            name: state.status.value
            for name, state in running.items()
            if name.startswith(SPARE) and name not in self._taken
        }

    def _adopt(self, head: ExpertSequence, store: ExpertStore) -> None:
        running = serve.status().applications
        while any(name in running and running[name].status == "DELETING" for name in map(app_name, head.experts)):
            time.sleep(0.25)  # removed a moment ago and published again: start it anew once it is gone
            running = serve.status().applications
        taken = {ref.id: app for app, ref in self._taken.items() if app in running}
        apps = {ref.id: taken.get(ref.id) or app_name(ref) for ref in head.experts}
        missing = [ref for ref in head.experts if apps[ref.id] not in running]
        spares = [app for app, status in self._spares(running).items() if status in ("RUNNING", "DEPLOYING")]
        for ref in missing[: len(spares)] if len(missing) <= len(spares) else []:  # all at once start as fast as one
            apps[ref.id] = spares.pop()
            self._taken[apps[ref.id]] = ref
            self._live = self._live.with_(spare=False)
        _start(
            [
                serve.RunTarget(replica_app(self._config, ref), name=app_name(ref), route_prefix=None)
                for ref in missing
                if apps[ref.id] == app_name(ref)
            ]
        )
        failed = self._wait(head, apps)
        experts = []
        for ref in head.newest_first():
            if ref.id not in failed:
                manifest = store.manifest(ref)
                created, activated = int(manifest.created_at.timestamp()), manifest.form == "activated"
                experts.append(LiveExpert(ref.name, ref.version, manifest.threshold, created, apps[ref.id], activated))
        self._live = Live(head.version, tuple(experts), failed, spare=self._live.spare)
        now = time.monotonic()
        ours = {name for name in serve.status().applications if name.startswith(EXPERT) or name in self._taken}
        self._unneeded = {name: self._unneeded.get(name, now) for name in ours - set(apps.values())}

    def _wait(self, head: ExpertSequence, apps: dict[str, str]) -> dict[str, str]:
        """Wait until each expert runs or has failed; returns the latter with the reason."""
        while True:
            states = serve.status().applications
            failed: dict[str, str] = {}
            waiting = False
            for ref in head.experts:
                state = states.get(apps[ref.id])
                status = state.status.value if state else "NOT_STARTED"
                if state and status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    failed[ref.id] = _reason(state)
                elif apps[ref.id] in self._taken:
                    about = _about(apps[ref.id]) or {}
                    if about.get("error"):
                        failed[ref.id] = about["error"]
                    else:
                        waiting |= about.get("expert") != (ref.name, ref.version)
                else:
                    waiting |= status in ("NOT_STARTED", "DEPLOYING")
            if not waiting:
                return failed
            time.sleep(0.25)


def _start(targets: list[Any]) -> None:
    if targets:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _about(app: str) -> dict[str, Any] | None:
    """What a replica of an application says of itself; None while none answers."""
    try:
        return dict(serve.get_app_handle(app).about.remote().result(timeout_s=5))
    except (TimeoutError, RayServeException, ray.exceptions.RayError):
        return None


def _reason(state: Any) -> str:
    """The line of Serve's message that names the error, where it has one."""
    text = "\n".join([state.message, *(d.message for d in state.deployments.values())])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line and not line.startswith("File")]
    return (named or lines or ["it did not start"])[-1][:400]
