"""Clients in forked children: `multiprocessing`, gunicorn and torch's data loaders fork."""

import os
import weakref
from typing import Protocol


class Resettable(Protocol):
    """Something with connections and locks of its own."""

    def reset(self) -> None:
        """Start afresh."""


_alive: weakref.WeakSet[Resettable] = weakref.WeakSet()


def reset_in_children(client: Resettable) -> None:
    """From now on, `client.reset()` runs first thing in every forked child, while `client` lives."""
    _alive.add(client)


def _after_fork() -> None:
    for client in list(_alive):
        client.reset()


os.register_at_fork(after_in_child=_after_fork)
