"""Exceptions as OpenAI error responses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from see_ray.errors import RequestError
from see_ray.serving.http_errors import as_request_error, error_response


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("no", 404), 404),
        (BackPressureError(1, 1), 429),
        (TimeoutError(), 408),
        (DeploymentUnavailableError("x"), 503),
        (ActorDiedError(), 503),
        (ValueError("secret"), 500),
    ],
)
def test_each_kind_of_exception_has_its_status(error: Any, status: int) -> None:
    assert as_request_error(error).status == status


def test_the_error_of_a_replica_is_what_it_raised_there() -> None:
    error = RayTaskError("generate", "Traceback …", RequestError("no such expert", 404))
    assert as_request_error(error).message == "no such expert"


def test_an_unexpected_error_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    error = as_request_error(ValueError("secret"), "request-1")
    assert "secret" not in error.message
    assert "request-1" in error.message
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("error", "header"), [(RequestError("", 429, retry_after_s=7), "7"), (RequestError("", 503), "1")]
)
def test_a_client_is_told_when_to_try_again(error: Any, header: str) -> None:
    response = error_response(error)
    assert response.headers["retry-after"] == header


def test_a_lasting_error_has_no_retry_after() -> None:
    response = error_response(RequestError("no", 404, code="model_not_found"))
    assert "retry-after" not in response.headers
    assert json.loads(bytes(response.body))["error"]["code"] == "model_not_found"
