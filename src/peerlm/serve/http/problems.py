"""What goes wrong with a request, as OpenAI's clients read it: a status and an error object."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from peerlm.errors import shortened

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    499: "client_left",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""The `type` of an error object, by HTTP status."""
NOT_AGAIN = {"x-should-retry": "false"}
"""Tells OpenAI's clients that the same request would fail again."""
_MOST_CHARACTERS = 500


class ErrorObject(BaseModel):
    """What was wrong."""

    message: str
    """One sentence for people."""
    type: str
    """One of `KINDS`."""
    param: str | None = None
    """The field that was wrong."""
    code: str | None = None
    """For programs."""


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorObject


class Problem(Exception):  # noqa: N818  # an answer to a request, not a fault of the server's
    """A request that cannot be answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(
            error=ErrorObject(
                message=shortened(readable(message), _MOST_CHARACTERS), type=KINDS[status], param=param, code=code
            )
        )

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body.model_dump(), status_code=self.status, headers=self.headers)


def readable(text: str) -> str:
    """A text that UTF-8 can write: half a surrogate pair is written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of these statuses."""
    return {status: {"model": ErrorBody, "description": KINDS[status]} for status in statuses}


def answer_problems(app: FastAPI) -> None:
    """Let the app answer every problem with an error object."""

    @app.exception_handler(Problem)
    async def _problem(request: Request, problem: Problem) -> JSONResponse:
        return problem.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return Problem(404, f"there is nothing at {request.url.path}", code="no_such_path").response()
        if error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
            return Problem(405, message, code="wrong_method", headers=error.headers).response()
        return Problem(400, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def _fault(request: Request, error: Exception) -> JSONResponse:
        return Problem(500, "the server failed; its log says more", code="internal_error").response()


def _of_validation(errors: Iterable[Mapping[str, Any]]) -> Problem:
    """The first thing that is wrong with a body, by the field that it is in.

    Where a field may be of several kinds, the one that fits furthest says what is wrong.
    """
    all_errors = list(errors)
    same_field = [error for error in all_errors if error["loc"][:2] == all_errors[0]["loc"][:2]]
    error = max(same_field, key=lambda error: len(error["loc"]))
    place = [str(part) for part in error["loc"] if part != "body"]
    field = place[0] if place else None
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return Problem(400, f"{'.'.join(place) or 'the body'} is missing", param=field)
    if said.startswith("unknown field"):
        return Problem(400, said if field is None else f"{field}: {said}", param=field, code="unknown_field")
    if not place:
        return Problem(400, f"the body must be a JSON object with content-type application/json: {said}")
    return Problem(400, f"{field}: {said}", param=field)
