"""The admin routes: look at the models folder now, see what is in service, decide about a canary.

They exist only with `--admin`, which needs API keys; like every other route they then need one.
"""

from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query
from fastapi.responses import JSONResponse

from topfive_server.errors import BadRequestError, NotFoundError
from topfive_server.repository import RepositoryError, shorten


class Operator(Protocol):
    """What the routes ask: `reload.Reloader` here, or that of the parent process."""

    async def report(self) -> list[dict[str, Any]]:
        """Every version in service or refused."""

    async def look(self) -> list[dict[str, Any]]:
        """Bring what is in service in step with the folder; `RepositoryError`: it cannot be read."""

    async def set_canary(self, name: str, share: float) -> list[dict[str, Any]]:
        """Give the model's canary another share; `ValueError`: it has none."""


def add(api: FastAPI, reloader: Operator) -> None:
    """Add the routes to the application."""

    @api.get("/v1/admin/versions", tags=["admin"], summary="Versions in service, on trial and refused")
    async def versions() -> JSONResponse:
        return JSONResponse({"versions": await reloader.report()})

    @api.post("/v1/admin/reload", tags=["admin"], summary="Look at the models folder now")
    async def reload() -> JSONResponse:
        try:
            return JSONResponse({"versions": await reloader.look()})
        except RepositoryError as error:
            raise BadRequestError(f"nothing was changed: {error}") from error

    @api.post("/v1/admin/models/{name}/canary", tags=["admin"], summary="Give a canary another share")
    async def canary(name: str, percent: Annotated[float, Query(ge=0, le=100)]) -> JSONResponse:
        try:
            return JSONResponse({"versions": await reloader.set_canary(name, percent / 100)})
        except ValueError as error:
            raise NotFoundError(f"there is no canary of model {shorten(name)}") from error
