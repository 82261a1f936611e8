"""How a client learns that its request is not answered: one form, whatever went wrong and wherever.

`{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`, as the body of a response or as an event of a
stream that has begun.
"""

import errno
import json
from collections.abc import Mapping

import torch
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {429: "rate_limit_error"}
"""Of errors by status; others below 500 are the client's, the rest the server's."""

HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
"""What a status says besides."""

SERVER_FAILED = "The server failed on this request; its log says why."


class RequestError(ValueError):
    """A request that is not answered.

    Args:
        message: What was found, what was expected, what to do.
        param: The field it is about, as the client named it.
        code: A word for programs.
        status: HTTP status of the response.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def as_request_error(error: BaseException) -> RequestError:
    """Tell any error as a client may see it: what is inside the server stays in its log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(str(error.detail), status=error.status_code)
    if _is_shortage(error):
        return RequestError("The server is short of memory, threads or files; try again.", None, "overloaded", 503)
    return RequestError(SERVER_FAILED, status=500)


def error_object(error: RequestError) -> dict:
    """The body of an error."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: BaseException, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response to a request that ended in an error."""
    told = as_request_error(error)
    headers = {**(headers or {}), **HEADERS.get(told.status, {})}
    return JSONResponse(error_object(told), told.status, headers)


def error_event(error: BaseException) -> str:
    """The error as an event of a stream."""
    return f"data: {json.dumps(error_object(as_request_error(error)))}\n\n"


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)
