"""How the benchmarks measure: interleaved arms, ratios round by round, and memory that beats the caches.

A ratio compares a subject with a control of the same run. In every round each arm runs once, in rotating order, on
bytes that no arm touched lately; the ratio is the median over the rounds of subject / control, so that a slow moment
of the machine meets both. Of several controls the one with the highest median rate counts.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_backends.cpu import CpuMemory
from lmcache_core import _native
from lmcache_core.build import build
from lmcache_core.cli.model import default_directory
from lmcache_core.config import load, machine
from lmcache_core.errors import LMCacheError
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.types import IDENTITY_BYTES, KEY_BYTES, ChunkKey, object_bytes, round_up
from lmcache_core.units import format_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_TOKENS = 256
_ENOUGH_CACHE = 256 << 20
_MOST_SPAN = 1 << 30
_MEMORY_SHARE = 8
"""A run needs four arenas of the span, or four batches of the disk tier, at once: half of what is free."""

Arm = Callable[[int], float]
"""One side of a comparison: given the number of the round, do the work and return bytes per second."""


@dataclass(frozen=True)
class Effort:
    """How much is measured. Sizes in bytes."""

    span: int
    """Source, destination and pool each have this size, so that no arm finds its bytes in a cache."""
    copy_batch: int = 128 << 20
    """Bytes of one put or get."""
    copy_rounds: int = 60
    cold_builds: int = 4
    disk_batch: int = 512 << 20
    """Bytes of one request to the disk tier; three of them in memory, six on disk."""
    disk_turn: float = 2.0
    """Seconds of one turn of each arm on disk."""
    disk_finalists: int = 2
    """Controls of each direction that run in every round, after one look at all of them."""
    disk_rounds: int = 9
    small_rounds: int = 100
    """Rounds of the lookups, hashes and control-plane batches."""


def effort(quick: bool) -> Effort:
    """The effort for this machine."""
    share = machine.memory_available() // _MEMORY_SHARE
    span = min(max(_ENOUGH_CACHE, 2 * last_level_cache()), _MOST_SPAN, share)
    full = Effort(span, disk_batch=min(Effort.disk_batch, share))
    if not quick:
        return full
    return replace(full, copy_rounds=16, cold_builds=2, disk_turn=0.6, disk_finalists=1, disk_rounds=5, small_rounds=40)


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0, or 0 where the kernel does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)


@contextmanager
def work_directory(path: Path | None) -> Iterator[Path]:
    """A new directory in `path` (default: the cache directory) for the files of one run, removed at the end."""
    parent = path if path is not None else default_directory().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    except OSError as error:
        raise LMCacheError(f"cannot write to {parent}: {error.strerror}; give another directory with --path") from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def interleave(arms: Mapping[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Run every arm once per round, in rotating order; return each arm's rates in bytes per second, by round."""
    names = list(arms)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            rates[name].append(arms[name](number))
    return rates


@dataclass(frozen=True, slots=True)
class Ratio:
    """A subject against the best of its controls. Rates in GB/s (10^9 bytes per second)."""

    ratio: float
    """Median over the rounds of subject / control."""
    subject: float
    """Median rate of the subject."""
    subject_best: float
    control: float
    """Median rate of the best control."""
    control_best: float
    control_name: str

    @classmethod
    def of(cls, rates: Mapping[str, Sequence[float]], subject: str, controls: Sequence[str]) -> Ratio:
        """Compare `rates[subject]` with the control that has the highest median."""
        name = max(controls, key=lambda c: statistics.median(rates[c]))
        pairs = list(zip(rates[subject], rates[name], strict=True))
        return cls(
            ratio=round(statistics.median(mine / theirs for mine, theirs in pairs), 3),
            subject=_giga(statistics.median(rates[subject])),
            subject_best=_giga(max(rates[subject])),
            control=_giga(statistics.median(rates[name])),
            control_best=_giga(max(rates[name])),
            control_name=name,
        )


def _giga(rate: float) -> float:
    return round(rate / 1e9, 3)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = perf_counter()
    work()
    return perf_counter() - begun


class Arena:
    """Pre-faulted memory from the `cpu` backend, cut like slots: `chunks` pieces with a header page before each."""

    def __init__(self, chunk_bytes: int, span: int) -> None:
        self.chunk_bytes = chunk_bytes
        self._stride = round_up(object_bytes(chunk_bytes))
        self.chunks = max(2, span // self._stride)
        self._memory = CpuMemory(pin=False, shared=False)
        region = self._memory.allocate(self.chunks * self._stride)
        self.bytes: NDArray[np.uint8] = np.frombuffer(region.view, dtype=np.uint8)
        offsets = np.arange(self.chunks, dtype=np.int64) * self._stride + (self._stride - round_up(chunk_bytes))
        self._offsets = offsets
        self._address = region.address
        self._at = 0

    def fill(self) -> None:
        """Random bytes; each piece begins with its own number."""
        tile = np.frombuffer(np.random.default_rng(0).bytes(min(self.bytes.size, 8 << 20)), dtype=np.uint8)
        for at in range(0, self.bytes.size, tile.size):
            room = self.bytes[at : at + tile.size]
            room[:] = tile[: room.size]
        for number, offset in enumerate(self._offsets):
            self.bytes[offset : offset + 8] = np.frombuffer(number.to_bytes(8, "little"), dtype=np.uint8)

    def take(self, size: int) -> NDArray[np.int64]:
        """Numbers of the next `size` pieces in rotation: whoever takes them, they are those that were idle longest."""
        taken = (np.arange(size, dtype=np.int64) + self._at) % self.chunks
        self._at += size
        return taken

    def addresses(self, pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        """Byte addresses of pieces."""
        return self._offsets[pieces] + self._address

    def piece(self, number: int) -> NDArray[np.uint8]:
        """The bytes of one piece."""
        offset = int(self._offsets[number])
        return self.bytes[offset : offset + self.chunk_bytes]


def copy_arms(source: Arena, target: Arena, size: int, threads: int) -> dict[str, Arm]:
    """The control of every copy: memcpy of the same chunks as NumPy calls it; with several threads, the project's own
    `copy_batch`, since memcpy has one."""
    lengths = np.full(size, source.chunk_bytes, dtype=np.int64)
    nbytes = size * source.chunk_bytes

    def native(_: int) -> float:
        to, at = target.addresses(target.take(size)), source.addresses(source.take(size))
        return nbytes / seconds_of(lambda: _native.copy_batch(to, at, lengths, threads))

    def libc(_: int) -> float:
        pairs = [
            (target.piece(int(to)), source.piece(int(at)))
            for to, at in zip(target.take(size), source.take(size), strict=True)
        ]

        def copy() -> None:
            for to, at in pairs:
                np.copyto(to, at)

        return nbytes / seconds_of(copy)

    return {"memcpy": libc} if threads == 1 else {"copy_batch": native}


_numbers = count(1)


def fresh_keys(n: int) -> list[ChunkKey]:
    """Keys never given out before in this process."""
    head = b"lmcache-bench".ljust(IDENTITY_BYTES, b"\0")
    return [ChunkKey(head + next(_numbers).to_bytes(KEY_BYTES - IDENTITY_BYTES, "big")) for _ in range(n)]


def pipeline_of(layout: KVLayout, slots: int, disk: Mapping[str, Any] | None = None) -> Pipeline:
    """A pipeline with a memory tier of `slots` slots over, perhaps, the disk tier described by `disk`."""
    capacity = slots * round_up(object_bytes(layout.chunk_bytes))
    tiers: list[Mapping[str, Any]] = [{"name": "dram", "capacity": capacity, "backend": {"type": "cpu"}}]
    if disk is not None:
        tiers.append(disk)
    loaded = load({"chunk_tokens": layout.chunk_tokens, "tiers": tiers}, env={})
    return build(loaded.config, layout)


def batches(keys: Sequence[ChunkKey], size: int) -> Iterator[list[ChunkKey]]:
    """The keys in lists of `size`."""
    return (list(keys[at : at + size]) for at in range(0, len(keys), size))


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on, with the date."""
    name = platform.machine()
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache": format_bytes(last_level_cache()),
        "memory": format_bytes(machine.memory_total()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "simd": _native.simd(),
        "load": round(os.getloadavg()[0], 2),
    }
