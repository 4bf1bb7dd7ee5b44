"""What is in service in every worker, kept in step by the parent: a version serves in all of them or in none.

`reload.Reloader` decides, once for all, as it does in a server of one process; here its decisions are carried out. A
version is first prepared in each worker (loaded, warmed up, shown the golden image), and takes over when all have it.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from topfive_server.channel import ChannelError
from topfive_server.engine import EngineError
from topfive_server.folder import Found
from topfive_server.reload import Reloader, ReloadPolicy
from topfive_server.repository import ModelVersion
from topfive_server.served_model import Health
from topfive_server.tally import Tally
from topfive_server.worker_process import WorkerProcess, wait_for_all

if TYPE_CHECKING:
    from topfive_server.canary import Canary

log = logging.getLogger(__name__)


class InService:
    """One version in all workers, as `reload.Reloader` sees it."""

    def __init__(
        self, version: ModelVersion, fingerprint: str, remove: Callable[[ModelVersion], Awaitable[None]]
    ) -> None:
        self.version = version
        self.fingerprint = fingerprint
        self.health = Health(ready=True, reason="")
        self.tally = Tally()
        self._remove = remove

    async def close(self) -> None:
        """Take it out of every worker."""
        await self._remove(self.version)


class Versions:
    """What is in service, as `models.Models` keeps it in one process; a worker that comes back is given all of it."""

    def __init__(self) -> None:
        self.canaries: dict[str, Canary] = {}
        self._versions: dict[str, dict[str, InService]] = {}

    def add(self, entry: InService) -> None:
        """Note a version that every worker has."""
        self._versions.setdefault(entry.version.name, {})[entry.version.version] = entry

    def versions(self, name: str) -> dict[str, InService]:
        """The model's versions in service."""
        return dict(self._versions.get(name, {}))

    def names(self) -> list[str]:
        """Models in service, sorted."""
        return sorted(self._versions)

    def everything(self) -> list[InService]:
        """Every version of every model; of the models the one longest in service first, which may be the default."""
        return [entry for versions in self._versions.values() for entry in versions.values()]

    def remove(self, name: str, version: str) -> InService | None:
        """Take a version out and return it."""
        versions = self._versions.get(name, {})
        entry = versions.pop(version, None)
        if not versions:
            self._versions.pop(name, None)
        return entry

    def shares(self) -> dict[str, dict[str, Any]]:
        """The canaries, to be told to workers."""
        return {
            name: {"version": canary.version, "stable": canary.stable, "share": canary.share}
            for name, canary in self.canaries.items()
        }

    def note_health(self, rows: dict[int, list[list[Any]]]) -> None:
        """What the workers say of their versions, by worker: one that is not ready speaks for all, failures add up."""
        for entry in self.everything():
            key = [entry.version.name, entry.version.version]
            said = [
                (number, row[2:]) for number, versions in rows.items() for row in versions if row[:2] == key
            ]
            reasons = [f"worker {number}: {reason}" for number, (ready, reason, *_) in said if not ready]
            entry.health.ready, entry.health.reason = not reasons, "; ".join(reasons)
            entry.tally = Tally(
                answered=sum(row[2] for _, row in said), failed=sum(row[3] for _, row in said)
            )


class Replicator:
    """Carries out what the reloader decides."""

    def __init__(
        self,
        workers: Mapping[int, WorkerProcess],
        *,
        find: Callable[[], Found],
        policy: ReloadPolicy,
        count: Callable[[str], None],
        patience_s: float,
    ) -> None:
        """`workers`: the last process of each, by number. One that does not answer for `patience_s` hangs."""
        self.versions = Versions()
        self._workers = workers
        self._patience_s = patience_s
        self._changing = asyncio.Lock()
        """Held while what is in service changes, and while a worker that came back is given all of it."""
        self.reloader = Reloader(
            find=find,
            load=self.load,
            models=self.versions,
            policy=policy,
            count=count,
            before=self.ask_health,
            after=self._tell_canaries,
        )

    async def load(self, version: ModelVersion) -> None:
        """Bring a version into service in every worker, or in none.

        Raises:
            EngineError: a worker cannot load it.
        """
        async with self._changing:
            serving = self._serving()
            workers = serving or [*self._workers.values()]
            # While they serve, one goes first: what ends a process on loading must not end all of them.
            first = 1 if serving else len(workers)
            try:
                fingerprints = await wait_for_all(worker.prepare(version) for worker in workers[:first])
                fingerprints += await wait_for_all(worker.prepare(version) for worker in workers[first:])
                if len({*fingerprints}) > 1:
                    raise EngineError(f"the files in {version.path.parent} changed while they were read")  # noqa: TRY301
            except EngineError:
                key = {"name": version.name, "version": version.version}
                await asyncio.gather(*(worker.tell("discard", **key) for worker in workers))
                raise
            self.versions.add(InService(version, fingerprints[0], self._remove))
            await asyncio.gather(*(self._install(worker, version) for worker in workers))

    @contextlib.asynccontextmanager
    async def catching_up(self, worker: WorkerProcess) -> AsyncIterator[None]:
        """Give a worker that came back all that the others have; inside, nothing changes.

        Raises:
            ChannelError, EngineError: it cannot load it, or the files are others by now.
        """
        async with self._changing:
            for entry in self.versions.everything():
                if await worker.prepare(entry.version) != entry.fingerprint:
                    raise ChannelError(
                        f"the files in {entry.version.path.parent} are not those that the others serve"
                    )
                await self._install(worker, entry.version)
            yield

    async def ask_health(self) -> None:
        """Ask every worker how its versions are; one that does not answer hangs, and is ended."""

        async def ask(worker: WorkerProcess) -> None:
            try:
                async with asyncio.timeout(self._patience_s):
                    worker.rows = await worker.channel.ask("health")
            except TimeoutError:
                log.error("worker %d does not answer any more; it is killed", worker.number)  # noqa: TRY400
                worker.kill()
            except ChannelError:
                return  # it has ended, which the parent sees

        serving = self._serving()
        await asyncio.gather(*map(ask, serving))
        self.versions.note_health({worker.number: worker.rows for worker in serving if worker.serving})

    def _serving(self) -> list[WorkerProcess]:
        return [worker for worker in self._workers.values() if worker.serving]

    async def _install(self, worker: WorkerProcess, version: ModelVersion) -> None:
        canaries = self.versions.shares()
        await worker.tell("install", name=version.name, version=version.version, canaries=canaries)

    async def _remove(self, version: ModelVersion) -> None:
        async with self._changing:
            key = {"name": version.name, "version": version.version}
            canaries = self.versions.shares()
            await asyncio.gather(
                *(worker.tell("remove", **key, canaries=canaries) for worker in self._serving())
            )

    async def _tell_canaries(self) -> None:
        async with self._changing:
            canaries = self.versions.shares()
            await asyncio.gather(*(worker.tell("canaries", canaries=canaries) for worker in self._serving()))
