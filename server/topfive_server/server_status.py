"""What is said of the whole server, whichever process is asked: whether it is ready, and its metrics."""

from typing import TYPE_CHECKING, Any, Protocol

from topfive_server.channel import Channel, ChannelClosedError, ChannelError
from topfive_server.errors import NotReadyError
from topfive_server.repository import RepositoryError

if TYPE_CHECKING:
    from topfive_server.app import Application


class ServerStatus(Protocol):
    """The server, of one process or of many."""

    async def readiness(self) -> dict[str, Any]:
        """The body of `/readyz`; its `ready` decides the status."""

    async def healthy(self) -> bool:
        """The same in a word, without sending an image through."""

    async def metrics(self) -> bytes:
        """The exposition text."""


class SingleProcess:
    """One process, which knows everything itself."""

    def __init__(self, application: "Application") -> None:
        self._application = application

    async def readiness(self) -> dict[str, Any]:
        """See `ServerStatus`."""
        rows = []
        everything = not self._application.draining and any(True for _ in self._application.models)
        for model in list(self._application.models):
            ready = not self._application.stuck and await model.ready()
            everything = everything and ready
            why = model.health.reason or self._application.stuck or "the golden image did not come through"
            rows.append(
                {
                    "name": model.info.name,
                    "version": model.info.version,
                    "ready": ready,
                    "reason": "" if ready else why,
                    "provider": model.info.provider,
                    "device": model.info.device,
                }
            )
        return {"ready": everything, "draining": self._application.draining, "models": rows}

    async def healthy(self) -> bool:
        """See `ServerStatus`."""
        application = self._application
        return (
            not application.draining
            and not application.stuck
            and all(m.health.ready for m in application.models)
        )

    async def metrics(self) -> bytes:
        """See `ServerStatus`."""
        return self._application.metrics.render()


class MultiProcess:
    """One of several processes: the parent knows."""

    def __init__(self, parent: Channel) -> None:
        self._parent = parent

    async def readiness(self) -> dict[str, Any]:
        """See `ServerStatus`."""
        body: dict[str, Any] = await self._ask("readiness")
        return body

    async def healthy(self) -> bool:
        """See `ServerStatus`."""
        return bool(await self._ask("healthy"))

    async def metrics(self) -> bytes:
        """See `ServerStatus`."""
        text: str = await self._ask("metrics")
        return text.encode()

    async def report(self) -> list[dict[str, Any]]:
        """See `admin.Operator`."""
        rows: list[dict[str, Any]] = await self._ask("report")
        return rows

    async def look(self) -> list[dict[str, Any]]:
        """See `admin.Operator`."""
        try:
            rows: list[dict[str, Any]] = await self._ask("look")
        except ChannelError as error:
            raise RepositoryError(str(error)) from error
        return rows

    async def set_canary(self, name: str, share: float) -> list[dict[str, Any]]:
        """See `admin.Operator`."""
        try:
            rows: list[dict[str, Any]] = await self._ask("set_canary", name=name, share=share)
        except ChannelError as error:
            raise ValueError(str(error)) from error
        return rows

    async def _ask(self, what: str, **arguments: Any) -> Any:
        try:
            return await self._parent.ask(what, **arguments)
        except ChannelClosedError as error:
            raise NotReadyError("the server's parent process has ended", retry_after_s=5) from error


def together(answers: dict[int, dict[str, Any] | str], *, draining: bool) -> dict[str, Any]:
    """The body of `/readyz` out of the processes' own, by number; text instead says why there is none."""
    models: dict[tuple[str, str], dict[str, Any]] = {}
    workers = []
    for number, answer in answers.items():
        if isinstance(answer, str):
            workers.append({"worker": number, "ready": False, "reason": answer})
            continue
        reasons = [
            f"{row['name']} version {row['version']}: {row['reason']}"
            for row in answer["models"]
            if not row["ready"]
        ]
        if not reasons and not answer["ready"]:
            reasons = ["it is draining" if answer["draining"] else "it has no model"]
        workers.append({"worker": number, "ready": answer["ready"], "reason": "; ".join(reasons)})
        for row in answer["models"]:
            model = models.setdefault((row["name"], row["version"]), dict(row))
            if row["device"] not in model["device"].split(","):
                model["device"] += f",{row['device']}"
            if not row["ready"]:
                model["ready"] = False
                model["reason"] = f"worker {number}: {row['reason']}"
    ready = not draining and bool(models) and all(worker["ready"] for worker in workers)
    return {"ready": ready, "draining": draining, "models": [*models.values()], "workers": workers}
