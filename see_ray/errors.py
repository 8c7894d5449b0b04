"""All errors that users see.

    SeeError
    ├── ConfigError            a setting is missing, misspelt or out of bounds
    ├── BaseModelError         the base model cannot be found or read, or would run code
    │   └── FingerprintError   an expert was fitted on another base model
    ├── TaskError              an arriving task cannot be read
    │   └── BadRowsError       some of its rows cannot be used; lists them
    ├── FitError               fitting an expert failed
    ├── GateError              a fitted expert was set aside
    ├── StoreError             the expert store cannot be read or written
    │   ├── NotFoundError      no such expert or sequence version
    │   └── ConflictError      the change is not possible in the present sequence version
    │       └── LiveError      an expert of that name is live already
    └── ServingError           the endpoint cannot start or cannot answer
        └── RequestError       a request cannot be answered as it stands (HTTP 4xx)

A message says what failed, what was found, and what to do next. These errors cross process boundaries (Ray pickles
them), so every subclass with arguments of its own passes all of them to `super().__init__`.
"""


class SeeError(Exception):
    """Base of all errors that users see; the command line prints the message on one line."""


class ConfigError(SeeError):
    """A setting is missing, misspelt or out of bounds."""


class BaseModelError(SeeError):
    """The base model cannot be found or read, or loading it would run code."""


class FingerprintError(BaseModelError):
    """An expert was fitted on another base model than the present one."""


class TaskError(SeeError):
    """An arriving task cannot be read."""


class BadRowsError(TaskError):
    """Some rows of a task cannot be used.

    Args:
        message: lists the first of them.
        rows: all of them, as (where, reason).
    """

    def __init__(self, message: str, rows: tuple[tuple[str, str], ...]):
        super().__init__(message, rows)
        self.rows = rows

    def __str__(self) -> str:
        return str(self.args[0])


class FitError(SeeError):
    """Fitting an expert failed."""


class GateError(SeeError):
    """A fitted expert failed a limit of the gate and was set aside: stored, but not published."""


class StoreError(SeeError):
    """The expert store cannot be read or written."""


class NotFoundError(StoreError):
    """No such expert or sequence version."""


class ConflictError(StoreError):
    """The change is not possible in the present sequence version."""


class LiveError(ConflictError):
    """An expert of that name is live already."""


class ServingError(SeeError):
    """The endpoint cannot start or cannot answer."""


class RequestError(ServingError):
    """A request cannot be answered as it stands; becomes an OpenAI error body.

    Args:
        message: what is wrong, with the numbers concerned.
        status: HTTP status code.
        type: OpenAI error type, such as `invalid_request_error`.
        param: name of the invalid request field, or None.
        code: OpenAI error code, such as `model_not_found`, or None.
        retry_after_s: seconds after which to try again; None if that would not help.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message, status, type, param, code, retry_after_s)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message
