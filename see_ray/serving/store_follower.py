"""Follows the head of an expert store: polls it, and reports each new sequence version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from see_ray.errors import SeeError
from see_ray.serving.live import Live
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertSequence

logger = logging.getLogger("ray.serve")


class StoreFollower:
    """Polls an expert store until cancelled. Its owner runs `run` as a task.

    Args:
        url: of the expert store.
        poll_s: seconds between two polls.
        on_version: called with a sequence version that is not live yet; makes its experts available and returns what
            is live then. If it raises, it is called again at the next poll.
        on_poll: called at the end of each poll, for periodic cleanup; not if the store could not be read.

    Attributes:
        live: what is live. While the store cannot be read it stays the same, but with `store_error` set.
        ready: set once a sequence version is live.
    """

    def __init__(
        self,
        url: str,
        poll_s: float,
        on_version: Callable[[ExpertSequence, ExpertStore], Awaitable[Live]],
        on_poll: Callable[[], Awaitable[None]],
    ):
        self.live = Live()
        self.ready = asyncio.Event()
        self._url = url
        self._poll_s = poll_s
        self._on_version = on_version
        self._on_poll = on_poll

    async def run(self) -> None:
        """Poll until cancelled. Errors are logged; those of the store are also kept in `live.store_error`."""
        while True:
            try:
                await self._poll()
            except SeeError as error:
                logger.warning("expert store: %s", error)
                self.live = replace(self.live, store_error=str(error))
            except Exception:
                logger.exception("could not follow the expert store")
            await asyncio.sleep(self._poll_s)

    async def _poll(self) -> None:
        store, head = await asyncio.to_thread(self._read_head)
        if head.version != self.live.version:
            self.live = replace(self.live, pending=head.version)
            self.live = await self._on_version(head, store)
            self.ready.set()
        elif self.live.store_error or self.live.pending is not None:
            self.live = replace(self.live, store_error=None, pending=None)
        await self._on_poll()

    def _read_head(self) -> tuple[ExpertStore, ExpertSequence]:
        store = ExpertStore.open(self._url)
        return store, store.head()
