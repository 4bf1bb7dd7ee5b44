"""One look at the models folder: what it offers to a device, what it holds that cannot be served, and which files."""

from pathlib import Path
from typing import NamedTuple, TypeAlias

from topfive_server.devices import Device
from topfive_server.repository import ModelVersion, Repository
from topfive_server.variants import Choice, Refused, Wanted, choose

Key: TypeAlias = tuple[str, str]
"""Name and version, as clients know them."""
Signature: TypeAlias = tuple[tuple[str, int, int, int, int], ...]
"""Path, device, inode, size and modification time of each file of a version: equal signatures, same files."""


class Found(NamedTuple):
    """One look at the folder."""

    choices: list[Choice]
    refused: list[Refused]
    signatures: dict[Key, Signature]
    """The files of each, as they were just after they were read; of a family that has no graph to serve, none."""


def find(repository: Repository, device: Device, wanted: Wanted) -> Found:
    """What the folder offers: for each version the graph that would serve, or why none can.

    Raises:
        RepositoryError: the folder cannot be read, or holds no model at all.
    """
    good, broken = repository.read_all()
    choices, refused = choose(good, device, wanted)
    signatures: dict[Key, Signature] = {(row.name, row.version): () for row in refused}
    signatures |= {key_of(choice.version): signature(choice.version) for choice in choices}
    # A broken variant beside a whole one of the same version matters only to whoever looks at the log.
    for error in broken:
        key = error.name, error.version
        if key not in signatures:
            folder = repository.root / error.name / error.version
            refused.append(Refused(*key, f"{error}; or remove {folder} to serve without it"))
            signatures[key] = _signature(folder)
    return Found(choices, refused, signatures)


def key_of(version: ModelVersion) -> Key:
    """Name and version."""
    return version.name, version.version


def signature(version: ModelVersion) -> Signature:
    """The files of one version, as they are now."""
    return _signature(version.path.parent)


def _signature(folder: Path) -> Signature:
    try:
        stats = [(str(path), path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return ()
    # The inode tells a file from another of equal size and time that was moved, or a link that was turned, into its place.
    return tuple((name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats)
