"""Exceptions as HTTP responses with OpenAI's error body."""

from __future__ import annotations

import logging

import ray
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from see_ray.errors import RequestError
from see_ray.serving.openai_responses import error_body

logger = logging.getLogger("ray.serve")


def as_request_error(error: Exception, request_id: str = "") -> RequestError:
    """The error that a client sees. An unexpected one is logged with the request id; its text is not shown."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BackPressureError):
        return RequestError(
            "too many requests are waiting; try again later", 429, "rate_limit_error", code="overloaded"
        )
    if isinstance(error, TimeoutError):
        return RequestError("the request took longer than serve.request_timeout_s", 408, "timeout_error")
    if isinstance(error, DeploymentUnavailableError | ray.exceptions.RayActorError):
        return RequestError("the model is not available at the moment; try again later", 503, "server_error")
    logger.exception("request %s failed", request_id, exc_info=error)
    return RequestError(
        f"internal server error; the server's log has it under request id {request_id}", 500, "server_error"
    )


def error_response(error: RequestError) -> Response:
    """The error as a response, with `Retry-After` where trying again makes sense."""
    headers = {"Retry-After": str(error.retry_after_s or 1)} if error.status in (429, 503) else {}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def unknown_url(request: Request, error: Exception) -> Response:
    """Response to a path or method that the endpoint does not have."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; GET /v1/models and POST /v1/chat/completions exist"
    return error_response(RequestError(message, error.status_code, code="unknown_url"))
