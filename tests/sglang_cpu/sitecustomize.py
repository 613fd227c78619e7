"""What the hierarchical cache lacks on a CPU. Python loads it in every process that has this directory on its path.

SGLang moves KV between its device pool and its host pool with CUDA kernels. On a CPU both are ordinary memory, so the
three copies of its `direct` mode are a few lines of tensor indexing. Host memory is not pinned, and less of it is kept
free than a server would.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

RESERVE_BYTES = 256 << 20


def transfer_kv_direct(src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, page_size: int) -> None:
    """Token rows of each layer to token rows of each layer."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """Token rows of all layers (K of each, then V of each) to pages `[page, layer, token, ...]`."""
    layers = len(src_ptrs) // len(dst_ptrs)
    pages = dst_indices[::page_size] // page_size
    for plane, target in enumerate(dst_ptrs):
        for layer in range(layers):
            rows = src_ptrs[plane * layers + layer][src_indices]
            target[pages, layer] = rows.reshape(len(pages), page_size, *rows.shape[1:])


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, layer_id: int, page_size: int
) -> None:
    """One layer of pages `[page, layer, token, ...]` to token rows."""
    pages = src_indices[::page_size] // page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id].reshape(-1, *target.shape[1:])


def _complete_pools(module: Any) -> None:
    for function in (transfer_kv_direct, transfer_kv_all_layer_direct_lf_pf, transfer_kv_per_layer_direct_pf_lf):
        setattr(module, function.__name__, function)
    pool = module.MHATokenToKVPoolHost
    allocate = pool.init_kv_buffer

    def init_kv_buffer(self: Any) -> Any:
        self.pin_memory = False
        return allocate(self)

    pool.init_kv_buffer = init_kv_buffer


def _complete_base(module: Any) -> None:
    module.HICACHE_HOST_MEMORY_RESERVE_BYTES = RESERVE_BYTES


COMPLETE: dict[str, Callable[[Any], None]] = {
    "sglang.srt.mem_cache.pool_host.base": _complete_base,
    "sglang.srt.mem_cache.pool_host.mha": _complete_pools,
}


class _Completing(importlib.abc.Loader):
    """Loads a module, then adds what is missing."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        COMPLETE[self._name](module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in COMPLETE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Completing(spec.loader, fullname)
        return spec


sys.meta_path.insert(0, _Finder())
