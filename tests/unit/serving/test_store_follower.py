"""Following a store's head: new versions, cleanup, and what happens when either fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from see_ray.errors import StoreError
from see_ray.serving.live import Live
from see_ray.serving.store_follower import StoreFollower
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence


class Owner:
    """Records how a follower calls it; `failures` are raised by the next calls."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.pending: list[int | None] = []
        self.polls = 0
        self.failures: list[Exception] = []
        self.follower: StoreFollower

    async def on_version(self, head: ExpertSequence, store: ExpertStore) -> Live:
        self.versions.append(head.version)
        self.pending.append(self.follower.live.pending)
        if self.failures:
            raise self.failures.pop()
        return Live(head.version)

    async def on_poll(self) -> None:
        self.polls += 1


@asynccontextmanager
async def following(url: Path) -> AsyncIterator[Owner]:
    owner = Owner()
    owner.follower = StoreFollower(str(url), 0.001, owner.on_version, owner.on_poll)
    task = asyncio.create_task(owner.follower.run())
    yield owner
    assert not task.done()
    task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def publish(tmp_path: Path) -> Callable[[], ExpertRef]:
    """Publishes one more expert in a store at `tmp_path / "store"`."""
    from itertools import count

    store, numbers = ExpertStore.open(str(tmp_path / "store")), count(1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")

    def publish() -> ExpertRef:
        manifest = store.save(
            adapter,
            name=f"expert{next(numbers)}",
            task="t",
            base_model="b",
            fingerprint="f" * 64,
            form="activated",
            activation_tokens=1,
            generation_prompt=(1, 2),
            indicator_tokens=(3, 4),
            threshold=0.5,
            metrics={},
            r=8,
        )
        store.publish(manifest.ref)
        return manifest.ref

    return publish


async def test_each_new_version_is_reported_once(tmp_path: Path, publish: Callable[[], ExpertRef]) -> None:
    async with following(tmp_path / "store") as owner:
        await until(lambda: owner.polls > 2)
        first = owner.follower.live.version
        publish()
        await until(lambda: owner.follower.live.version > first)
        await until(lambda: owner.polls > 10)
    assert owner.versions == [first, first + 1]
    assert owner.pending == owner.versions
    assert owner.follower.live.pending is None


async def test_it_is_ready_once_a_version_is_live(tmp_path: Path, publish: Callable[[], ExpertRef]) -> None:
    async with following(tmp_path / "store") as owner:
        assert not owner.follower.ready.is_set()
        await until(lambda: owner.follower.live.version >= 0)
        assert owner.follower.ready.is_set()


@pytest.mark.parametrize("error", [StoreError("lost"), RuntimeError("broken")])
async def test_a_version_that_failed_is_tried_again(
    tmp_path: Path, publish: Callable[[], ExpertRef], error: Any
) -> None:
    async with following(tmp_path / "store") as owner:
        owner.failures = [error]
        await until(lambda: owner.follower.live.version >= 0)
    assert len(owner.versions) == 2
    assert owner.polls >= 0


async def test_a_store_that_cannot_be_read_changes_nothing_but_the_error(
    tmp_path: Path, publish: Callable[[], ExpertRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    async with following(tmp_path / "store") as owner:
        await until(lambda: owner.follower.live.version > 0)
        live = owner.follower.live

        def unreadable(self: ExpertStore) -> ExpertSequence:
            raise StoreError("no connection")

        with monkeypatch.context() as patch:
            patch.setattr(ExpertStore, "head", unreadable)
            await until(lambda: owner.follower.live.store_error is not None)
            assert owner.follower.live == replace(live, store_error="no connection")
            polls = owner.polls
            await asyncio.sleep(0.05)
            assert owner.polls <= polls + 1, "no cleanup while it is not known what is needed"
        await until(lambda: owner.follower.live.store_error is None)
        assert owner.follower.live == live
