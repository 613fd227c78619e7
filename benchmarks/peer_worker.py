"""Runs inside LMCache's own environment and measures one step of it at a time, on request.

Started by `against_lmcache.py` with that environment's Python. Every line on stdin is `{"op": NAME, "args": {...}}`;
every answer on stdout is `{"value": NUMBER}` (seconds, or bytes per second where the name says rate) or
`{"error": TEXT}`. One step per request, so that both sides take turns within a run.

A chunk is 256 tokens of 32 layers, K and V, 8 heads of 128 in bfloat16: 32 MiB.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

# The answers go to what was stdout; everything the library prints goes to stderr.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
os.environ |= {
    "LMCACHE_LOG_LEVEL": "ERROR",
    "LMCACHE_TRACK_USAGE": "false",
    "DO_NOT_TRACK": "1",
    "PYTHONHASHSEED": "0",
}

import torch  # noqa: E402
from lmcache.utils import CacheEngineKey, mock_up_broadcast_fn, mock_up_broadcast_object_fn  # noqa: E402
from lmcache.v1.cache_engine import LMCacheEngineBuilder  # noqa: E402
from lmcache.v1.config import LMCacheEngineConfig  # noqa: E402
from lmcache.v1.distributed.api import (  # noqa: E402
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (  # noqa: E402
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.storage_manager import StorageManager  # noqa: E402
from lmcache.v1.gpu_connector.mock_gpu_connector import MockGPUConnector  # noqa: E402
from lmcache.v1.metadata import LMCacheMetadata  # noqa: E402
from lmcache.v1.multiprocess.token_hasher import TokenHasher  # noqa: E402
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend  # noqa: E402
from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend  # noqa: E402
from lmcache.v1.storage_backend.remote_backend import RemoteBackend  # noqa: E402
from lmcache.v1.token_database import ChunkedTokenDatabase  # noqa: E402

torch.set_num_threads(1)
DTYPE = torch.bfloat16
CHUNK_TOKENS = 256
BIG = torch.Size([2, 32, CHUNK_TOKENS, 1024])
SMALL = torch.Size([2, 1, 16, 64])
"""4 KiB: where only bookkeeping is measured."""
CONTROL = 128
GIB = 1 << 30


def nbytes(shape: torch.Size) -> int:
    return shape.numel() * DTYPE.itemsize


def metadata(
    kv_shape: tuple[int, ...] = (32, 2, CHUNK_TOKENS, 8, 128), chunk_tokens: int = CHUNK_TOKENS
) -> LMCacheMetadata:
    return LMCacheMetadata(
        model_name="bench/model",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=DTYPE,
        kv_shape=kv_shape,
        chunk_size=chunk_tokens,
        role="worker",
    )


def config(**settings: Any) -> LMCacheEngineConfig:
    return LMCacheEngineConfig.from_defaults(chunk_size=CHUNK_TOKENS, lmcache_instance_id="bench", **settings)


class Tensors:
    """`count` chunks of random numbers, taken in rotation."""

    def __init__(self, count: int) -> None:
        base = torch.randn(BIG, dtype=torch.float32).to(DTYPE)
        self._all = [base.clone() for _ in range(count)]
        self._at = 0

    def take(self, count: int) -> list[torch.Tensor]:
        taken = [self._all[(self._at + i) % len(self._all)] for i in range(count)]
        self._at += count
        return taken


class LegacyKeys:
    def __init__(self) -> None:
        self._next = 1

    def take(self, count: int) -> list[CacheEngineKey]:
        first, self._next = self._next, self._next + count
        return [CacheEngineKey("bench/model", 1, 0, 0x5EED000000 + i, DTYPE) for i in range(first, self._next)]


class LegacyCpu:
    """The in-process CPU tier, full: every put evicts."""

    def __init__(self, chunks: int, size: int, source: Tensors, target: Tensors, shape: torch.Size = BIG) -> None:
        self.size, self.source, self.target, self.shape = size, source, target, shape
        self.room = chunks // size
        self.backend = LocalCPUBackend(
            config(local_cpu=True, max_local_cpu_size=self.room * size * nbytes(shape) / GIB), metadata(), "cpu"
        )
        self.keys = LegacyKeys()
        self.idle: deque[list[CacheEngineKey]] = deque()

    def put(self) -> float:
        keys, tensors = self.keys.take(self.size), self.source.take(self.size)
        begun = time.perf_counter()
        objects = []
        for tensor in tensors:
            found = self.backend.allocate(self.shape, DTYPE)
            found.tensor.copy_(tensor)
            objects.append(found)
        self.backend.batched_submit_put_task(keys, objects)
        for found in objects:
            found.ref_count_down()
        seconds = time.perf_counter() - begun
        self.idle.append(keys)
        return self.size * nbytes(self.shape) / seconds

    def get(self) -> float:
        # Its order of eviction is not simply that of use: take the first batch that is whole.
        while not all(self.backend.contains(key) for key in self.idle[0]):
            self.idle.popleft()
        keys, tensors = self.idle.popleft(), self.target.take(self.size)
        self.idle.append(keys)
        begun = time.perf_counter()
        for key, tensor in zip(keys, tensors, strict=True):
            found = self.backend.get_blocking(key)
            tensor.copy_(found.tensor)
            found.ref_count_down()
        return self.size * nbytes(self.shape) / (time.perf_counter() - begun)


class LegacyControl:
    """The same tier with chunks of 4 KiB and batches of 128 keys, no copies."""

    def __init__(self) -> None:
        # The free list is page granular, so eight batches fit and the ninth evicts.
        self.backend = LocalCPUBackend(
            config(local_cpu=True, max_local_cpu_size=8 * CONTROL * nbytes(SMALL) / GIB), metadata(), "cpu"
        )
        self.keys = LegacyKeys()
        self.last: list[CacheEngineKey] = []
        for _ in range(8):
            self.store()

    def store(self) -> float:
        self.last = self.keys.take(CONTROL)
        begun = time.perf_counter()
        objects = [self.backend.allocate(SMALL, DTYPE) for _ in self.last]
        self.backend.batched_submit_put_task(self.last, objects)
        for found in objects:
            found.ref_count_down()
        return time.perf_counter() - begun

    def load(self) -> float:
        begun = time.perf_counter()
        for key in self.last:
            self.backend.get_blocking(key).ref_count_down()
        return time.perf_counter() - begun


class LegacyLookup:
    def __init__(self) -> None:
        self.backend = LocalCPUBackend(config(local_cpu=True, max_local_cpu_size=0.25), metadata(), "cpu")
        keys = LegacyKeys()
        self.keys, self.missing = keys.take(1000), keys.take(1000)
        objects = [self.backend.allocate(SMALL, DTYPE) for _ in self.keys]
        self.backend.batched_submit_put_task(self.keys, objects)

    def hit(self) -> float:
        begun = time.perf_counter()
        found = all(self.backend.contains(key) for key in self.keys)
        seconds = time.perf_counter() - begun
        assert found
        return seconds

    def miss(self) -> float:
        begun = time.perf_counter()
        found = any(self.backend.contains(key) for key in self.missing)
        seconds = time.perf_counter() - begun
        assert not found
        return seconds


class LegacyDisk:
    """The in-process disk tier; time until written (no fsync), and reads into its CPU pool."""

    def __init__(self, directory: str, direct: bool, chunks: int, source: Tensors) -> None:
        self.chunks = chunks
        shutil.rmtree(directory, ignore_errors=True)
        settings = config(
            local_cpu=False,
            max_local_cpu_size=(2 * chunks + 2) * nbytes(BIG) / GIB,
            local_disk=f"file://{directory}/",
            max_local_disk_size=3 * chunks * nbytes(BIG) / GIB,
            extra_config={"use_odirect": direct},
        )
        self.pool = LocalCPUBackend(settings, metadata(), "cpu")
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self.backend = LocalDiskBackend(settings, loop, self.pool, "cpu", None, metadata())
        self.keys = LegacyKeys()
        self.objects = []
        for tensor in source.take(chunks):
            found = self.pool.allocate(BIG, DTYPE)
            found.tensor.copy_(tensor)
            self.objects.append(found)
        self.idle: deque[list[CacheEngineKey]] = deque()
        for _ in range(3):
            self.put()

    def put(self, seconds: float = 0.0) -> float:
        """A stream: the next batch is submitted when half of the one before is written."""
        waiting: list[CacheEngineKey] = []
        moved = 0
        begun = time.perf_counter()
        while not moved or time.perf_counter() - begun < seconds:
            keys = self.keys.take(self.chunks)
            while len(waiting) > self.chunks // 2:
                time.sleep(0.0005)
                waiting = [key for key in waiting if self.backend.exists_in_put_tasks(key)]
            self.backend.batched_submit_put_task(keys, self.objects)
            waiting += keys
            self.idle.append(keys)
            moved += self.chunks * nbytes(BIG)
        while waiting:
            time.sleep(0.0005)
            waiting = [key for key in waiting if self.backend.exists_in_put_tasks(key)]
        spent = time.perf_counter() - begun
        while len(self.idle) > 2:
            self.idle.popleft()
        return moved / spent

    def get(self, seconds: float = 0.0) -> float:
        """Batch after batch; each call blocks until its batch is there."""
        moved = 0
        begun = time.perf_counter()
        while not moved or time.perf_counter() - begun < seconds:
            self.idle.rotate(-1)
            found = self.backend.batched_get_blocking(self.idle[0])
            assert all(thing is not None for thing in found), "a chunk on disk was not found"
            for thing in found:
                thing.ref_count_down()
            moved += self.chunks * nbytes(BIG)
        return moved / (time.perf_counter() - begun)


class LegacyRedis:
    """The in-process remote backend with its Redis connector; 8 MiB chunks from and into its CPU pool, not encoded."""

    def __init__(self, url: str, chunks: int, source: Tensors) -> None:
        shape = torch.Size([2, 32, CHUNK_TOKENS // 4, 1024])
        self.nbytes = nbytes(shape)
        settings = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS // 4,
            lmcache_instance_id="bench",
            local_cpu=False,
            max_local_cpu_size=(3 * chunks + 4) * self.nbytes / GIB,
            remote_url=url,
            remote_serde="naive",
        )
        about = metadata((32, 2, CHUNK_TOKENS // 4, 8, 128), CHUNK_TOKENS // 4)
        self.pool = LocalCPUBackend(settings, about, "cpu")
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self.backend = RemoteBackend(settings, about, loop, self.pool, "cpu")
        self.keys = LegacyKeys().take(chunks)
        self.objects = []
        for tensor in source.take(chunks):
            found = self.pool.allocate(shape, DTYPE)
            found.tensor.copy_(tensor[:, :, : CHUNK_TOKENS // 4])
            self.objects.append(found)

    def put(self, seconds: float = 0.0) -> float:
        """Batch after batch of the same keys, each until it is stored."""
        moved, begun = 0, time.perf_counter()
        while not moved or time.perf_counter() - begun < seconds:
            done: list[object] = []
            self.backend.batched_submit_put_task(self.keys, self.objects, on_complete_callback=done.append)
            while len(done) < len(self.keys):
                time.sleep(0.0005)
            moved += len(self.keys) * self.nbytes
        return moved / (time.perf_counter() - begun)

    def get(self, seconds: float = 0.0) -> float:
        """Batch after batch; each call blocks until its batch is there."""
        moved, begun = 0, time.perf_counter()
        while not moved or time.perf_counter() - begun < seconds:
            found = self.backend.batched_get_blocking(self.keys)
            assert all(thing is not None for thing in found), "a chunk in Redis was not found"
            for thing in found:
                thing.ref_count_down()
            moved += len(found) * self.nbytes
        return moved / (time.perf_counter() - begun)


class Mp:
    """The storage manager of the multiprocess server, memory only, called in process.

    Allocation never evicts there: a batch is deleted, off the clock, before the pool is full.
    """

    def __init__(self, chunks: int, size: int, source: Tensors, target: Tensors, shape: torch.Size = BIG) -> None:
        self.size, self.source, self.target, self.shape = size, source, target, shape
        self.room = chunks // size
        # A thread evicts above 80 %: stay below it.
        memory = L1MemoryManagerConfig(size_in_bytes=int((self.room + 1) * size * nbytes(shape) / 0.75), use_lazy=False)
        self.manager = StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(memory_config=memory),
                eviction_config=EvictionConfig(eviction_policy="LRU"),
            )
        )
        self.layout = MemoryLayoutDesc(shapes=[shape], dtypes=[DTYPE])
        self.next = 1
        self.idle: deque[list[ObjectKey]] = deque()

    def take(self, count: int) -> list[ObjectKey]:
        first, self.next = self.next, self.next + count
        rank = ObjectKey.ComputeKVRank(1, 0, 1, 0)
        return [ObjectKey(i.to_bytes(32, "big"), "bench/model", rank) for i in range(first, self.next)]

    def store(self, copy: bool) -> float:
        if len(self.idle) >= self.room:
            self.manager.delete_l1_keys(self.idle.popleft())
        keys = self.take(self.size)
        tensors = self.source.take(self.size) if copy else []
        begun = time.perf_counter()
        room = self.manager.reserve_write(keys, self.layout)
        for key, tensor in zip(keys, tensors, strict=False):
            room[key].tensor.copy_(tensor)
        self.manager.finish_write(keys)
        seconds = time.perf_counter() - begun
        assert len(room) == self.size, "no room"
        self.idle.append(keys)
        return seconds

    def lookup(self, keys: list[ObjectKey]) -> Any:
        group = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=self.layout)
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[group], fetching_policy="prefix"))
        self.manager.wait_prefetch_status(handle, timeout=60)
        return self.manager.query_prefetch_status(handle)

    def load(self, copy: bool) -> float:
        keys = self.idle.popleft()
        self.idle.append(keys)
        tensors = self.target.take(self.size) if copy else []
        begun = time.perf_counter()
        found = self.lookup(keys)
        with self.manager.read_prefetched_results(keys) as objects:
            for tensor, thing in zip(tensors, objects, strict=False):
                tensor.copy_(thing.tensor)
        self.manager.finish_read_prefetched(keys)
        seconds = time.perf_counter() - begun
        assert found.l1_hit_count == self.size, "not everything was found"
        return seconds

    def put(self) -> float:
        return self.size * nbytes(self.shape) / self.store(copy=True)

    def get(self) -> float:
        return self.size * nbytes(self.shape) / self.load(copy=True)

    def close(self) -> None:
        self.manager.close()


class MpLookup:
    def __init__(self) -> None:
        nothing = Tensors(0)
        self.mp = Mp(2000, 1000, nothing, nothing, SMALL)
        self.mp.store(copy=False)
        self.keys, self.missing = self.mp.idle[0], self.mp.take(1000)

    def hit(self) -> float:
        begun = time.perf_counter()
        found = self.mp.lookup(self.keys)
        seconds = time.perf_counter() - begun
        self.mp.manager.finish_read_prefetched(self.keys)
        assert found.l1_hit_count == 1000
        return seconds

    def miss(self) -> float:
        begun = time.perf_counter()
        self.mp.lookup(self.missing)
        return time.perf_counter() - begun


class Hashing:
    def __init__(self) -> None:
        self.list = [random.randrange(150_000) for _ in range(128 * 1024)]
        self.tensor = torch.tensor(self.list)
        self.legacy = ChunkedTokenDatabase(config(pre_caching_hash_algorithm="builtin"), metadata())
        self.mp = TokenHasher(CHUNK_TOKENS, "blake3")

    def run(self, which: str) -> float:
        begun = time.perf_counter()
        if which == "mp_list":
            count = len(self.mp.compute_chunk_hashes(self.list))
        else:
            tokens = self.list if which == "legacy_list" else self.tensor
            count = len(list(self.legacy.process_tokens(tokens=tokens)))
        seconds = time.perf_counter() - begun
        assert count == 512
        return seconds


class Engine:
    """The whole in-process engine with 16 KiB chunks and a connector that copies nothing: hashing + control plane."""

    def __init__(self) -> None:
        shape = (1, 2, CHUNK_TOKENS, 1, 16)
        self.engine = LMCacheEngineBuilder.get_or_create(
            "control",
            config(local_cpu=True, max_local_cpu_size=1.0),
            metadata(shape),
            MockGPUConnector(shape),
            mock_up_broadcast_fn,
            mock_up_broadcast_object_fn,
        )
        self.engine.post_init()
        self.next = 0
        self.tokens = torch.empty(0)

    def store(self) -> float:
        self.tokens = torch.arange(self.next, self.next + CONTROL * CHUNK_TOKENS)
        self.next += CONTROL * CHUNK_TOKENS
        begun = time.perf_counter()
        self.engine.store(self.tokens, kvcaches=None)
        return time.perf_counter() - begun

    def load(self) -> float:
        begun = time.perf_counter()
        mask = self.engine.retrieve(self.tokens)
        seconds = time.perf_counter() - begun
        assert int(mask.sum()) == CONTROL * CHUNK_TOKENS
        return seconds


class Worker:
    """What the runner may ask for."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        self.source = Tensors(0)
        self.target = Tensors(0)

    def memory(self, chunks: int, size: int) -> float:
        self.chunks, self.size = chunks, size
        self.source, self.target = Tensors(chunks), Tensors(chunks)
        self.parts["legacy"] = LegacyCpu(chunks, size, self.source, self.target)
        self.parts["mp"] = Mp(chunks, size, self.source, self.target)
        for part in self.parts.values():
            for _ in range(chunks // size):
                part.put()
        return 0.0

    def memcpy(self) -> float:
        pairs = list(zip(self.target.take(self.size), self.source.take(self.size), strict=True))
        begun = time.perf_counter()
        for to, at in pairs:
            to.copy_(at)
        return self.size * nbytes(BIG) / (time.perf_counter() - begun)

    def put(self, part: str, **args: float) -> float:
        return float(self.parts[part].put(**args))

    def get(self, part: str, **args: float) -> float:
        return float(self.parts[part].get(**args))

    def store(self, part: str, **args: bool) -> float:
        return float(self.parts[part].store(**args))

    def load(self, part: str, **args: bool) -> float:
        return float(self.parts[part].load(**args))

    def hit(self, part: str) -> float:
        return float(self.parts[part].hit())

    def miss(self, part: str) -> float:
        return float(self.parts[part].miss())

    def hash(self, which: str) -> float:
        return float(self.parts["hash"].run(which))

    def fresh(self, kind: str) -> float:
        """A new, untouched pool of one kind in place of the old one."""
        self.forget(kind)
        make = LegacyCpu if kind == "legacy" else Mp
        self.parts[kind] = make(self.chunks, self.size, self.source, self.target)
        return 0.0

    def forget(self, kind: str) -> float:
        part = self.parts.pop(kind, None)
        if part is not None and hasattr(part, "close"):
            part.close()
        return 0.0

    def small(self) -> float:
        nothing = Tensors(0)
        self.parts |= {
            "legacy_control": LegacyControl(),
            "legacy_lookup": LegacyLookup(),
            "mp_control": Mp(8 * CONTROL, CONTROL, nothing, nothing, SMALL),
            "mp_lookup": MpLookup(),
            "hash": Hashing(),
            "engine": Engine(),
        }
        self.parts["mp_control"].store(copy=False)
        return 0.0

    def redis(self, url: str, chunks: int) -> float:
        self.parts["redis"] = LegacyRedis(url, chunks, Tensors(chunks))
        return 0.0

    def disk(self, directory: str, chunks: int) -> float:
        self.source = Tensors(chunks)
        path = Path(directory)
        self.parts["direct"] = LegacyDisk(str(path / "direct"), True, chunks, self.source)
        self.parts["buffered"] = LegacyDisk(str(path / "buffered"), False, chunks, self.source)
        return 0.0


def main() -> None:
    worker = Worker()
    print(json.dumps({"value": 0.0}), file=ANSWERS)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"value": getattr(worker, request["op"])(**request["args"])}
        except Exception as error:
            answer = {"error": f"{request['op']}: {type(error).__name__}: {error}"}
        print(json.dumps(answer), file=ANSWERS)
    # Its threads and event loops do not all end by themselves.
    os._exit(0)


if __name__ == "__main__":
    main()
