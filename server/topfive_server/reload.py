"""Keeps what is in service in step with the models folder, without a restart and without losing a request.

A new version is read, warmed up and shown the golden image beside the versions that serve; only then does it take
over, at once or as a canary with a share of the requests. The old version answers what it has accepted, and goes. A
version that fails anywhere on that way, or that dies or fails more often than the old one as a canary, is refused: the
old one stays, and the reason is kept until the version's files change. A version whose folder is removed is taken out,
if another can answer instead.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass
from typing import Any, Final, Protocol

from topfive_server.canary import Canary
from topfive_server.devices import DeviceError
from topfive_server.engine import EngineError, EngineInfo
from topfive_server.errors import RequestError
from topfive_server.folder import Found, Key, Signature, key_of, signature
from topfive_server.repository import ModelVersion, RepositoryError, oldest_first
from topfive_server.session import one_line
from topfive_server.tally import Tally
from topfive_server.variants import Choice

log = logging.getLogger(__name__)


async def _nothing() -> None:
    """What happens around a change where there is one process."""


GUARD_INTERVAL_S: Final = 0.5
"""Seconds between two looks at how canaries fare."""
_FAILURES: Final = (EngineError, DeviceError, RequestError, RepositoryError, OSError, TimeoutError)


class Served(Protocol):
    """A version in service, as `served_model.ServedModel` is."""

    info: EngineInfo
    health: Any
    tally: Tally

    async def close(self) -> None:
        """Answer what has been accepted, then release the device."""


class Registry(Protocol):
    """What is in service, as `models.Models` keeps it."""

    canaries: dict[str, Canary]
    """By model; a model without one is answered by its newest version."""

    def versions(self, name: str) -> dict[str, Any]:
        """The model's versions in service."""

    def names(self) -> list[str]:
        """Models in service."""

    def remove(self, name: str, version: str) -> Any:
        """Take a version out of service and return it."""


@dataclass(frozen=True, kw_only=True)
class ReloadPolicy:
    """Which versions are in service, and how a new one takes over."""

    keep: int = 1
    """Newest versions of each model that stay in service."""
    canary_share: float = 0.0
    """Share of the requests (0-1) that a new version gets at first; 0: it takes over at once."""

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        if not 1 <= self.keep <= 1000:
            raise ValueError(f"keep is {self.keep}; it must be between 1 and 1000")
        if not 0 <= self.canary_share < 1:
            raise ValueError(f"canary_share is {self.canary_share}; it must be at least 0 and below 1")


class Reloader:
    """Looks at the folder and changes what is in service; one look at a time."""

    def __init__(
        self,
        *,
        find: Callable[[], Found],
        load: Callable[[ModelVersion], Awaitable[object]],
        models: Registry,
        policy: ReloadPolicy,
        count: Callable[[str], None] = lambda _result: None,
        before: Callable[[], Awaitable[None]] = _nothing,
        after: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        """Nothing happens until `look` or `watch`.

        Args:
            find: looks at the folder; called in a thread.
            load: brings one version into service, or raises and changes nothing.
            models: what is in service.
            policy: how many versions stay, and how a new one takes over.
            count: told `loaded`, `refused`, `removed` or `rolled-back-...` (`dead`, `failing`, `by-operator`) for the
                metrics.
            before: awaited before the versions' `health` and `tally` are heeded.
            after: awaited when canaries or their shares may have changed.
        """
        self._find = find
        self._load = load
        self._models = models
        self._policy = policy
        self._count = count
        self._before = before
        self._after = after
        self._lock = asyncio.Lock()
        self._seen: dict[Key, Signature] = {}
        """Files of each version at the last look, to tell a copy under way from one that is complete."""
        self._loaded: dict[Key, Signature] = {}
        self._refused: dict[Key, tuple[Signature, str]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def adopt(self, version: ModelVersion) -> None:
        """Note a version that is in service since the start."""
        self._loaded[version.name, version.version] = signature(version)

    async def watch(self, interval_s: float) -> None:
        """Look every `interval_s` seconds, for ever. A version is loaded once its files have stopped changing."""

        async def look() -> None:
            await self.look(settled_only=True)

        await _again_and_again(look, interval_s, "the models folder was not looked at")

    async def guard_canaries(self) -> None:
        """Take canaries back soon after they have died or failed clearly more often than the stable version, for ever."""

        async def guard() -> None:
            if not self._models.canaries:
                return
            await self._before()
            async with self._lock:
                changed = self._roll_back_bad_canaries()
            if changed:
                await self._after()

        await _again_and_again(guard, GUARD_INTERVAL_S, "the canaries were not looked after")

    async def look(self, *, settled_only: bool = False) -> list[dict[str, Any]]:
        """Bring what is in service in step with the folder, and return `status`.

        Versions refused before are tried again, unless `settled_only`: then only when their files have changed, and
        nothing is loaded or refused whose files changed since the last look: they may be being copied.

        Raises:
            RepositoryError: the folder cannot be read or is empty; nothing has changed.
        """
        await self._before()
        async with self._lock:
            self._roll_back_bad_canaries()
            found = await asyncio.to_thread(self._find)
            offered: dict[str, list[Choice]] = {}
            for choice in found.choices:
                offered.setdefault(choice.version.name, []).append(choice)
            for refused in found.refused:
                key = refused.name, refused.version
                if not settled_only or self._seen.get(key) == found.signatures[key]:
                    self._refuse(key, found.signatures[key], refused.reason)
            for name, choices in offered.items():
                await self._update(name, choices, found.signatures, settled_only=settled_only)
            # In this order: a version whose successor was removed is back before that one goes.
            self._remove_vanished(offered, found.signatures)
            for name in offered:
                self._retire(name)
            self._seen = found.signatures
            self._refused = {key: row for key, row in self._refused.items() if key in self._seen}
        await self._after()
        return self.status()

    async def set_canary(self, name: str, share: float) -> list[dict[str, Any]]:
        """Give the model's canary another share; 1 lets it take over, 0 takes it back. Returns `status`.

        Raises:
            ValueError: the model has no canary, or the share is not within 0-1.
        """
        async with self._lock:
            canary = self._models.canaries.get(name)
            if canary is None:
                raise ValueError(f"model {name} has no canary")
            if not 0 <= share <= 1:
                raise ValueError(f"share is {share}; it must be between 0 and 1")
            if share == 0:
                self._roll_back(name, canary, "by-operator", "taken back by an operator")
            elif share == 1:
                del self._models.canaries[name]
                log.info("the canary %s version %s takes over", name, canary.version)
                self._retire(name)
            else:
                canary.share = share
        await self._after()
        return self.status()

    async def report(self) -> list[dict[str, Any]]:
        """`status`, for callers that may have to ask another process."""
        return self.status()

    def status(self) -> list[dict[str, Any]]:
        """Every version in service or refused: `{model, version, state, share, reason}`."""
        rows: list[dict[str, Any]] = []
        for name in self._models.names():
            versions = oldest_first(self._models.versions(name))
            canary = self._models.canaries.get(name)
            for version in versions:
                share = float(version == versions[-1])
                if canary is not None:
                    shares = {canary.version: canary.share, canary.stable: 1 - canary.share}
                    share = shares.get(version, 0.0)
                state = "canary" if canary is not None and version == canary.version else "serving"
                rows.append({"model": name, "version": version, "state": state, "share": share, "reason": ""})
        rows += [
            {"model": name, "version": version, "state": "refused", "share": 0.0, "reason": reason}
            for (name, version), (_, reason) in sorted(self._refused.items())
        ]
        return rows

    async def close(self) -> None:
        """Wait for the versions that are on their way out."""
        if self._closing:
            await asyncio.wait(self._closing)

    # ------------------------------------------------------------------ one model

    async def _update(
        self, name: str, choices: list[Choice], signatures: dict[Key, Signature], *, settled_only: bool
    ) -> None:
        """Load what is new among the newest versions."""
        for choice in choices[-self._policy.keep :]:
            key = key_of(choice.version)
            files = signatures[key]
            if self._loaded.get(key) == files and key[1] in self._models.versions(name):
                continue
            if settled_only and (
                self._seen.get(key) != files or self._refused.get(key, ((), ""))[0] == files
            ):
                continue
            if name in self._models.canaries and key[1] != self._models.canaries[name].version:
                continue  # one trial at a time
            stable = next(reversed(oldest_first(self._models.versions(name))), None)
            as_canary = (
                self._policy.canary_share > 0
                and stable is not None
                and int(key[1]) > int(stable)
                and name not in self._models.canaries
            )
            if as_canary:
                assert stable is not None  # noqa: S101
                # Before it is in service: not one request more than its share may reach it.
                self._models.canaries[name] = Canary(version=key[1], stable=stable, share=0.0)
            if await self._bring_in(choice, files) and as_canary:
                self._models.canaries[name].share = self._policy.canary_share
                log.info("%s version %s gets %.0f %% of the requests", *key, 100 * self._policy.canary_share)
            elif as_canary:
                del self._models.canaries[name]

    async def _bring_in(self, choice: Choice, files: Signature) -> bool:
        key = key_of(choice.version)
        try:
            await self._load(choice.version)
        except Exception as error:
            if not isinstance(error, _FAILURES):
                log.exception("loading %s version %s failed in an unforeseen way", *key)
            self._refuse(key, files, one_line(error))
            return False
        self._loaded[key] = files
        self._refused.pop(key, None)
        self._count("loaded")
        log.info("%s version %s took its place: %s", *key, choice.reason)
        return True

    def _refuse(self, key: Key, files: Signature, reason: str) -> None:
        if self._refused.get(key, ((), ""))[1] != reason:
            log.error("%s version %s is refused: %s", *key, reason)
            self._count("refused")
        self._refused[key] = (files, reason)

    def _retire(self, name: str) -> None:
        """Take out of service what is older than the versions to keep; a canary is beside them, not one of them."""
        versions = oldest_first(self._models.versions(name))
        canary = self._models.canaries.get(name)
        settled = [version for version in versions if canary is None or version != canary.version]
        for version in settled[: -self._policy.keep]:
            self._take_out((name, version))

    def _remove_vanished(self, offered: dict[str, list[Choice]], there: Container[Key]) -> None:
        """Take out what is no longer in the folder, as long as something can answer in its place."""
        for name in self._models.names():
            versions = self._models.versions(name)
            others = any(other != name and other in offered for other in self._models.names())
            for version in oldest_first(versions):
                last = len(self._models.versions(name)) == 1 and not (others and not offered.get(name))
                if (name, version) not in there and not last:
                    log.info("%s version %s is gone from the models folder", name, version)
                    self._take_out((name, version))

    def _take_out(self, key: Key) -> None:
        canary = self._models.canaries.get(key[0])
        if canary is not None and key[1] in {canary.version, canary.stable}:
            del self._models.canaries[key[0]]
        model = self._models.remove(*key)
        self._loaded.pop(key, None)
        self._count("removed")
        if model is not None:
            task = asyncio.get_running_loop().create_task(model.close())
            self._closing.add(task)
            task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a version taken out of service did not close: %s", one_line(error))

    # ------------------------------------------------------------------ canaries

    def _roll_back_bad_canaries(self) -> bool:
        """Whether there were any."""
        canaries = list(self._models.canaries.items())
        for name, canary in canaries:
            versions = self._models.versions(name)
            trial, stable = versions.get(canary.version), versions.get(canary.stable)
            if trial is None:
                continue
            if not trial.health.ready:
                self._roll_back(name, canary, "dead", f"the canary died: {trial.health.reason}")
            elif trial.tally.clearly_worse_than(Tally() if stable is None else stable.tally):
                self._roll_back(name, canary, "failing", f"the canary's engine failed on {trial.tally}")
        return len(self._models.canaries) < len(canaries)

    def _roll_back(self, name: str, canary: Canary, why: str, reason: str) -> None:
        key = (name, canary.version)
        files = self._loaded.get(key, ())
        self._take_out(key)
        self._refused[key] = (files, reason)
        self._count(f"rolled-back-{why}")
        log.error("%s version %s is rolled back to version %s: %s", *key, canary.stable, reason)


async def _again_and_again(step: Callable[[], Awaitable[None]], interval_s: float, failed: str) -> None:
    """Do something every `interval_s` seconds; what stops it is logged once, not each time."""
    trouble = ""
    while True:
        await asyncio.sleep(interval_s)
        before, trouble = trouble, ""
        try:
            await step()
        except Exception as error:
            trouble = one_line(error)
            if trouble != before:
                unexpected = not isinstance(error, _FAILURES)
                log.error("%s: %s", failed, trouble, exc_info=unexpected)  # noqa: TRY400
