"""Opening a folder, S3, Google Cloud Storage or Azure as one kind of store, with errors that people can use.

The library is obstore; here are only the rules that all of see_ray's stores share: what a URL may be, how
long to try, and what an error says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from see_ray.errors import StoreError

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION; for a compatible store also AWS_ENDPOINT_URL, "
    "and AWS_ALLOW_HTTP=true for plain http",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}


def open_object_store(url: str | Path, name: str) -> tuple[ObjectStore, str]:
    """Open a folder (made if absent), or `s3://…`, `gs://…`, `az://…`.

    Credentials come from the cloud's own environment variables; the first operation tries them.

    Args:
        url: the place.
        name: what messages call the store, such as `the expert store`.

    Returns:
        The store, and what to call its place.
    """
    url = str(url)
    scheme, separator, _ = url.partition("://")
    with wrap_store_errors(f"open {name}", url):
        if not separator or scheme == "file":
            path = Path(unquote(urlsplit(url).path) if separator else url).expanduser().absolute()
            return LocalStore(path, mkdir=True), str(path)
        if scheme not in _CREDENTIALS:
            raise StoreError(f"cannot open {name} {url}: use a folder, s3://…, gs://… or az://…")
        # With obstore's own limits (10 tries, 3 minutes) a command without network seems to hang.
        client = from_url(url, retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)})
        return client, url.rstrip("/")


@contextmanager
def wrap_store_errors(what: str, url: str) -> Iterator[None]:
    """Turn exceptions of obstore and the file system into a StoreError of one line.

    Args:
        what: what fails then, such as `read sequence/ in the expert store`.
        url: of the store.
    """
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        found = " ".join(str(error).partition("Debug source")[0].split())[:500]
        variables = _CREDENTIALS.get(url.partition("://")[0])
        todo = "check that the folder is there, that you may write to it, and that there is room"
        if variables and not getattr(error, "filename", None):  # a file name: this machine's disk is at fault
            todo = f"check the address, the network and the credentials ({variables})"
        raise StoreError(f"cannot {what} {url}: {found}; {todo}") from error
