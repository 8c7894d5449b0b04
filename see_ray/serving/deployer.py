"""Keeps the Serve applications of the `per_expert` topology in step with the expert store.

    new sequence version ──► assign spares, or start applications ──► wait ──► live
    each poll            ──► delete what no version needs, keep a spare ready

A new expert takes over the spare, an application whose replicas have loaded the base model and wait, or gets an
application of its own. Once every expert of a version runs (or has failed for good), that version is live, and the
ingress routes by it. Applications that no version needs are deleted `LINGER_S` later, when no query can still be asking
them. No other replica restarts. After a crash the next poll restores the same state.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from see_ray.config import Config
from see_ray.serving.app_names import EXPERT_PREFIX, SPARE_PREFIX, expert_app
from see_ray.serving.live import LINGER_S, Live, LiveExpert
from see_ray.serving.replica import replica_app
from see_ray.serving.store_follower import StoreFollower
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence

logger = logging.getLogger("ray.serve")

STATUS_POLL_S = 0.25
"""Seconds between two looks at Serve's status while applications start or go."""


class Deployer:
    """The single replica that starts and deletes the experts' applications.

    Serve's client calls block, so all work on applications runs on a thread, and the event loop is free to answer
    `live` and `expert_of`.

    Args:
        config: the whole configuration, as JSON.
    """

    def __init__(self, config: dict[str, Any]):
        self._config = Config.model_validate(config)
        self._unneeded: dict[str, float] = {}  # application: since when no live version needs it
        self._assigned: dict[str, ExpertRef] = {}  # expert by spare
        self._follower = StoreFollower(
            self._config.store.url, self._config.serve.poll_s, self._deploy_version, self._maintain
        )
        self._following = asyncio.get_running_loop().create_task(self._run())

    async def live(self) -> Live:
        """What the ingress may query now."""
        return self._follower.live

    async def expert_of(self, spare: str) -> tuple[str, int] | None:
        """Name and version of the expert that a spare is assigned to, or None. Replicas that Serve adds to that
        application later ask this, too."""
        ref = self._assigned.get(spare)
        return (ref.name, ref.version) if ref else None

    async def check_health(self) -> None:
        """Called by Serve, which restarts this replica where this raises."""
        if self._following.done():
            raise RuntimeError("the task that follows the expert store ended")

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._restore_assignments)
                break
            except Exception:
                logger.exception("could not read which experts the spares have")
            await asyncio.sleep(self._config.serve.poll_s)
        await self._follower.run()

    def _restore_assignments(self) -> None:
        """Ask each spare that an earlier deployer started which expert it has."""
        for app in [name for name in serve.status().applications if name.startswith(SPARE_PREFIX)]:
            about = _about(app)
            if about is None:  # it may have an expert, so it cannot be assigned another
                serve.delete(app, _blocking=False)
            elif ref := about["expert"]:
                self._assigned[app] = ExpertRef(name=ref[0], version=ref[1])

    # --- a new sequence version ------------------------------------------------------------

    async def _deploy_version(self, head: ExpertSequence, store: ExpertStore) -> Live:
        return await asyncio.to_thread(self._deploy, head, store)

    def _deploy(self, head: ExpertSequence, store: ExpertStore) -> Live:
        """Start what is missing of a version, and wait until all its experts run or have failed."""
        running = _running_once_deleted({expert_app(ref) for ref in head.experts})
        apps = self._assign_apps(head, running)
        _start(
            [
                serve.RunTarget(replica_app(self._config, ref), name=expert_app(ref), route_prefix=None)
                for ref in head.experts
                if apps[ref.id] == expert_app(ref) and expert_app(ref) not in running
            ]
        )
        failed = self._wait(head, apps)
        experts = []
        for ref in head.newest_first():
            if ref.id not in failed:
                manifest = store.manifest(ref)
                created, activated = int(manifest.created_at.timestamp()), manifest.form == "activated"
                experts.append(LiveExpert(ref.name, ref.version, manifest.threshold, created, apps[ref.id], activated))
        now = time.monotonic()
        ours = {n for n in serve.status().applications if n.startswith(EXPERT_PREFIX) or n in self._assigned}
        self._unneeded = {name: self._unneeded.get(name, now) for name in ours - set(apps.values())}
        return Live(head.version, tuple(experts), failed, spare=self._follower.live.spare)

    def _assign_apps(self, head: ExpertSequence, running: dict[str, Any]) -> dict[str, str]:
        """Application by expert id. Spares are assigned if there are enough of them for all missing experts; starting
        several applications takes no longer than starting one."""
        assigned = {ref.id: app for app, ref in self._assigned.items() if app in running}
        apps = {ref.id: assigned.get(ref.id) or expert_app(ref) for ref in head.experts}
        missing = [ref for ref in head.experts if apps[ref.id] not in running]
        spares = [app for app, status in self._spares(running).items() if status in ("RUNNING", "DEPLOYING")]
        if len(missing) <= len(spares):
            for ref in missing:
                apps[ref.id] = spares.pop()
                self._assigned[apps[ref.id]] = ref
                self._set_spare_ready(False)
        return apps

    def _wait(self, head: ExpertSequence, apps: dict[str, str]) -> dict[str, str]:
        """Wait until each expert runs or has failed; returns the reasons of those that failed, by expert id."""
        while True:
            states = serve.status().applications
            failed: dict[str, str] = {}
            waiting = False
            for ref in head.experts:
                state = states.get(apps[ref.id])
                status = state.status.value if state else "NOT_STARTED"
                if state and status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    failed[ref.id] = _failure_reason(state)
                elif apps[ref.id] in self._assigned:
                    about = _about(apps[ref.id]) or {}
                    if about.get("error"):
                        failed[ref.id] = about["error"]
                    else:
                        waiting |= about.get("expert") != (ref.name, ref.version)
                else:
                    waiting |= status in ("NOT_STARTED", "DEPLOYING")
            if not waiting:
                return failed
            time.sleep(STATUS_POLL_S)

    # --- each poll -------------------------------------------------------------------------

    async def _maintain(self) -> None:
        await asyncio.to_thread(self._maintain_apps)

    def _maintain_apps(self) -> None:
        self._delete_unneeded()
        settings = self._config.serve
        if not self._follower.live.spare and settings.spare and settings.min_replicas > 0:
            self._keep_spare()

    def _delete_unneeded(self) -> None:
        for name, since in list(self._unneeded.items()):
            if time.monotonic() - since > LINGER_S:
                serve.delete(name, _blocking=False)
                del self._unneeded[name]
                self._assigned.pop(name, None)

    def _keep_spare(self) -> None:
        states = self._spares(serve.status().applications)
        # A spare that failed is not replaced: the next one would fail for the same reason, at every poll.
        if all(status == "DELETING" for status in states.values()):
            name = f"{SPARE_PREFIX}{uuid.uuid4().hex[:6]}"
            _start([serve.RunTarget(replica_app(self._config, None, name), name=name, route_prefix=None)])
        self._set_spare_ready("RUNNING" in states.values())

    def _spares(self, running: dict[str, Any]) -> dict[str, str]:
        """Status of each spare that is not assigned."""
        return {
            name: state.status.value
            for name, state in running.items()
            if name.startswith(SPARE_PREFIX) and name not in self._assigned
        }

    def _set_spare_ready(self, ready: bool) -> None:
        self._follower.live = replace(self._follower.live, spare=ready)


def _running_once_deleted(names: set[str]) -> dict[str, Any]:
    """Serve's applications, once none of `names` is being deleted: an expert that was removed and is published again
    can only be started when its former application is gone."""
    while True:
        running: dict[str, Any] = serve.status().applications
        if not any(name in running and running[name].status == "DELETING" for name in names):
            return running
        time.sleep(STATUS_POLL_S)


def _start(targets: list[serve.RunTarget]) -> None:
    if targets:
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _about(app: str) -> dict[str, Any] | None:
    """What a replica of an application reports of itself; None while none answers."""
    try:
        return dict(serve.get_app_handle(app).about.remote().result(timeout_s=5))
    except (TimeoutError, RayServeException, ray.exceptions.RayError):
        return None


def _failure_reason(state: Any) -> str:
    """The line of Serve's message that names the error, if there is one."""
    text = "\n".join([state.message, *(deployment.message for deployment in state.deployments.values())])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith("File")]
    return (errors or lines or ["it did not start"])[-1][:400]
