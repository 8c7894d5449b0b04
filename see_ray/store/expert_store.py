"""The expert store: folders of immutable experts, and a log of sequence versions.

    experts/<name>/<version>/claim           reserves the version number; put if absent
    experts/<name>/<version>/...             the files of the adapter folder
    experts/<name>/<version>/manifest.json   written last: its existence means "complete"
    sequence/00000007.json                   the seventh sequence, in full; put if absent

Nothing here is ever written twice. To change what is live is to append a sequence version;
of two publishers that append at once one wins, and the other looks at the new head and tries
again. A crash leaves at worst a claimed folder that nothing refers to. The same holds in a
local folder, on S3, Google Cloud Storage and Azure: each offers put-if-absent.

The store does not know what an adapter is or whether an expert is any good: it keeps files,
checks their digests, and orders them. Whoever publishes brings a `check` for the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, ObjectStore
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from see_ray.errors import ConflictError, FingerprintError, LiveError, NotFoundError, StoreError
from see_ray.store.object_store import open_object_store, wrap_store_errors

_FORMAT = 1
_TRIES = 20  # to append a sequence version; at most about 15 s of waiting
_NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
_REF = re.compile(rf"({_NAME})(?:@([1-9][0-9]{{0,8}}))?")
_IN_EXPERT = re.compile(rf"experts/({_NAME})/([1-9][0-9]{{0,8}})/(.+)")
_SNAPSHOT = re.compile(r"sequence/([0-9]{8})\.json")
# No ".." or leading "/", which would write outside the cache; no "#", which obstore keeps for itself.
_FILE = r"^(\.?[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*\.?[A-Za-z0-9_-][A-Za-z0-9_.-]*$"

Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
Utc = Annotated[AwareDatetime, AfterValidator(lambda when: when.astimezone(UTC))]


class _Record(BaseModel):
    # NaN is refused: it would become null in JSON, and the record unreadable.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ExpertRef(_Record):
    """Which expert: a name and a version, written `sa@2`."""

    name: Name
    version: int = Field(ge=1)

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"


class Manifest(_Record):
    """What an expert is and how to apply it."""

    format: int = Field(default=_FORMAT, ge=1)
    name: Name
    version: int = Field(ge=1)
    created_at: Utc
    task: str
    """The arriving task it was fitted on."""
    base_model: str
    fingerprint: str
    """Of the base model; all experts of one sequence share it."""
    form: Literal["activated", "full"]
    activation_tokens: int | None = Field(default=None, ge=1)
    """How many tokens at the end of the generation prompt are adapted; None in the full form."""
    generation_prompt: tuple[int, ...]
    """Its token ids."""
    indicator_tokens: tuple[int, int]
    """The token ids of (accept, pass)."""
    threshold: float = Field(ge=0, le=1)
    """The expert accepts a query whose P(accept) reaches it."""
    metrics: dict[str, float]
    gate: Literal["passed", "set aside", "forced"] = "passed"
    """`set aside`: it failed a limit of the gate and was not published; `forced`: published nevertheless."""
    gate_failed: tuple[str, ...] = ()
    """The limits that it failed, a sentence each."""
    r: int = Field(ge=1)
    """LoRA rank."""
    files: dict[Annotated[str, Field(pattern=_FILE)], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    """Relative name -> sha256 of the file's bytes."""

    @property
    def ref(self) -> ExpertRef:
        return ExpertRef(name=self.name, version=self.version)

    @property
    def id(self) -> str:
        return self.ref.id

    @model_validator(mode="after")
    def _form_fits(self) -> Self:
        tokens, prompt = self.activation_tokens, len(self.generation_prompt)
        if (self.form == "full") != (tokens is None) or (tokens or 0) > prompt:
            raise ValueError(f"{tokens} activation_tokens of {prompt} do not fit the {self.form} form")
        return self


class ExpertSequence(_Record):
    """One version of the ordered list of live experts."""

    format: int = Field(default=_FORMAT, ge=1)
    version: int = Field(ge=0)
    """0 is the empty sequence of a store where nothing was published yet."""
    created_at: Utc
    """Never earlier than that of the version before, whatever the publishers' clocks say."""
    experts: tuple[ExpertRef, ...]
    """Oldest first, one of a name."""
    change: str
    """What made this version: `publish sa@1`, `remove sa@1`, `roll back to 3`."""
    forced: bool = False
    """Published without a check, at an operator's word."""

    def newest_first(self) -> tuple[ExpertRef, ...]:
        """The experts in the order in which a chain asks them."""
        return self.experts[::-1]


_EMPTY = ExpertSequence(
    version=0, created_at=datetime(1970, 1, 1, tzinfo=UTC), experts=(), change="nothing published yet"
)
Check = Callable[[ExpertSequence], None]
_Change = Callable[[ExpertSequence], tuple[tuple[ExpertRef, ...], str]]
_R = TypeVar("_R", Manifest, ExpertSequence)


class ExpertStore:
    """An expert store. Threads may share one; other processes open its `url`.

    Every method raises StoreError where the store cannot be reached, and where an object that it needs
    is corrupt or gone; the message names it. What a method raises beyond that stands in its own text.

    Args:
        store: an obstore store object; :meth:`open` makes one from a URL.
        url: what messages call it.
    """

    def __init__(self, store: ObjectStore, url: str | None = None):
        self._store = store
        self._folder = (store.prefix or Path("/")) if isinstance(store, LocalStore) else None
        # Not str(store): obstore panics when it prints an Azure store set up by environment variables.
        self.url = url or str(self._folder or type(store).__name__)
        self._known = 0  # the newest sequence version seen; the log only grows, so listings start there

    @classmethod
    def open(cls, url: str | Path) -> ExpertStore:
        """Open the store in a folder (made if absent), or at `s3://…`, `gs://…`, `az://…`.

        Credentials come from the cloud's own environment variables; the first operation tries them.
        """
        store, place = open_object_store(url, "the expert store")
        return cls(store, place)

    # Experts: written once, complete when the manifest is there.

    def save(self, folder: Path, *, name: str, **fields: Any) -> Manifest:
        """Store all files of `folder` as the next version of expert `name`, without making it live.

        `fields` are those of :class:`Manifest`, save version, created_at and files. Raises StoreError
        also for a field or a file name that does not fit.
        """
        with _wrap(f"save {name} from {folder} in", self.url):
            paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
            if not paths or {"claim", "manifest.json"} & paths.keys():
                found = f"{folder} holds {', '.join(paths) or 'no files'}"
                raise StoreError(f"cannot save {name}: {found}; name a folder without claim and manifest.json")
            files = {file: _sha256(path) for file, path in sorted(paths.items())}
        try:
            draft = Manifest(name=name, version=1, created_at=datetime.now(UTC), files=files, **fields)
        except ValidationError as error:
            raise StoreError(f"cannot save {name} from {folder}: {_wrong(error)}") from error
        taken = [int(match[2]) for path in self._list(f"experts/{name}") if (match := _IN_EXPERT.fullmatch(path))]
        ref, token = ExpertRef(name=name, version=max(taken, default=0) + 1), os.urandom(16)
        while not self._create(_path(ref, "claim"), token):
            ref = ExpertRef(name=name, version=ref.version + 1)
        for file in files:
            with _wrap(f"write {_path(ref, file)} in", self.url):  # in parts if large; the claim keeps others off
                obstore.put(self._store, _path(ref, file), paths[file])
        manifest = draft.model_copy(update={"version": ref.version})
        if not self._create(_path(ref, "manifest.json"), _seal(manifest, _path(ref, "manifest.json"))):
            raise ConflictError(f"cannot save {ref.id}: another manifest is there already; save it again")
        return manifest

    def experts(self) -> list[Manifest]:
        """The manifests of all complete experts, live or not, in order of creation."""
        with ThreadPoolExecutor(16) as pool:  # on a bucket, a read is mostly waiting
            found = pool.map(self.manifest, self._complete("experts"))
            return sorted(found, key=lambda manifest: (manifest.created_at, manifest.id))

    def manifest(self, ref: ExpertRef) -> Manifest:
        """The manifest of an expert. Raises NotFoundError if there is none, or its upload never finished."""
        path = _path(ref, "manifest.json")
        data = self._read(path)
        if data is None:
            if self._read(_path(ref, "claim")) is not None:
                raise NotFoundError(f"expert {ref.id} is incomplete: {path} was never written; save it again")
            raise self._no_expert(ref.id)
        return _unseal(Manifest, data, path, self.url)

    def resolve(self, text: str) -> ExpertRef:
        """`sa@2` is that version; `sa` the live one, else the newest complete one; else NotFoundError."""
        match = _REF.fullmatch(text)
        if match is None:
            raise NotFoundError(f"{text!r} is not an expert; write a name such as sa, or sa@2 for one version")
        if match[2]:
            return self.manifest(ExpertRef(name=match[1], version=int(match[2]))).ref
        live = [expert for expert in self.head().experts if expert.name == text]
        if found := live or self._complete(f"experts/{text}"):
            return max(found, key=lambda ref: ref.version)
        raise self._no_expert(text)

    def fetch(self, ref: ExpertRef, cache: Path) -> Path:
        """A folder with the expert's files, their digests verified.

        In a local store it is the expert's own folder: do not write there. From a bucket it is
        downloaded once into `cache`; any number of processes may do so at the same time.
        Raises NotFoundError if there is no such expert.
        """
        manifest = self.manifest(ref)
        if self._folder is not None:
            folder = self._folder / _path(ref)
        else:  # the digest in the name keeps equal ids of different stores apart
            folder = Path(cache) / f"{ref.name}-{ref.version}-{_digest(manifest.model_dump(mode='json'))[:16]}"
        with _wrap(f"fetch {ref.id} into {folder} from", self.url):
            if self._folder is None and not folder.is_dir():
                self._download(manifest, folder)
            _verify(folder, manifest, str(folder))
        return folder

    def _download(self, manifest: Manifest, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            for name in manifest.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                with (partial / name).open("wb") as file:
                    for chunk in obstore.get(self._store, _path(manifest.ref, name)).stream():
                        file.write(chunk)
            _verify(partial, manifest, f"{self.url}/{_path(manifest.ref)}")
            partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
            try:
                partial.rename(folder)
            except OSError:
                if not folder.is_dir():  # if it is one, another process was first, with the same files
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def read_bytes(self, ref: ExpertRef, file: str) -> bytes:
        """One file of an expert, its digest verified. Raises NotFoundError: no such expert, or file in it."""
        manifest = self.manifest(ref)
        if file not in manifest.files:
            raise NotFoundError(f"expert {ref.id} has no file {file}; it has {', '.join(manifest.files)}")
        data = self._read(_path(ref, file)) or b""
        _compare(hashlib.sha256(data).hexdigest(), manifest, file, f"{self.url}/{_path(ref)}")
        return data

    def read_text(self, ref: ExpertRef, file: str) -> str:
        """One UTF-8 file of an expert; raises as :meth:`read_bytes` does."""
        with _wrap(f"read {_path(ref, file)} as text from", self.url):
            return self.read_bytes(ref, file).decode("utf-8")

    # The sequence: an append-only log of full snapshots.

    def head(self) -> ExpertSequence:
        """The live sequence: one listing, from the newest version seen before, and one read."""
        return self.sequence(self._newest())

    def sequence(self, version: int) -> ExpertSequence:
        """One version of the sequence; 0 is empty. Raises NotFoundError if there is no such version."""
        if version == 0:
            return _EMPTY
        data = self._read(_snapshot(version)) if version > 0 else None
        if data is None:
            raise NotFoundError(f"no sequence version {version} in {self.url}; the newest is {self._newest()}")
        return _unseal(ExpertSequence, data, _snapshot(version), self.url)

    def history(self) -> list[ExpertSequence]:
        """All versions that were ever live, oldest first."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.sequence, range(1, self._newest() + 1)))

    def at(self, when: datetime) -> ExpertSequence:
        """What was live at a time, found in log2(versions) reads. Raises StoreError if it has no time zone."""
        if when.tzinfo is None:
            raise StoreError(f"the time {when} has no time zone; add one, such as {when.isoformat()}+00:00")
        versions = range(1, self._newest() + 1)
        return self.sequence(bisect_right(versions, when, key=lambda version: self.sequence(version).created_at))

    def _newest(self) -> int:
        known = self._known
        listed = self._list("sequence", offset=_snapshot(known - 1) if known else None)
        found = {int(match[1]) for path in listed if (match := _SNAPSHOT.fullmatch(path))}
        newest = max(found, default=known)
        for version in range(max(known, 1), newest + 1):
            # A listing made during a publish can show a newer name and not the older one (seen on a
            # local folder), so a gap is only one if a direct look finds nothing either.
            if version not in found and self._read(_snapshot(version)) is None:
                gap = f"{self.url}/{_snapshot(version)}"
                raise StoreError(f"{gap} is missing, although version {newest} was published; restore it from a backup")
        self._known = newest
        return newest

    def publish(
        self, ref: ExpertRef, check: Check | None = None, replace: bool = False, forced: bool = False
    ) -> ExpertSequence:
        """Make an expert live, at the newest end of the sequence.

        Args:
            ref: a complete expert.
            check: called with the head that the expert would join; it raises to refuse. Called again
                with the new head whenever another publisher was first.
            replace: a live expert of the same name leaves; without this it is a conflict.
            forced: recorded in the new version; for a caller that leaves out its check on purpose.

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
            for other in map(self.manifest, others[-1:]):  # one stands for all: none joined another's sequence
                if other.fingerprint != manifest.fingerprint:
                    mine, its = (f"{m.id} was fitted on {m.base_model} ({m.fingerprint})" for m in (manifest, other))
                    raise FingerprintError(f"cannot publish: {mine}, but {its} and is live; fit it on that base model")
            if check:
                check(head)
            return (*others, ref), f"publish {ref.id}" + (f" in place of {live.id}" if live else "")

        return self._append(change, forced)

    def remove(self, name: str) -> ExpertSequence:
        """Take an expert out of the sequence; its files stay. Raises NotFoundError if none of that name is live."""

        def change(head: ExpertSequence) -> tuple[tuple[ExpertRef, ...], str]:
            live = {expert.name: expert for expert in head.experts}
            if name not in live:
                raise NotFoundError(f"no live expert is called {name}; live are: {', '.join(live) or 'none'}")
            gone = live.pop(name)
            return tuple(live.values()), f"remove {gone.id}"

        return self._append(change)

    def roll_back(self, version: int) -> ExpertSequence:
        """Make the list of an older version live again, as a new version; 0 empties the sequence.

        Raises NotFoundError: no such version; ConflictError: one of its experts is gone, or it is live now.
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

        return self._append(change)

    def _append(self, change: _Change, forced: bool = False) -> ExpertSequence:
        for attempt in range(_TRIES):
            head = self.head()
            experts, sentence = change(head)
            now = max(datetime.now(UTC), head.created_at)
            new = ExpertSequence(
                version=head.version + 1, created_at=now, experts=experts, change=sentence, forced=forced
            )
            if self._create(_snapshot(new.version), _seal(new, _snapshot(new.version))):
                return new
            time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
        raise ConflictError(f"other publishers were first {_TRIES} times in a row at {self.url}; try again later")

    def _complete(self, prefix: str) -> list[ExpertRef]:
        matches = (_IN_EXPERT.fullmatch(path) for path in self._list(prefix))
        return [ExpertRef(name=m[1], version=int(m[2])) for m in matches if m and m[3] == "manifest.json"]

    def _no_expert(self, text: str) -> NotFoundError:
        ids = ", ".join(sorted(ref.id for ref in self._complete("experts")))
        return NotFoundError(f"no expert {text} in {self.url}; it has: {ids or 'none'}")

    def _list(self, prefix: str, offset: str | None = None) -> list[str]:
        with _wrap(f"list {prefix}/ in", self.url):
            return [found["path"] for found in obstore.list(self._store, prefix, offset=offset).collect()]

    def _read(self, path: str) -> bytes | None:
        with _wrap(f"read {path} in", self.url):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def _create(self, path: str, data: bytes) -> bool:
        """Write an object unless it exists; True if what is there now is `data`."""
        with _wrap(f"write {path} in", self.url):
            try:
                obstore.put(self._store, path, data, mode="create")
                return True
            except AlreadyExistsError:  # perhaps our own: obstore puts again when the first answer got lost
                return bytes(obstore.get(self._store, path).bytes()) == data


def _path(ref: ExpertRef, file: str = "") -> str:
    return f"experts/{ref.name}/{ref.version}/{file}".rstrip("/")


def _snapshot(version: int) -> str:
    return f"sequence/{version:08d}.json"


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _seal(record: _Record, path: str) -> bytes:
    """A record as JSON with a digest of itself and its place: half-written, edited or moved, it is found out."""
    body = record.model_dump(mode="json")
    return (json.dumps({**body, "sha256": _digest([path, body])}, indent=1) + "\n").encode()


def _unseal(kind: type[_R], data: bytes, path: str, url: str) -> _R:
    try:
        body = json.loads(data)
        if body["format"] > _FORMAT:  # first: a later format may be sealed in another way
            raise StoreError(f"{url}/{path} has format {body['format']}, this see_ray reads {_FORMAT}: upgrade see_ray")
        if body.pop("sha256") != _digest([path, body]):
            raise ValueError("it was edited or moved after it was written")
        return kind.model_validate_json(json.dumps(body))
    except (ValueError, TypeError, KeyError) as error:
        why = _wrong(error) if isinstance(error, ValidationError) else str(error)
        raise StoreError(f"{url}/{path} is corrupt ({len(data)} bytes: {why}); restore it from a backup") from error


def _wrong(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path, manifest: Manifest, where: str) -> None:
    for file in manifest.files:
        _compare(_sha256(folder / file) if (folder / file).is_file() else None, manifest, file, where)


def _compare(found: str | None, manifest: Manifest, file: str, where: str) -> None:
    if found != manifest.files[file]:
        what = f"corrupt (sha256 {found}, in the manifest {manifest.files[file]})" if found else "missing"
        raise StoreError(f"{where}/{file} is {what}; restore it from a backup, or fit {manifest.task} again")


def _wrap(what: str, url: str) -> AbstractContextManager[None]:
    return wrap_store_errors(f"{what} the expert store", url)
