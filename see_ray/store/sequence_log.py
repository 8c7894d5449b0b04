"""The log of sequence versions: an object for each, in full, created only if absent.

    sequence/00000001.json, sequence/00000002.json, …

The newest version is the head: what is live. If two publishers append at the same time, one succeeds; the other applies
its change to the new head.
"""

from __future__ import annotations

import random
import re
import time
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from see_ray.errors import ConflictError, NotFoundError, StoreError
from see_ray.store.object_store import Objects
from see_ray.store.records import EMPTY_SEQUENCE, ExpertRef, ExpertSequence, seal, unseal

_TRIES = 20  # to append a sequence version; at most about 15 s of waiting
_VERSION = re.compile(r"sequence/([0-9]{8})\.json")

Change = Callable[[ExpertSequence], tuple[tuple[ExpertRef, ...], str]]
"""From the head to (the experts of the next version, what the change is); it raises to refuse."""


class SequenceLog:
    """The append-only log of a store; its methods are described in `ExpertStore`.

    Args:
        objects: of the store.
        url: of the store, for messages.
    """

    def __init__(self, objects: Objects, url: str):
        self._objects, self._url = objects, url
        self._known = 0  # the newest version seen; the log only grows, so listings start there

    def head(self) -> ExpertSequence:
        return self.read(self._newest())

    def read(self, version: int) -> ExpertSequence:
        if version == 0:
            return EMPTY_SEQUENCE
        data = self._objects.read(_path(version)) if version > 0 else None
        if data is None:
            raise NotFoundError(f"no sequence version {version} in {self._url}; the newest is {self._newest()}")
        return unseal(ExpertSequence, data, _path(version), self._url)

    def history(self) -> list[ExpertSequence]:
        with ThreadPoolExecutor(16) as pool:  # in a bucket, a read is mostly waiting
            return list(pool.map(self.read, range(1, self._newest() + 1)))

    def at(self, when: datetime) -> ExpertSequence:
        if when.tzinfo is None:
            raise StoreError(f"the time {when} has no time zone; add one, such as {when.isoformat()}+00:00")
        versions = range(1, self._newest() + 1)
        return self.read(bisect_right(versions, when, key=lambda version: self.read(version).created_at))

    def append(self, change: Change, forced: bool = False) -> ExpertSequence:
        """Append the version that `change` makes of the head.

        Args:
            change: called again with the new head each time that another publisher was first.
            forced: recorded in the new version.

        Raises:
            ConflictError: other publishers were first too many times.
        """
        for attempt in range(_TRIES):
            head = self.head()
            experts, description = change(head)
            now = max(datetime.now(UTC), head.created_at)
            new = ExpertSequence(
                version=head.version + 1, created_at=now, experts=experts, change=description, forced=forced
            )
            if self._objects.create(_path(new.version), seal(new, _path(new.version))):
                return new
            time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
        raise ConflictError(f"other publishers were first {_TRIES} times in a row at {self._url}; try again later")

    def _newest(self) -> int:
        known = self._known
        paths = self._objects.list("sequence", offset=_path(known - 1) if known else None)
        listed = {int(match[1]) for path in paths if (match := _VERSION.fullmatch(path))}
        newest = max(listed, default=known)
        for version in range(max(known, 1), newest + 1):
            # A listing made during a publish can contain a newer version and lack an older one (seen on a local
            # folder), so a version is missing only if it cannot be read either.
            if version not in listed and self._objects.read(_path(version)) is None:
                missing = f"{self._url}/{_path(version)}"
                raise StoreError(
                    f"{missing} is missing, although version {newest} was published; restore it from a backup"
                )
        self._known = newest
        return newest


def _path(version: int) -> str:
    return f"sequence/{version:08d}.json"
