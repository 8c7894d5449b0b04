"""API keys: where they are read from, and which headers they accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from see_ray.errors import ConfigError, RequestError
from see_ray.serving.api_keys import ApiKeys


def refused(call: Any, *args: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args, **fields)
    return caught.value


def as_header(text: str) -> str:
    """The string that an ASGI server makes of a header sent in UTF-8."""
    return text.encode().decode("latin-1")


def test_no_keys_let_everyone_in() -> None:
    keys = ApiKeys.from_env_and_file({}, None)
    assert not keys.required
    keys.check(None)
    keys.check("Bearer anything")


def test_a_blank_variable_is_no_key() -> None:
    assert not ApiKeys.from_env_and_file({"SEE_API_KEY": " "}, None).required


def test_the_variable_and_every_key_of_the_file_open(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the team's\n\n  one  \r\ntwo\n   # not-this\n")
    keys = ApiKeys.from_env_and_file({"SEE_API_KEY": "zero"}, file)
    for key in ("zero", "one", "two"):
        keys.check(f"Bearer {key}")
    for key in ("not-this", "# not-this", "three", "on", "onee"):
        assert refused(keys.check, f"Bearer {key}").status == 401


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic k", "k", "Bearer K", "Bearer k k", "Bearer é", "Bearer ключ", "\ud800"],
)
def test_anything_but_a_key_is_401(header: str | None) -> None:
    error = refused(ApiKeys(["k"]).check, header)
    assert (error.status, error.code) == (401, "invalid_api_key")


def test_the_scheme_is_read_in_any_case() -> None:
    ApiKeys(["k"]).check("bearer k")
    ApiKeys(["k"]).check("BEARER  k")


@pytest.mark.parametrize("key", ["clé", "ключ", "voilà", "\u0405"])  # the last two end in the bytes a0 and 85
def test_keys_beyond_ascii_work(key: str) -> None:
    keys = ApiKeys([key])
    keys.check(as_header(f"Bearer {key}"))
    assert refused(keys.check, as_header(f"Bearer {key}x")).status == 401


def test_a_401_does_not_repeat_the_key() -> None:
    assert "secret" not in refused(ApiKeys(["k-secret"]).check, "Bearer my-secret").message
    assert "secret" not in repr(ApiKeys(["k-secret"]))


def test_a_missing_key_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        ApiKeys.from_env_and_file({"SEE_API_KEY": "k"}, tmp_path / "nowhere")


def test_a_key_file_without_keys_is_a_configuration_error(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n\n")
    with pytest.raises(ConfigError, match="no key"):
        ApiKeys.from_env_and_file({"SEE_API_KEY": "k"}, file)


def test_a_key_file_that_is_not_text_is_a_configuration_error(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        ApiKeys.from_env_and_file({}, file)
