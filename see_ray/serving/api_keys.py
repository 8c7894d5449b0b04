"""API keys of the endpoint: where they come from, and checking the `Authorization` header."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from see_ray.errors import ConfigError, RequestError


class ApiKeys:
    """The keys that open the endpoint; without any it is open to everyone."""

    def __init__(self, keys: Iterable[str] = ()):
        self._keys = tuple(key.encode("utf-8") for key in keys)  # bytes: compare_digest refuses non-ASCII str
        self.required = bool(self._keys)

    @classmethod
    def from_env_and_file(cls, env: Mapping[str, str], file: Path | None) -> ApiKeys:
        """The key in `$SEE_API_KEY` (blank is unset), and one a line of `file`, where blank lines
        and lines that start with # are skipped. ConfigError if it cannot be read or holds no key."""
        keys = [env.get("SEE_API_KEY", "").strip()]
        if file is not None:
            try:
                lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read the API key file {file}: {error}") from error
            keys += [line for line in lines if not line.startswith("#")]
            if not any(keys[1:]):
                raise ConfigError(f"the API key file {file} holds no key; write one a line")
        return cls(filter(None, keys))

    @property
    def first(self) -> str | None:
        """One of the keys, for a client of this process; None if the endpoint is open."""
        return self._keys[0].decode("utf-8") if self._keys else None

    def check(self, authorization: str | None) -> None:
        """Raise RequestError (401 `invalid_api_key`) unless the header, decoded as latin-1, is `Bearer <key>`."""
        scheme, _, key = (authorization or "").partition(" ")
        given = key.strip(" ").encode("latin-1", "backslashreplace")  # back to the bytes on the wire
        # Every key is compared, always: the time taken does not tell which one was near.
        known = sum(hmac.compare_digest(given, key) for key in self._keys)
        if self.required and not (known and scheme.lower() == "bearer"):
            message = "the API key is not valid" if given else "no API key: send Authorization: Bearer <key>"
            raise RequestError(message, status=401, code="invalid_api_key")
