"""The pluggy hooks. They assemble a pipeline, once, at start-up; none is called near a byte."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from lmcache_core.protocols import (
    BackendConfig,
    BuildContext,
    EvictionConfig,
    MemoryBackend,
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


@hookspec(firstresult=True)
def lmcache_build_backend(config: BackendConfig, context: BuildContext) -> StorageBackend | MemoryBackend:
    """Build one tier's backend. Meant to be wrapped: faults, latency, tracing, encryption, quotas for every backend."""
    raise NotImplementedError
