"""SGLang's storage interface and host pools without SGLang: the same names, signatures, shapes and strides.

The facts are those of SGLang 0.5.23: `mem_cache/hicache_storage.py`, `mem_cache/pool_host/{base,mha,mla}.py`,
`mem_cache/unified_cache/unified_cache_linker.py`, `runtime_context.py`. `tests/sglang_cpu/facts.py` compares them with
the real thing where it is installed (`make test-sglang`).
"""
# ruff: noqa: B027, UP042 - enumerations and optional methods are as SGLang has them

from __future__ import annotations

import enum
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

VERSION = "0.5.23"

SETTINGS: dict[str, Any] = {
    "model_path": "", "served_model_name": "fake", "weight_version": "default", "revision": None, "random_seed": 7,
    "enable_lora": None, "lora_paths": None, "device": "cpu", "dtype": "float32", "quantization": None,
    "quantization_param_path": None, "kv_cache_dtype": "auto", "attention_backend": "torch_native",
    "prefill_attention_backend": None, "decode_attention_backend": None, "json_model_override_args": "{}",
    "context_length": None, "model_impl": "auto", "load_format": "auto", "enable_deterministic_inference": False,
    "rl_on_policy_target": None, "speculative_algorithm": None, "speculative_draft_model_path": None,
    "speculative_draft_model_revision": None, "enable_tf32_matmul": False,
}  # fmt: skip
"""Settings of the engine that the adapter reads, by their flat names."""

LAYERS, HEADS, DIM, PAGE, PAGES = 3, 2, 8, 4, 12
SLOTS = PAGE * PAGES

MHA_SHAPES: dict[str, tuple[int, ...]] = {
    "layer_first": (2, LAYERS, SLOTS, HEADS, DIM),
    "page_first": (2, SLOTS, LAYERS, HEADS, DIM),
    "page_first_direct": (2, PAGES, LAYERS, PAGE, HEADS, DIM),
    "page_head": (2, PAGES, HEADS, PAGE, LAYERS, DIM),
}
MLA_SHAPES: dict[str, tuple[int, ...]] = {
    "layer_first": (LAYERS, SLOTS, 1, DIM),
    "page_first": (SLOTS, LAYERS, 1, DIM),
    "page_first_direct": (PAGES, LAYERS, PAGE, 1, DIM),
}


class PoolName(str, enum.Enum):
    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"
    DRAFT = "draft"

    def __str__(self) -> str:
        return self.value


class PoolHitPolicy(str, enum.Enum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    name: PoolName
    host_indices: Any = None
    device_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None

    @classmethod
    def empty(cls) -> PoolTransferResult:
        return cls(0, {})


@dataclass
class StorageConfig:
    """`HiCacheStorageConfig`."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False
    model_name: str = "fake"
    extra_config: dict[str, Any] | None = None


class HiCacheStorage(ABC):
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None: ...

    def on_host_pools_registered(self) -> None: ...

    def batch_exists_v2(self, keys: Any, pool_transfers: Any = None, extra_info: Any = None) -> Any: ...

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> Any: ...

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> Any: ...

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any: ...

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any: ...

    @abstractmethod
    def get(self, key: Any, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def set(self, key: Any, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def batch_set(
        self, keys: Any, values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> Any: ...

    @abstractmethod
    def exists(self, key: Any) -> Any: ...

    def batch_exists(self, keys: Any, extra_info: Any = None) -> Any: ...

    def clear(self) -> Any: ...

    def get_stats(self) -> Any: ...


class LayerWiseLoadCounter:
    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.producer_index = -1
        self.futures: dict[int, list[Future[None]]] = {}

    def update_producer(self) -> int:
        self.producer_index += 1
        self.futures[self.producer_index] = [Future() for _ in range(self.num_layers)]
        return self.producer_index

    def complete(self, index: int, layer: int) -> None:
        self.futures[index][layer].set_result(None)

    def fail(self, index: int, error: BaseException) -> None:
        for future in self.futures[index]:
            if not future.done():
                future.set_exception(error)

    def finish(self, index: int) -> bool:
        return all(future.exception(timeout=10) is None for future in self.futures.pop(index, []))

    def reset(self) -> None:
        self.futures.clear()


class UnifiedCacheLinker(ABC):
    forward_stream: Any = None

    def record_offload_ready(self) -> list[Any]:
        return []

    @abstractmethod
    def lookup(self, rid: Any, transfers: Any) -> Any: ...

    @abstractmethod
    def load(self, rid: Any, transfers: Any) -> Any: ...

    @abstractmethod
    def start_layer_wise_loading(self) -> Any: ...

    @abstractmethod
    def finish_layer_wise_loading(self, counter_index: Any) -> Any: ...

    @abstractmethod
    def cancel_queued_load(self, rid: Any) -> Any: ...

    @abstractmethod
    def offload(self, transfers: Any, session_id: Any = None) -> Any: ...

    @abstractmethod
    def num_completed_offloads(self) -> Any: ...

    @abstractmethod
    def pop_completed_offload(self) -> Any: ...

    @abstractmethod
    def reset(self) -> Any: ...

    @abstractmethod
    def close(self) -> Any: ...


# -- host pools ------------------------------------------------------------------------------------------------
class _HostPool:
    """What the plain host pools have in common. Values are counted up, so that no two are alike."""

    dcp_size = 1
    page_size = PAGE
    layer_num = LAYERS
    size = SLOTS
    page_num = PAGES

    def __init__(self, layout: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.layout = layout
        self.dtype = dtype
        self.kv_buffer = torch.zeros(tuple(shape), dtype=dtype)
        self.clear()

    def clear(self) -> None:
        self.mem_state = torch.zeros(self.size, dtype=torch.uint8)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        page = self.kv_buffer[self._where(index)]
        return page.flatten() if flat else page

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        target = self.kv_buffer[self._where(index)]
        target.copy_(data_page.reshape(target.shape))

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.get_data_page(0))

    def _where(self, index: int) -> tuple[slice, ...]:
        """The page that starts at slot `index`."""
        lead = (slice(None),) * self._lead[self.layout]
        if self.layout in ("page_first_direct", "page_head"):
            return (*lead, slice(index // PAGE, index // PAGE + 1))
        return (*lead, slice(index, index + PAGE))

    _lead: dict[str, int]


class MHATokenToKVPoolHost(_HostPool):
    head_num = HEADS
    head_dim = DIM
    _lead = {"layer_first": 2, "page_first": 1, "page_first_direct": 1, "page_head": 1}  # noqa: RUF012

    def __init__(self, layout: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layout, MHA_SHAPES[layout], dtype)

    def token(self, plane: int, layer: int, slot: int) -> torch.Tensor:
        """K or V of one token, `[head, dim]`, read through the axes as SGLang's own transfers do."""
        if self.layout == "layer_first":
            return self.kv_buffer[plane, layer, slot]
        if self.layout == "page_first":
            return self.kv_buffer[plane, slot, layer]
        if self.layout == "page_first_direct":
            return self.kv_buffer[plane, slot // PAGE, layer, slot % PAGE]
        return self.kv_buffer[plane, slot // PAGE, :, slot % PAGE, layer]


class MLATokenToKVPoolHost(_HostPool):
    kv_cache_dim = DIM
    _lead = {"layer_first": 1, "page_first": 0, "page_first_direct": 0}  # noqa: RUF012

    def __init__(self, layout: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layout, MLA_SHAPES[layout], dtype)

    def token(self, plane: int, layer: int, slot: int) -> torch.Tensor:
        """The latent of one token."""
        if self.layout == "layer_first":
            return self.kv_buffer[layer, slot]
        if self.layout == "page_first":
            return self.kv_buffer[slot, layer]
        return self.kv_buffer[slot // PAGE, layer, slot % PAGE]


class MambaPoolHost:
    """States in two buffers of different widths, a page for each slot, reached by pointers only."""

    layout = "page_first"
    page_size = 1
    size = 8
    dtype = torch.float32
    layer_num = LAYERS

    def __init__(self) -> None:
        self.temporal = torch.zeros(self.size, LAYERS, 5)
        self.conv = torch.zeros(self.size, LAYERS, 3, dtype=torch.bfloat16)
        self.mem_state = torch.zeros(self.size)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        pointers, sizes = [], []
        for index in indices.tolist():
            for buffer in (self.temporal, self.conv):
                pointers.append(buffer[index].data_ptr())
                sizes.append(buffer[index].nbytes)
        return pointers, sizes


def indices_of(pages: Sequence[int]) -> torch.Tensor:
    """Host indices of pages."""
    return torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)], dtype=torch.int64)


# -- the engine ------------------------------------------------------------------------------------------------
@dataclass
class Runtime:
    """`sglang.srt.runtime_context` with settings a test may change."""

    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    tp_size: int = 1

    def modules(self) -> dict[str, ModuleType]:
        """What to put into `sys.modules`."""
        found: dict[str, ModuleType] = {}

        def add(name: str, **names: Any) -> None:
            found[name] = ModuleType(name)
            for key, value in names.items():
                setattr(found[name], key, value)

        add("sglang", __version__=VERSION)
        for package in ("sglang.srt", "sglang.srt.mem_cache", "sglang.srt.mem_cache.unified_cache"):
            add(package)
        context = SimpleNamespace(config_leaf=self._leaf)
        add("sglang.srt.runtime_context", get_context=lambda: context, get_parallel=lambda: self)
        found["sglang.srt"].runtime_context = found["sglang.srt.runtime_context"]  # type: ignore[attr-defined]
        storage = (HiCacheStorage, PoolHitPolicy, PoolName, PoolTransfer, PoolTransferResult)
        add("sglang.srt.mem_cache.hicache_storage", **{kind.__name__: kind for kind in storage})
        linker: tuple[Callable[..., Any], ...] = (LayerWiseLoadCounter, UnifiedCacheLinker)
        add(
            "sglang.srt.mem_cache.unified_cache.unified_cache_linker",
            **{kind.__name__: kind for kind in linker},
        )
        return found

    @contextmanager
    def installed(self) -> Iterator[dict[str, ModuleType]]:
        """The adapter's modules, imported on top of this; on leaving both are forgotten."""
        before = set(sys.modules)
        sys.modules.update(self.modules())
        package = importlib.import_module("lmcache_core.adapters")
        names = ("_sglang_engine", "sglang", "sglang_linker")
        try:
            yield {name: importlib.import_module(f"lmcache_core.adapters.{name}") for name in names}
        finally:
            for name in names:
                vars(package).pop(name, None)
            ours = ("sglang", "lmcache_core.adapters._sglang_engine", "lmcache_core.adapters.sglang")
            for name in set(sys.modules) - before:
                if name.startswith(ours):
                    del sys.modules[name]

    def _leaf(self, name: str) -> Any:
        if name not in self.settings:
            raise ValueError(f"{name!r} is not a config leaf (no namespace)")
        return self.settings[name]
