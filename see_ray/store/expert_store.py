"""The expert store: folders of immutable experts, and a log of sequence versions.

    experts/<name>/<version>/claim           reserves the version number; put if absent
    experts/<name>/<version>/...             the files of the adapter folder
    experts/<name>/<version>/manifest.json   written last: if it exists, the expert is complete
    sequence/00000007.json                   sequence version 7, in full; put if absent

No object is ever overwritten. What is live changes only when a sequence version is appended. If two publishers append
at the same time, one succeeds; the other reads the new head and tries again. A crash leaves at worst a claimed folder
that no sequence version refers to. The same holds in a local folder, on S3, Google Cloud Storage and Azure, since all
of them offer put-if-absent.

The store keeps files, checks their digests and orders the experts; it does not read adapters or judge experts. Callers
of `publish` pass a `check` that does.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from obstore.store import LocalStore, ObjectStore
from pydantic import ValidationError

from see_ray.errors import ConflictError, FingerprintError, LiveError, NotFoundError, StoreError
from see_ray.models.cache import fill_atomically
from see_ray.store.object_store import Objects, open_object_store, wrap_store_errors
from see_ray.store.records import NAME_PATTERN, ExpertRef, ExpertSequence, Manifest, describe, digest, seal, unseal
from see_ray.store.sequence_log import SequenceLog

_REF = re.compile(rf"({NAME_PATTERN})(?:@([1-9][0-9]{{0,8}}))?")
_IN_EXPERT = re.compile(rf"experts/({NAME_PATTERN})/([1-9][0-9]{{0,8}})/(.+)")

Check = Callable[[ExpertSequence], None]
"""Called with the head that an expert would join; it raises to refuse."""


class ExpertStore:
    """An expert store. Threads may share one; other processes open its `url`.

    Every method raises StoreError if the store cannot be reached, or if an object that it needs is corrupt or missing;
    the message names it. Further errors are listed at each method.

    Args:
        store: an obstore store; `open` creates one from a URL.
        url: what messages call it.
    """

    def __init__(self, store: ObjectStore, url: str | None = None):
        self._folder = (store.prefix or Path("/")) if isinstance(store, LocalStore) else None
        # Not str(store): obstore panics when it prints an Azure store set up by environment variables.
        self.url = url or str(self._folder or type(store).__name__)
        self._objects = Objects(store, self.url, "the expert store")
        self._log = SequenceLog(self._objects, self.url)

    @classmethod
    def open(cls, url: str | Path) -> ExpertStore:
        """Open the store in a folder (created if absent), or at `s3://…`, `gs://…`, `az://…`.

        Credentials come from the cloud's own environment variables; they are first used by the first operation.
        """
        store, location = open_object_store(url, "the expert store")
        return cls(store, location)

    # Experts: written once, complete if the manifest exists.

    def save(self, folder: Path, *, name: str, **fields: Any) -> Manifest:
        """Store all files of `folder` as the next version of expert `name`, without making it live.

        Args:
            folder: the adapter's PEFT folder, with whatever else the expert keeps.
            name: the expert's name.
            fields: those of `Manifest` other than version, created_at and files.

        Raises:
            StoreError: also for an invalid field or file name.
        """
        with _wrap(f"save {name} from {folder} in", self.url):
            paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
            if not paths or {"claim", "manifest.json"} & paths.keys():
                contents = f"{folder} holds {', '.join(paths) or 'no files'}"
                raise StoreError(f"cannot save {name}: {contents}; name a folder without claim and manifest.json")
            files = {file: _sha256(path) for file, path in sorted(paths.items())}
        try:
            draft = Manifest(name=name, version=1, created_at=datetime.now(UTC), files=files, **fields)
        except ValidationError as error:
            raise StoreError(f"cannot save {name} from {folder}: {describe(error)}") from error
        ref = self._claim(name)
        for file in files:
            self._objects.upload(_path(ref, file), paths[file])  # the claim keeps others from writing there
        manifest = draft.model_copy(update={"version": ref.version})
        if not self._objects.create(_path(ref, "manifest.json"), seal(manifest, _path(ref, "manifest.json"))):
            raise ConflictError(f"cannot save {ref.id}: another manifest is there already; save it again")
        return manifest

    def _claim(self, name: str) -> ExpertRef:
        """Reserve the next version of an expert."""
        matches = map(_IN_EXPERT.fullmatch, self._objects.list(f"experts/{name}"))
        newest = max((int(match[2]) for match in matches if match), default=0)
        ref, token = ExpertRef(name=name, version=newest + 1), os.urandom(16)
        while not self._objects.create(_path(ref, "claim"), token):
            ref = ExpertRef(name=name, version=ref.version + 1)
        return ref

    def experts(self) -> list[Manifest]:
        """The manifests of all complete experts, live or not, in order of creation."""
        with ThreadPoolExecutor(16) as pool:  # in a bucket, a read is mostly waiting
            manifests = pool.map(self.manifest, self._complete("experts"))
            return sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.id))

    def manifest(self, ref: ExpertRef) -> Manifest:
        """The manifest of an expert. Raises NotFoundError if there is none, or if its upload never finished."""
        path = _path(ref, "manifest.json")
        data = self._objects.read(path)
        if data is None:
            if self._objects.read(_path(ref, "claim")) is not None:
                raise NotFoundError(f"expert {ref.id} is incomplete: {path} was never written; save it again")
            raise self._no_expert(ref.id)
        return unseal(Manifest, data, path, self.url)

    def resolve(self, text: str) -> ExpertRef:
        """The expert that a text names: `sa@2` that version; `sa` the live version, else the newest complete one.

        Raises:
            NotFoundError: there is no such expert.
        """
        match = _REF.fullmatch(text)
        if match is None:
            raise NotFoundError(f"{text!r} is not an expert; write a name such as sa, or sa@2 for one version")
        if match[2]:
            return self.manifest(ExpertRef(name=match[1], version=int(match[2]))).ref
        live = [expert for expert in self.head().experts if expert.name == text]
        if candidates := live or self._complete(f"experts/{text}"):
            return max(candidates, key=lambda ref: ref.version)
        raise self._no_expert(text)

    def fetch(self, ref: ExpertRef, cache: Path) -> Path:
        """A folder with the expert's files, their digests verified.

        In a local store this is the expert's own folder: do not write there. From a bucket it is downloaded once into
        `cache`; any number of processes may do so at the same time.

        Raises:
            NotFoundError: there is no such expert.
        """
        manifest = self.manifest(ref)
        if self._folder is not None:
            folder = self._folder / _path(ref)
        else:  # the digest in the name keeps equal ids of different stores apart
            folder = Path(cache) / f"{ref.name}-{ref.version}-{digest(manifest.model_dump(mode='json'))[:16]}"
        with _wrap(f"fetch {ref.id} into {folder} from", self.url):
            if self._folder is None and not folder.is_dir():
                self._download(manifest, folder)
            _verify(folder, manifest, str(folder))
        return folder

    def _download(self, manifest: Manifest, folder: Path) -> None:
        def fill(target: Path) -> None:
            for name in manifest.files:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                self._objects.download(_path(manifest.ref, name), target / name)
            _verify(target, manifest, f"{self.url}/{_path(manifest.ref)}")

        fill_atomically(folder, fill)

    def read_bytes(self, ref: ExpertRef, file: str) -> bytes:
        """One file of an expert, its digest verified. Raises NotFoundError if there is no such expert or file."""
        manifest = self.manifest(ref)
        if file not in manifest.files:
            raise NotFoundError(f"expert {ref.id} has no file {file}; it has {', '.join(manifest.files)}")
        data = self._objects.read(_path(ref, file)) or b""
        _compare(hashlib.sha256(data).hexdigest(), manifest, file, f"{self.url}/{_path(ref)}")
        return data

    def read_text(self, ref: ExpertRef, file: str) -> str:
        """One UTF-8 file of an expert; raises as `read_bytes` does."""
        with _wrap(f"read {_path(ref, file)} as text from", self.url):
            return self.read_bytes(ref, file).decode("utf-8")

    # The sequence: an append-only log of full snapshots.

    def head(self) -> ExpertSequence:
        """The live sequence: one listing, from the newest version seen before, and one read."""
        return self._log.head()

    def sequence(self, version: int) -> ExpertSequence:
        """One version of the sequence; 0 is empty. Raises NotFoundError if there is no such version."""
        return self._log.read(version)

    def history(self) -> list[ExpertSequence]:
        """All versions that were ever live, oldest first."""
        return self._log.history()

    def at(self, when: datetime) -> ExpertSequence:
        """What was live at a time, found in log2(versions) reads. Raises StoreError if it has no time zone."""
        return self._log.at(when)

    def publish(
        self, ref: ExpertRef, check: Check | None = None, replace: bool = False, forced: bool = False
    ) -> ExpertSequence:
        """Make an expert live, at the newest end of the sequence.

        Args:
            ref: a complete expert.
            check: called with the head that the expert would join; it raises to refuse. Called again with the new head
                each time that another publisher was first.
            replace: remove a live expert of the same name; without it, such an expert is a conflict.
            forced: recorded in the new version, for an expert that failed a limit of the gate.

        Raises:
            NotFoundError: no such expert, or an incomplete one.
            ConflictError: the name is live already, or other publishers were first too many times.
            FingerprintError: the live experts belong to another base model.
        """
        manifest = self.manifest(ref)

        def change(head: ExpertSequence) -> tuple[tuple[ExpertRef, ...], str]:
            live = next((expert for expert in head.experts if expert.name == ref.name), None)
            if live == ref or (live and not replace):
                raise LiveError(f"cannot publish {ref.id}: {live.id} is live already; replace or remove that one")
            others = tuple(expert for expert in head.experts if expert.name != ref.name)
            for other in map(self.manifest, others[-1:]):  # the others have its fingerprint, too
                if other.fingerprint != manifest.fingerprint:
                    new, old = (f"{m.id} was fitted on {m.base_model} ({m.fingerprint})" for m in (manifest, other))
                    raise FingerprintError(f"cannot publish: {new}, but {old} and is live; fit it on that base model")
            if check:
                check(head)
            return (*others, ref), f"publish {ref.id}" + (f" in place of {live.id}" if live else "")

        return self._log.append(change, forced)

    def remove(self, name: str) -> ExpertSequence:
        """Remove an expert from the sequence; its files stay. Raises NotFoundError if none of that name is live."""

        def change(head: ExpertSequence) -> tuple[tuple[ExpertRef, ...], str]:
            live = {expert.name: expert for expert in head.experts}
            if name not in live:
                raise NotFoundError(f"no live expert is called {name}; live are: {', '.join(live) or 'none'}")
            removed = live.pop(name)
            return tuple(live.values()), f"remove {removed.id}"

        return self._log.append(change)

    def roll_back(self, version: int) -> ExpertSequence:
        """Make the list of an older version live again, as a new version; 0 empties the sequence.

        Raises:
            NotFoundError: there is no such version.
            ConflictError: one of its experts no longer exists, or the list is live now.
        """
        target = self.sequence(version).experts
        try:
            for expert in target:
                self.manifest(expert)
        except NotFoundError as error:
            raise ConflictError(f"cannot roll back to {version}: {error}") from error

        def change(head: ExpertSequence) -> tuple[tuple[ExpertRef, ...], str]:
            if head.experts == target:
                raise ConflictError(f"cannot roll back to {version}: version {head.version}, now live, is the same")
            return target, f"roll back to {version}"

        return self._log.append(change)

    def _complete(self, prefix: str) -> list[ExpertRef]:
        matches = (_IN_EXPERT.fullmatch(path) for path in self._objects.list(prefix))
        return [ExpertRef(name=m[1], version=int(m[2])) for m in matches if m and m[3] == "manifest.json"]

    def _no_expert(self, text: str) -> NotFoundError:
        ids = ", ".join(sorted(ref.id for ref in self._complete("experts")))
        return NotFoundError(f"no expert {text} in {self.url}; it has: {ids or 'none'}")


def _path(ref: ExpertRef, file: str = "") -> str:
    return f"experts/{ref.name}/{ref.version}/{file}".rstrip("/")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path, manifest: Manifest, where: str) -> None:
    for file in manifest.files:
        _compare(_sha256(folder / file) if (folder / file).is_file() else None, manifest, file, where)


def _compare(sha256: str | None, manifest: Manifest, file: str, where: str) -> None:
    """Raise StoreError if a file's digest (None: no such file) is not that of the manifest."""
    expected = manifest.files[file]
    if sha256 != expected:
        fault = f"corrupt (sha256 {sha256}, in the manifest {expected})" if sha256 else "missing"
        raise StoreError(f"{where}/{file} is {fault}; restore it from a backup, or fit {manifest.task} again")


def _wrap(action: str, url: str) -> AbstractContextManager[None]:
    return wrap_store_errors(f"{action} the expert store", url)
