"""Eviction policy `adaptive`: LRU, unless keeping reused prefixes longer is measurably better on this traffic."""

from __future__ import annotations

from typing import Literal

from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import EvictionConfig
from lmcache_eviction_adaptive.policy import Adaptive

LMCACHE_API = 1


class AdaptiveConfig(EvictionConfig):
    """Least recently used with credit for reuse, as much as the traffic of late has shown to pay."""

    type: Literal["adaptive"] = "adaptive"

    def build(self) -> Adaptive:
        return Adaptive()


@hookimpl
def lmcache_evictions() -> list[type[EvictionConfig]]:
    return [AdaptiveConfig]
