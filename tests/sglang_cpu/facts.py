"""Compare `tests/adapters/fake_sglang.py`, which CI's tests of the adapter stand on, with the SGLang installed here.

Prints each fact as it holds and ends with status 1 at the first that does not. Run by `run.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import fake_sglang as fake
import sglang
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache import hicache_storage as real
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.unified_cache import unified_cache_linker as linker
from sglang.srt.server_args import ServerArgs

from lmcache_core.adapters import _sglang_engine as engine
from lmcache_core.adapters._sglang_pools import DevicePages, describe


def holds(fact: str, condition: object) -> None:
    """Print it, or stop."""
    print(("ok    " if condition else "WRONG ") + fact, flush=True)
    if not condition:
        sys.exit(1)


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def signatures(base: Any, methods: Any) -> dict[str, tuple[str, ...]]:
    return {name: tuple(inspect.signature(getattr(base, name)).parameters) for name in methods}


def interface() -> None:
    holds(f"this is SGLang {fake.VERSION}", sglang.__version__ == fake.VERSION)
    for name, api in (("HiCacheStorage", engine.STORAGE_API), ("UnifiedCacheLinker", engine.LINKER_API)):
        theirs, ours = getattr(real, name, None) or getattr(linker, name), getattr(fake, name)
        engine.check_api(theirs, api)
        holds(f"{name} has the same methods", signatures(theirs, api) == signatures(ours, api))
        holds(f"{name} has the same abstract ones", theirs.__abstractmethods__ == ours.__abstractmethods__)
    for kind in (fake.PoolName, fake.PoolHitPolicy):
        theirs = {member.name: member.value for member in getattr(real, kind.__name__)}
        ours = {member.name: member.value for member in kind}
        holds(f"{kind.__name__} has the same members", ours.items() <= theirs.items())
    holds("a PoolName is its value", str(real.PoolName.KV) == "kv" and {real.PoolName.KV: 1}["kv"] == 1)
    for ours_, theirs_ in (
        (fake.PoolTransfer, real.PoolTransfer),
        (fake.PoolTransferResult, real.PoolTransferResult),
        (fake.StorageConfig, real.HiCacheStorageConfig),
    ):
        holds(f"{theirs_.__name__} has the same fields", names(ours_) <= names(theirs_))
    counter = {"num_layers", "update_producer", "complete", "fail", "finish", "reset"}
    holds("LayerWiseLoadCounter has the same methods", counter <= set(dir(linker.LayerWiseLoadCounter(1))))
    known = namespace_of(ServerArgs)
    holds("every setting is a leaf of the configuration", not [name for name in fake.SETTINGS if name not in known])
    holds("every setting the adapter reads is known to the tests", set(engine.NUMERICS) <= fake.SETTINGS.keys())
    holds("an adapter has a name and a path", {"lora_name", "lora_path"} <= set(LoRARef.__struct_fields__))


def host_pool(latent: bool, layout: str) -> Any:
    """A host pool of the size of the fakes."""
    size = fake.SLOTS - fake.PAGE  # SGLang adds a page
    common: dict[str, Any] = {"enable_memory_saver": False, "device": "cpu", "layer_num": fake.LAYERS}
    if latent:
        pool = MLATokenToKVPool(size, fake.PAGE, torch.float32, kv_lora_rank=fake.DIM - 2, qk_rope_head_dim=2, **common)
        kind: Any = MLATokenToKVPoolHost
        more: dict[str, Any] = {"target_layer_num": fake.LAYERS}
    else:
        pool = MHATokenToKVPool(size, fake.PAGE, torch.float32, head_num=fake.HEADS, head_dim=fake.DIM, **common)
        kind, more = MHATokenToKVPoolHost, {}
        pages = DevicePages(pool, fake.PAGE)
        if layout == "layer_first":
            holds("the engine's own KV is [slot, head, dim]", pages.layout.chunk_tokens == fake.PAGE)
    info = pool.get_device_pool_infos()[0].buffer_info
    return kind(
        info, 1.0, 0, fake.PAGE, layout, pin_memory=False, device="cpu", device_capacity_tokens=size, start_layer=0,
        end_layer=fake.LAYERS, **more,
    )  # fmt: skip


def chunk(pool: Any, page: int) -> np.ndarray[Any, Any]:
    pages = describe(pool, "kv")
    slot = np.zeros(pages.layout.chunk_bytes, np.uint8)
    pages.gather(fake.indices_of([page]), np.array([slot.ctypes.data]))
    return slot


def pools() -> None:
    for latent, shapes in ((False, fake.MHA_SHAPES), (True, fake.MLA_SHAPES)):
        for layout in shapes:
            ours = (fake.MLATokenToKVPoolHost if latent else fake.MHATokenToKVPoolHost)(layout)
            theirs = host_pool(latent, layout)
            what = f"{type(theirs).__name__} of layout {layout}"
            holds(f"{what} has the same class name", type(theirs).__name__ == type(ours).__name__)
            holds(f"{what} has the same shape", theirs.kv_buffer.shape == ours.kv_buffer.shape)
            holds(f"{what} has the same strides", theirs.kv_buffer.stride() == ours.kv_buffer.stride())
            values = torch.randn(ours.kv_buffer.shape)
            theirs.kv_buffer.copy_(values)
            ours.kv_buffer.copy_(values)
            same = [
                torch.equal(theirs.get_data_page(at, flat=flat), ours.get_data_page(at, flat=flat))
                for at in (0, fake.PAGE, fake.SLOTS - fake.PAGE)
                for flat in (False, True)
            ]
            holds(f"{what} has the same pages", all(same))
            dummy = theirs.get_dummy_flat_data_page()
            holds(f"{what} has the same dummy page", dummy.shape == ours.get_dummy_flat_data_page().shape)
            for pool in (theirs, ours):
                pool.set_from_flat_data_page(2 * fake.PAGE, pool.get_data_page(3 * fake.PAGE))
            holds(f"{what} takes pages the same way", torch.equal(theirs.kv_buffer, ours.kv_buffer))
            holds(f"{what} gives the same chunk", np.array_equal(chunk(theirs, 5), chunk(ours, 5)))
            before = theirs.mem_state
            theirs.clear()
            holds(f"{what} has a new mem_state after a flush", theirs.mem_state is not before)


if __name__ == "__main__":
    interface()
    pools()
