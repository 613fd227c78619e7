"""Exact-or-miss KV-cache storage tiers for LLM serving engines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_core.engine import CacheEngine

__all__ = ["CacheEngine"]


def __getattr__(name: str) -> Any:
    # On first use: `import lmcache_core` stays light.
    if name == "CacheEngine":
        return importlib.import_module("lmcache_core.engine").CacheEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
