"""Bodies as JSON in the strict sense."""

from collections.abc import Callable
from typing import Any

import pydantic_core
from fastapi import Request
from fastapi.routing import APIRoute

from peerlm.serve.http.problems import Problem


class StrictJson(Request):
    """A request whose body is JSON in the strict sense: no NaN, no half characters, not nested without end."""

    async def json(self) -> Any:
        """The value of the body."""
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise Problem(400, f"the body is no JSON: {error}", code="no_json") from error


class StrictRoute(APIRoute):
    """A route that reads bodies as `StrictJson`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """As of FastAPI."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Any:
            return await handler(StrictJson(request.scope, request.receive))

        return handle
