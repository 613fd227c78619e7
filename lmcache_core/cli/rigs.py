"""Rigs of the built-in backends that need no server. Their baselines are the controls of `lmcachectl bench tiers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core.cli import bench_disk
from lmcache_core.cli.bench_common import Arena, effort
from lmcache_core.cli.bench_disk import Control, Direction
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.rig import Baseline, Medium, Rig
from lmcache_core.types import PAGE, round_up
from lmcache_core.units import Percent

if TYPE_CHECKING:
    _Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_SPAN = 256 << 20
"""Bytes a control works on."""
_THREADS = 4
_BATCH = 4
"""As `measure` has them."""


class CpuRig(Rig):
    """Host memory, beside plain copies."""

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        with ThreadPoolExecutor(_THREADS) as pool:
            copies = _Copies(pool)
            yield Medium(CpuConfig(), Baseline(f"memcpy, {_THREADS} threads", copies.put, copies.get))


class _Copies:
    """What `measure` does to a region, without one: from and to a few blocks of ordinary memory for each thread."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._arena: Arena | None = None
        self._blocks: list[_Bytes] = []

    def put(self, object_bytes: int, seconds: int) -> float:
        return self._rate(object_bytes, seconds, lambda piece, block: np.copyto(piece, block))

    def get(self, object_bytes: int, seconds: int) -> float:
        return self._rate(object_bytes, seconds, lambda piece, block: np.copyto(block, piece))

    def _rate(self, object_bytes: int, seconds: int, copy: Callable[[_Bytes, _Bytes], None]) -> float:
        """Bytes per second of copies for `seconds`."""
        if self._arena is None or self._arena.chunk_bytes != object_bytes:
            self._arena = Arena(object_bytes, _SPAN)
            self._blocks = [np.frombuffer(aligned(object_bytes), np.uint8) for _ in range(_THREADS * _BATCH)]
        arena = self._arena
        begun = perf_counter()

        def work(thread: int) -> int:
            copied = 0
            pieces = cycle(range(thread, arena.chunks, _THREADS))
            while not copied or perf_counter() - begun < seconds:
                for block in self._blocks[thread * _BATCH : (thread + 1) * _BATCH]:
                    copy(arena.piece(next(pieces)), block)
                    copied += object_bytes
            return copied

        return sum(self._pool.map(work, range(min(_THREADS, arena.chunks)))) / (perf_counter() - begun)


class GdsRig(Rig):
    """A directory, beside fio's best with direct I/O in the same place."""

    @contextmanager
    def start(self, directory: Path) -> Iterator[Medium]:
        controls = directory / "controls"
        controls.mkdir()
        disk = _Disk(controls)
        # What is measured is gone in minutes: the disk may be nearly full.
        config = GdsConfig(path=directory / "tier", free_floor=Percent(1))
        yield Medium(config, Baseline(disk.name, disk.put, disk.get))


class _Disk:
    """The fastest control of each direction, chosen by one look at all of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        tool = bench_disk.controls(directory, Arena(PAGE, 2 * PAGE), PAGE)[1]
        self.name = f"{tool}, direct I/O, the fastest of its ways in each direction"
        self._chosen: dict[int, dict[Direction, list[Control]]] = {}

    def put(self, object_bytes: int, seconds: int) -> float:
        return self._rate("write", object_bytes, seconds)

    def get(self, object_bytes: int, seconds: int) -> float:
        return self._rate("read", object_bytes, seconds)

    def _rate(self, direction: Direction, object_bytes: int, seconds: int) -> float:
        if object_bytes not in self._chosen:
            arena = Arena(object_bytes, 4 * round_up(object_bytes))
            arena.fill()
            ways, _ = bench_disk.controls(self._directory, arena, max(_SPAN, 4 * object_bytes))
            look = effort(quick=True)
            self._chosen[object_bytes] = bench_disk.finalists(ways, look)[0]
        (way,) = self._chosen[object_bytes][direction]
        return way.rate(direction, seconds)
