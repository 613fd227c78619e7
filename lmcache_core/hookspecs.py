"""The pluggy hooks. They assemble a pipeline, once, at start-up; none is called near a byte."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from lmcache_core.protocols import (
    BackendConfig,
    BuildContext,
    EvictionConfig,
    MemoryBackend,
    PluginConfig,
    SerdeConfig,
    StorageBackend,
)

PROJECT = "lmcache"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def lmcache_backends() -> Sequence[type[BackendConfig]]:
    """Return the backend config classes this plugin provides."""
    raise NotImplementedError


@hookspec
def lmcache_serdes() -> Sequence[type[SerdeConfig]]:
    """Return the serde config classes this plugin provides."""
    raise NotImplementedError


@hookspec
def lmcache_evictions() -> Sequence[type[EvictionConfig]]:
    """Return the eviction policy config classes this plugin provides."""
    raise NotImplementedError


@hookspec
def lmcache_plugins() -> Sequence[type[PluginConfig]]:
    """Return the settings classes of this plugin in `plugins:`; one without implements the hooks below itself."""
    raise NotImplementedError


@hookspec
def lmcache_object_overhead(config: BackendConfig, context: BuildContext) -> int:
    """Return the bytes this plugin's wrapper adds to each object of the tier: its backend is built for as much more."""
    raise NotImplementedError


@hookspec
def lmcache_wrapper_memory(config: BackendConfig, context: BuildContext) -> int:
    """Return the bytes of memory that this plugin's wrapper takes for a tier: less for slots of the memory tier."""
    raise NotImplementedError


@hookspec(firstresult=True)
def lmcache_build_backend(config: BackendConfig, context: BuildContext) -> StorageBackend | MemoryBackend:
    """Build one tier's backend. Meant to be wrapped: faults, latency, tracing, encryption, quotas for every backend."""
    raise NotImplementedError
