"""The kit without pytest: run every check over a plugin and tell what came out, as `lmcachectl plugin test` does.

    for outcome in conformance("redis", directory):
        print("ok" if outcome.passed else outcome.message, outcome.name)

Every test has an empty medium: the medium is started once and cleared in between, and started anew after a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmcache_core.errors import PluginError
from lmcache_core.plugins import BACKENDS, EVICTIONS, SERDES, Plugins
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, StorageBackend
from lmcache_core.testing.contracts import ContractBroken
from lmcache_core.testing.eviction import EvictionTests
from lmcache_core.testing.memory_kit import MemoryBackendTests
from lmcache_core.testing.rig import Medium, find_rig
from lmcache_core.testing.serde import SerdeTests
from lmcache_core.testing.storage import StorageBackendTests

Start = Callable[[Path], AbstractContextManager[Medium]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test."""

    name: str
    """The test's name, without `test_`."""
    contract: str
    """The contract that is broken; empty when it passed, or when the test could not be run to its end."""
    passed: bool
    message: str
    """Why it failed; empty when it passed."""


def conformance(type: str, directory: Path, group: str = BACKENDS, plugins: Plugins | None = None) -> list[Outcome]:
    """Check the installed plugin whose `type` it is; `group` is the entry-point group it is announced in.

    A backend's medium is started by its rig, in `directory`; serdes, policies and memory are taken with their default
    settings. Raise `PluginError` for a plugin that is missing or broken, or that has neither a rig nor defaults, and
    `BackendUnavailable` where the rig cannot start.
    """
    plugins = plugins or Plugins()
    if group == SERDES:
        return run_kit(SerdeTests(), _with_defaults(plugins.serde(type), group, type).build)
    if group == EVICTIONS:
        return run_kit(EvictionTests(), _with_defaults(plugins.eviction(type), group, type).build)
    rig = find_rig(plugins, type)
    if rig is not None:
        return run_storage_tests(rig.start, directory)
    config = _with_defaults(plugins.backend(type), group, type)
    return run_storage_tests(lambda _: _only(Medium(config)), directory)


def run_storage_tests(start: Start, directory: Path, kit: StorageBackendTests | None = None) -> list[Outcome]:
    """Check the backend of the medium that `start(directory)` brings up, be it storage or memory.

    `kit` is a `StorageBackendTests` with other limits. Raise what `start` raises.
    """
    kit = kit or StorageBackendTests()
    with _Media(start, directory) as media:
        if media.config().in_memory:
            return run_kit(MemoryBackendTests(), lambda context: _memory(media.config(), context))
        outcomes: list[Outcome] = []
        names = checks_of(kit)
        if kit.elsewhere() is None:
            names.remove(kit.test_another_medium_is_another_one.__name__)
        # First, whether `clear` can be relied upon: without it every test gets a medium of its own.
        clears = kit.test_clear_forgets_everything.__name__
        names.remove(clears)
        for name in (clears, *names):
            outcomes.append(run_check(kit, name, lambda context: _storage(media.config(), context)))
            if not (outcomes[0].passed and outcomes[-1].passed and media.clear(kit)):
                media.renew()
        return outcomes


def run_kit(kit: object, factory: Callable[..., Any]) -> list[Outcome]:
    """Every test of a kit, given what its fixture would give."""
    return [run_check(kit, name, factory) for name in checks_of(kit)]


def checks_of(kit: object) -> list[str]:
    """Names of the kit's tests, in the order in which they are written."""
    written = {name: None for cls in reversed(type(kit).__mro__) for name in vars(cls)}
    return [name for name in written if name.startswith("test_")]


def run_check(kit: object, name: str, factory: Callable[..., Any]) -> Outcome:
    """One test of a kit, given what its fixture would give; whatever it raises is its outcome."""
    title = name.removeprefix("test_")
    try:
        getattr(kit, name)(factory)
    except ContractBroken as broken:
        return Outcome(title, broken.contract, False, str(broken))
    except (Exception, SystemExit) as error:
        return Outcome(title, "", False, f"{type(error).__name__}: {error}")
    return Outcome(title, "", True, "")


class _Media:
    """The medium in use; another one when a test has left it in an unknown state."""

    def __init__(self, start: Start, directory: Path) -> None:
        self._start = start
        self._directory = directory
        self._number = 0
        self._stack = ExitStack()
        self._medium: Medium | None = None

    def __enter__(self) -> _Media:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def config(self) -> BackendConfig:
        if self._medium is None:
            place = self._directory / f"medium-{self._number}"
            place.mkdir(parents=True, exist_ok=True)
            self._medium = self._stack.enter_context(self._start(place))
            self._number += 1
        return self._medium.config

    def renew(self) -> None:
        """Take this medium down; the next test gets another one."""
        self._medium = None
        self._stack.close()

    def clear(self, kit: StorageBackendTests) -> bool:
        """Empty the medium; whether that worked."""
        try:
            with kit.backend(lambda context: _storage(self.config(), context)) as backend:
                backend.clear()
        except (Exception, SystemExit):
            return False
        return True


def _storage(config: BackendConfig, context: BuildContext) -> StorageBackend:
    backend = config.build(context)
    if not isinstance(backend, StorageBackend):
        raise PluginError(f"backend `{config.type}` built a {type(backend).__name__}, but says it is no memory backend")
    return backend


def _memory(config: BackendConfig, context: BuildContext) -> MemoryBackend:
    backend = config.build(context)
    if not isinstance(backend, MemoryBackend):
        raise PluginError(f"backend `{config.type}` says it is a memory backend, but built a {type(backend).__name__}")
    return backend


@contextmanager
def _only(medium: Medium) -> Iterator[Medium]:
    yield medium


def _with_defaults(cls: Any, group: str, name: str) -> Any:
    """The plugin with no settings given. Raise `PluginError` where it needs some."""
    try:
        return cls()
    except ValidationError as error:
        needed = ", ".join(str(found["loc"][0]) for found in error.errors() if found["loc"])
        mend = (
            f"announce a rig in the entry-point group `lmcache.rigs` as `{name}`"
            if group == BACKENDS
            else ("test it with a class of its own, see docs/plugins.md")
        )
        raise PluginError(f"`{name}` cannot be tested with default settings, it needs {needed}: {mend}") from None
