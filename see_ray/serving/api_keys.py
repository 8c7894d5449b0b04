"""API keys of the endpoint: reading them, and checking the `Authorization` header."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from see_ray.errors import ConfigError, RequestError


class ApiKeys:
    """The endpoint's API keys. Without any, every request is allowed.

    Attributes:
        required: whether requests need a key.
    """

    def __init__(self, keys: Iterable[str] = ()):
        self._keys = tuple(key.encode("utf-8") for key in keys)  # bytes: compare_digest refuses non-ASCII str
        self.required = bool(self._keys)

    @classmethod
    def from_env_and_file(cls, env: Mapping[str, str], file: Path | None) -> ApiKeys:
        """The key in `$SEE_API_KEY` (blank: none), and those in `file`, one per line; blank lines and lines that start
        with # are skipped.

        Raises:
            ConfigError: the file cannot be read, or has no key.
        """
        keys = [env.get("SEE_API_KEY", "").strip()]
        if file is not None:
            try:
                lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read the API key file {file}: {error}") from error
            keys += [line for line in lines if not line.startswith("#")]
            if not any(keys[1:]):
                raise ConfigError(f"the API key file {file} has no key; write one per line")
        return cls(filter(None, keys))

    @property
    def first(self) -> str | None:
        """One of the keys, for a client of this process; None if the endpoint is open."""
        return self._keys[0].decode("utf-8") if self._keys else None

    def check(self, authorization: str | None) -> None:
        """Check the `Authorization` header, decoded as latin-1; it must be `Bearer <key>`.

        Raises:
            RequestError: 401 `invalid_api_key`.
        """
        scheme, _, key = (authorization or "").partition(" ")
        sent = key.strip(" ").encode("latin-1", "backslashreplace")  # back to the bytes on the wire
        # Compare with all keys, always, so that the time taken does not depend on the key sent.
        known = sum(hmac.compare_digest(sent, key) for key in self._keys)
        if self.required and not (known and scheme.lower() == "bearer"):
            message = "the API key is not valid" if sent else "no API key: send Authorization: Bearer <key>"
            raise RequestError(message, status=401, code="invalid_api_key")
