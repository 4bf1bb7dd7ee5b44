"""Which model versions are in service; looked up by the names that clients send, never on disk."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from topfive_server.errors import NotReadyError, UnknownModelError
from topfive_server.repository import oldest_first, shorten
from topfive_server.served_model import ServedModel

if TYPE_CHECKING:
    from topfive_server.canary import Canary


class Models:
    """Served versions by name; swapped between two requests, so that no request sees half a change."""

    def __init__(self, default: str = "") -> None:
        """`default` names the model that answers when a request names none; empty: the one longest in service."""
        self._default = default
        self._versions: dict[str, dict[str, ServedModel]] = {}
        self.canaries: dict[str, Canary] = {}
        """By model: which share of the requests that name no version goes to a version on trial."""

    def add(self, model: ServedModel) -> ServedModel | None:
        """Take a started version into service; returns the one of the same name and version that it replaces."""
        versions = self._versions.setdefault(model.info.name, {})
        old = versions.get(model.info.version)
        versions[model.info.version] = model
        return old

    def remove(self, name: str, version: str) -> ServedModel | None:
        """Take a version out of service; the caller closes it, which answers what it has accepted."""
        versions = self._versions.get(name, {})
        model = versions.pop(version, None)
        if not versions:
            self._versions.pop(name, None)
        return model

    def names(self) -> list[str]:
        """Models in service, sorted."""
        return sorted(self._versions)

    def versions(self, name: str) -> dict[str, ServedModel]:
        """The model's versions in service; empty when there is no such model."""
        return dict(self._versions.get(name, {}))

    def __iter__(self) -> Iterator[ServedModel]:
        """Every version, by name and then oldest first."""
        for name in sorted(self._versions):
            yield from (self._versions[name][version] for version in oldest_first(self._versions[name]))

    def default_name(self) -> str:
        """Name of the model that answers when none is named; empty when there is none."""
        # Not the first by name: a model that is added while running would become the default by what it is called.
        return self._default or next(iter(self._versions), "")

    def is_default(self, model: ServedModel) -> bool:
        """Whether it answers requests that name neither model nor version."""
        name = self.default_name()
        return model.info.name == name and model.info.version == self._default_version(name)

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """The version of that name; by default the newest of the default model that is not on trial.

        Raises:
            UnknownModelError: no such model or version is in service.
            NotReadyError: there is none at all.
        """
        wanted = self.default_name() if name is None else name
        versions = self._versions.get(wanted)
        if versions is None:
            if not self._versions:
                raise NotReadyError("no model is in service", retry_after_s=5)
            raise UnknownModelError(
                f"there is no model {shorten(wanted)}; in service: {', '.join(sorted(self._versions))}"
            )
        if version is None:
            return versions[self._default_version(wanted)]
        if version not in versions:
            raise UnknownModelError(
                f"model {wanted} has no version {shorten(version)}; in service: {', '.join(oldest_first(versions))}"
            )
        return versions[version]

    def pick(
        self, name: str | None = None, version: str | None = None, *, before: ServedModel | None = None
    ) -> ServedModel:
        """The version that answers a request: as `get`, but a canary gets its share.

        A canary whose engine has died gets none.

        `before`: what was picked for the same request, which has been arriving since. It stays, unless it has gone out
        of service: a canary counts a request once, and who was let in by one version is answered by it.

        Raises:
            UnknownModelError, NotReadyError: as `get`.
        """
        if before is not None:
            info = before.info
            if self._versions.get(info.name, {}).get(info.version) is before:
                return before
        if version is None and self.canaries:
            version = self._drawn(self.default_name() if name is None else name)
        return self.get(name, version)

    def _drawn(self, name: str) -> str | None:
        """The version for the next request; None where nothing is on trial."""
        canary = self.canaries.get(name)
        if canary is None:
            return None
        trial = self._versions.get(name, {}).get(canary.version)
        drawn = canary.pick()
        return canary.stable if trial is None or not trial.health.ready else drawn

    def _default_version(self, name: str) -> str:
        canary = self.canaries.get(name)
        return oldest_first(self._versions[name])[-1] if canary is None else canary.stable
