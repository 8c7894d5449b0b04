"""Object stores through obstore: a folder, S3, Google Cloud Storage or Azure behind the same operations.

The expert store and the checkpoints of fits share this module. It decides which URLs are accepted and how long requests
are retried, and turns exceptions into messages that name what to check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from see_ray.errors import StoreError

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION; for a compatible store also AWS_ENDPOINT_URL, "
    "and AWS_ALLOW_HTTP=true for plain http",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}


def open_object_store(url: str | Path, name: str) -> tuple[ObjectStore, str]:
    """Open a folder (created if absent), or `s3://…`, `gs://…`, `az://…`.

    Credentials come from the cloud's own environment variables; they are first used by the first operation.

    Args:
        url: the location.
        name: what error messages call the store, such as `the expert store`.

    Returns:
        The store, and its location for messages: an absolute path or a URL.

    Raises:
        StoreError: the URL is none of these, or the folder cannot be created.
    """
    url = str(url)
    scheme, separator, _ = url.partition("://")
    with wrap_store_errors(f"open {name}", url):
        if not separator or scheme == "file":
            path = Path(unquote(urlsplit(url).path) if separator else url).expanduser().absolute()
            return LocalStore(path, mkdir=True), str(path)
        if scheme not in _CREDENTIALS:
            raise StoreError(f"cannot open {name} {url}: use a folder, s3://…, gs://… or az://…")
        # With obstore's defaults (10 retries, 3 minutes) a command without network seems to hang.
        client = from_url(url, retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)})
        return client, url.rstrip("/")


@contextmanager
def wrap_store_errors(action: str, url: str) -> Iterator[None]:
    """Raise exceptions of obstore and of the file system as a StoreError with a one-line message.

    Args:
        action: what is attempted, such as `read sequence/ in the expert store`; the message starts with `cannot` and
            this.
        url: the store's location. For a bucket, the message names the environment variables of its credentials.
    """
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        reason = " ".join(str(error).partition("Debug source")[0].split())[:500]
        variables = _CREDENTIALS.get(url.partition("://")[0])
        advice = "check that the folder exists, that you may write to it, and that there is room"
        if variables and not getattr(error, "filename", None):  # an error with a file name comes from the local disk
            advice = f"check the address, the network and the credentials ({variables})"
        raise StoreError(f"cannot {action} {url}: {reason}; {advice}") from error


class Objects:
    """Basic operations on an object store. Each raises StoreError if the object store cannot be reached.

    Args:
        store: an obstore store.
        url: its location, for messages.
        name: what messages call it, such as `the expert store`.
    """

    def __init__(self, store: ObjectStore, url: str, name: str):
        self._store, self._url, self._name = store, url, name

    def list(self, prefix: str, offset: str | None = None) -> list[str]:
        """Paths of the objects below `prefix`; with `offset` only those after it in the order of the paths."""
        with self._wrap(f"list {prefix}/ in"):
            return [item["path"] for item in obstore.list(self._store, prefix, offset=offset).collect()]

    def read(self, path: str) -> bytes | None:
        """The object's bytes; None if there is none."""
        with self._wrap(f"read {path} in"):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def create(self, path: str, data: bytes) -> bool:
        """Write an object unless it exists. True if the object holds `data` now."""
        with self._wrap(f"write {path} in"):
            try:
                obstore.put(self._store, path, data, mode="create")
                return True
            except AlreadyExistsError:  # perhaps our own: obstore repeats a put whose answer was lost
                return bytes(obstore.get(self._store, path).bytes()) == data

    def upload(self, path: str, file: Path) -> None:
        """Write a file as an object, in parts if it is large."""
        with self._wrap(f"write {path} in"):
            obstore.put(self._store, path, file)

    def download(self, path: str, file: Path) -> None:
        """Write an object to a file."""
        with self._wrap(f"download {path} to {file} from"), file.open("wb") as stream:
            for chunk in obstore.get(self._store, path).stream():
                stream.write(chunk)

    def _wrap(self, action: str) -> AbstractContextManager[None]:
        return wrap_store_errors(f"{action} {self._name}", self._url)
