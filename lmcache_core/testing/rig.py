"""Rigs: how to bring a backend's medium up on this machine, for conformance tests and benchmarks.

A plugin's distribution offers one through the entry-point group `lmcache.rigs` (the name is the backend's `type`, the
object a subclass of `Rig`). `lmcachectl plugin test`, `lmcachectl plugin bench` and `lmcachectl bench backend` use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lmcache_core.errors import PluginError
from lmcache_core.plugins import RIGS, Plugins
from lmcache_core.protocols import BackendConfig


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the medium can do without us: the best tool or client there is, on the same medium."""

    name: str
    """What was measured, e.g. `redis-benchmark -d 1048576 -P 1 -c 4`."""
    put: Callable[[int, int], float]
    """`put(object_bytes, seconds)`: bytes per second of writing objects of that size for about that long."""
    get: Callable[[int, int], float]
    """`get(object_bytes, seconds)`: bytes per second of reading them."""


@dataclass(frozen=True, slots=True)
class Medium:
    """A medium that is up and empty."""

    config: BackendConfig
    """Settings that reach it; every `config.build(context)` opens this same medium."""
    baseline: Baseline | None = None
    """None where there is nothing to compare with."""


class Rig(ABC):
    """Starts what a backend needs: a server on loopback, a directory, or nothing."""

    @abstractmethod
    def start(self, directory: Path) -> AbstractContextManager[Medium]:
        """Bring up an empty medium; leaving the context takes it down and leaves no process behind.

        `directory` is an empty directory for the medium's files. Raise `BackendUnavailable` with the fix where a
        program or package is missing.
        """


def find_rig(plugins: Plugins, name: str) -> Rig | None:
    """The rig of the backend `name`, or None where no distribution has one. Raise `PluginError` for a broken one."""
    found = plugins.rig(name)
    if found is None:
        return None
    if not (isinstance(found, type) and issubclass(found, Rig)):
        plugin = plugins.load(RIGS, name)
        raise PluginError(f"rig `{name}` of {plugin}: the entry point names {found!r}, not a subclass of Rig")
    if found.__abstractmethods__:
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise PluginError(f"rig `{name}` of {plugins.load(RIGS, name)}: {found.__name__} does not implement {missing}")
    return found()
