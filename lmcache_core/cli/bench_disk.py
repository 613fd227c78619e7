"""Measurements of the disk tier: puts and gets through the pipeline against fio on the same directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Literal

import numpy as np

from lmcache_core import _native
from lmcache_core.cli.bench_common import Arena, Arm, Effort, Ratio, batches, fresh_keys, interleave, pipeline_of
from lmcache_core.cli.bench_tiers import LOOKUP, TINY, milliseconds
from lmcache_core.errors import LMCacheError
from lmcache_core.handles import Lease, Transfer
from lmcache_core.layout import KVLayout
from lmcache_core.types import ChunkKey, object_bytes, round_up
from lmcache_core.units import format_bytes

Direction = Literal["write", "read"]

_PATIENCE = 600.0
"""Seconds for one batch; a benchmark waits for a slow disk."""
_HELD = 6
"""Batches on disk at once; half as many fit into memory."""


@dataclass(frozen=True, slots=True)
class Fio:
    """One way to run fio: direct I/O in blocks of one chunk, each job in a file of its own, sequentially."""

    program: str
    directory: Path
    block: int
    nbytes: int
    """Bytes of all jobs' files together."""
    engine: str
    depth: int
    jobs: int

    @property
    def name(self) -> str:
        """What is shown."""
        return f"fio {self.engine} iodepth={self.depth} numjobs={self.jobs}"

    def rate(self, direction: Direction, seconds: float) -> float:
        """Bytes per second of a run of `seconds`. Raise `LMCacheError` when fio cannot run like this here.

        Runs well below a second flatter deep queues: what is in flight when the clock starts counts in full.
        """
        each = max(1, self.nbytes // self.jobs // self.block) * self.block
        command = [
            self.program,
            "--name=control",
            f"--directory={self.directory}",
            "--filename_format=fio.$jobnum",
            # A mixed job that only reads: fio then touches its buffers before the clock starts.
            *(["--rw=write"] if direction == "write" else ["--rw=rw", "--rwmixread=100"]),
            f"--bs={self.block}",
            f"--size={each}",
            "--time_based",
            f"--runtime={round(seconds * 1000)}ms",
            f"--ioengine={self.engine}",
            f"--iodepth={self.depth}",
            f"--numjobs={self.jobs}",
            "--direct=1",
            "--thread",
            "--group_reporting",
            "--fallocate=none",
            "--invalidate=0",
            "--scramble_buffers=0",
            "--output-format=json",
        ]
        # Huge pages for its buffers, as our arena has.
        environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        try:
            job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        except (ValueError, LookupError):
            raise LMCacheError(f"{self.name} failed: {done.stderr.strip() or done.stdout.strip()}") from None
        if done.returncode or job["error"] or not job[direction]["bw_bytes"]:
            raise LMCacheError(f"{self.name} failed: {done.stderr.strip() or job['error']}")
        return float(job[direction]["bw_bytes"])


@dataclass(frozen=True, slots=True)
class Plain:
    """The control where fio is missing: `threads` threads that pread or pwrite one file, chunk by chunk."""

    directory: Path
    arena: Arena
    nbytes: int
    threads: int

    @property
    def name(self) -> str:
        """What is shown."""
        return f"own pread/pwrite, {self.threads} threads"

    def rate(self, direction: Direction, seconds: float) -> float:
        """Bytes per second over whole passes for `seconds` or more, direct I/O where the file system allows it."""
        block = round_up(self.arena.chunk_bytes)
        count = max(self.threads, min(self.nbytes // block, self.arena.chunks))
        move = _native.pwrite_batch if direction == "write" else _native.pread_batch
        fd = _open_direct(self.directory / "plain")
        try:
            parts = np.array_split(np.arange(count, dtype=np.int64), self.threads)

            def run(part: np.ndarray[Any, np.dtype[np.int64]]) -> int:
                sizes = np.full(part.size, block, dtype=np.int64)
                return int(move(np.full(part.size, fd), part * block, self.arena.addresses(part), sizes).sum())

            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(len, parts))  # start the threads before the clock
                passes = 0
                begun = perf_counter()
                while (spent := perf_counter() - begun) < seconds or not passes:
                    moved = sum(pool.map(run, parts))
                    passes += 1
                    if moved != count * block:
                        raise LMCacheError(f"{self.name}: {direction} moved {moved} of {count * block} bytes")
        finally:
            os.close(fd)
        return passes * count * block / spent


def _open_direct(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(path, flags, 0o600)


Control = Fio | Plain


def controls(directory: Path, arena: Arena, nbytes: int) -> tuple[list[Control], str]:
    """Every control there is, and the name of the baseline."""
    program = shutil.which("fio")
    if program is None:
        return [Plain(directory, arena, nbytes, threads) for threads in (1, 2)], "own pread/pwrite (fio not installed)"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    block = round_up(arena.chunk_bytes)
    ways = [("psync", 1), *product(("io_uring", "libaio"), (1, 4))]
    return [Fio(program, directory, block, nbytes, e, d, jobs) for (e, d), jobs in product(ways, (1, 2))], version


class DiskTier:
    """A pipeline over a disk tier that holds twice what fits into memory, so that reads in rotation are from disk."""

    def __init__(self, layout: KVLayout, directory: Path, size: int, source: Arena, io: str = "auto") -> None:
        """Write once over every part of the disk tier, as the controls do with their files."""
        self._size = size
        self._nbytes = size * layout.chunk_bytes
        stored = round_up(object_bytes(layout.chunk_bytes))
        self._queued = size * stored // 2
        disk = {
            "name": "disk",
            "capacity": (_HELD * size + 2) * stored + (16 << 20),
            "backend": {"type": "gds", "path": str(directory), "free_floor": "1%", "io": io},
            "lane": {"inflight": self._queued, "queue": 2 * size + 64, "deadline": _PATIENCE},
        }
        # A lane gets at most a quarter of memory.
        self._pipeline = pipeline_of(layout, _HELD // 2 * size, disk)
        self._batches: deque[list[ChunkKey]] = deque()
        """On disk, the one that was idle longest first."""
        self._prove(source)
        for _ in range(_HELD):
            self.put(0.0)

    def _prove(self, source: Arena) -> None:
        """Give every slot bytes of the source, then send one chunk to disk and back and compare."""
        slots = self._pipeline.slots.count
        with self._pipeline.reserve(fresh_keys(slots)) as room:
            pieces = np.arange(slots, dtype=np.int64) % source.chunks
            lengths = np.full(slots, source.chunk_bytes, dtype=np.int64)
            _native.copy_batch(room.addresses, source.addresses(pieces), lengths)
        keys = fresh_keys(1)
        self._pipeline.store(keys, lambda room: room.view(0).__setitem__(slice(None), source.piece(0).data))
        self._pipeline.flush(_PATIENCE)
        self._pipeline.clear("dram")
        with self._pipeline.retrieve(keys) as lease:
            self._check(lease, keys)
            if lease.view(0) != source.piece(0).data:
                raise LMCacheError("bytes read differ from the bytes written")

    def put(self, seconds: float) -> float:
        """Bytes per second of a stream of stores: from the first commit until all is sealed, written and journalled.

        Commits as fast as the lane takes them, for `seconds` but at least one batch. Nothing is copied into the slots:
        what they held is sealed and written under new keys.
        """
        tier = self._pipeline.tiers[0]
        part = max(1, self._size // 8)
        moved = 0
        begun = perf_counter()
        while not moved or perf_counter() - begun < seconds:
            keys = fresh_keys(self._size)
            for some in batches(keys, part):
                while tier.write_lane.room < len(some) * self._pipeline.slots.slot_bytes:
                    sleep(0.0005)
                with self._pipeline.reserve(some) as room:
                    room.commit()
            self._batches.append(keys)
            moved += self._nbytes
        written = self._pipeline.flush(_PATIENCE)
        spent = perf_counter() - begun
        while len(self._batches) >= _HELD:
            self._batches.popleft()
        if not written or not all(all(tier.present(keys) or [False]) for keys in self._batches):
            raise LMCacheError(f"not every chunk was written: the measurement is void ({tier.last_error or 'dropped'})")
        return moved / spent

    def get(self, seconds: float) -> float:
        """Bytes per second of two readers: from the first fetch until every chunk is in memory and verified.

        A batch is a request; when one has arrived it is released and the next asked for, for `seconds` or more.
        """
        waiting: deque[tuple[list[ChunkKey], Transfer]] = deque()
        moved = 0
        begun = perf_counter()
        for _ in range(2):
            waiting.append(self._fetch())
        while waiting:
            keys, transfer = waiting.popleft()
            transfer.wait(_PATIENCE)
            with transfer.result() as lease:
                self._check(lease, keys)
            moved += self._nbytes
            if perf_counter() - begun < seconds:
                waiting.append(self._fetch())
        return moved / (perf_counter() - begun)

    def _fetch(self) -> tuple[list[ChunkKey], Transfer]:
        keys = self._batches[0]
        self._batches.rotate(-1)
        return keys, self._pipeline.fetch(keys)

    def _check(self, lease: Lease, keys: list[ChunkKey]) -> None:
        if lease.keys != keys or set(lease.sources) != {"disk"}:
            found = lease.sources.count("disk")
            raise LMCacheError(
                f"{found} of {len(keys)} chunks came from disk ({lease.reason}): the measurement is void"
            )

    def close(self) -> None:
        """Close the pipeline; the directory stays."""
        self._pipeline.close()


@dataclass(frozen=True, slots=True)
class DiskResult:
    """One chunk size on disk."""

    put: Ratio
    get: Ratio
    baseline: str
    looked_at: dict[str, dict[str, float]]
    """GB/s of every control in the one look that chose the finalists, by direction."""
    direct: bool
    """Whether the directory's file system allows direct I/O."""


def measure_disk(layout: KVLayout, directory: Path, effort: Effort) -> DiskResult:
    """Put and get through the pipeline, sealed and verified, against the best control of the same directory.

    Raise `LMCacheError` when the file system has too little room, or when chunks do not come back as they were stored.
    """
    stored = round_up(object_bytes(layout.chunk_bytes))
    size = max(2, effort.disk_batch // layout.chunk_bytes)
    need = (_HELD * size + 2) * stored + 2 * size * stored
    free = shutil.disk_usage(directory).free
    if need > free * 0.9:
        raise LMCacheError(
            f"{directory} has {format_bytes(free)} free, the disk benchmark takes {format_bytes(need)}: "
            "give another directory with --path, or smaller chunks with --chunk-bytes"
        )
    source = Arena(layout.chunk_bytes, size * stored)
    source.fill()
    ways, baseline = controls(directory, source, size * layout.chunk_bytes)
    chosen, looked_at = finalists(ways, effort)
    tier = DiskTier(layout, directory / "tier", size, source)

    def control(way: Control, direction: Direction) -> Arm:
        return lambda _: way.rate(direction, effort.disk_turn)

    arms: dict[str, Arm] = {
        "put": lambda _: tier.put(effort.disk_turn),
        "get": lambda _: tier.get(effort.disk_turn),
    }
    for direction, ways in chosen.items():
        arms |= {f"{direction} {way.name}": control(way, direction) for way in ways}
    rates = interleave(arms, effort.disk_rounds)
    tier.close()
    ratios = {
        subject: Ratio.of(rates, subject, [name for name in rates if name.startswith(f"{direction} ")])
        for subject, direction in (("put", "write"), ("get", "read"))
    }
    return DiskResult(ratios["put"], ratios["get"], baseline, looked_at, _is_direct(directory))


def finalists(
    ways: list[Control], effort: Effort
) -> tuple[dict[Direction, list[Control]], dict[str, dict[str, float]]]:
    """Run every control once per direction; keep the fastest."""
    chosen: dict[Direction, list[Control]] = {}
    seen: dict[str, dict[str, float]] = {}
    working = _that_run(ways)
    directions: tuple[Direction, ...] = ("write", "read")
    for direction in directions:
        rates = {way.name: way.rate(direction, effort.disk_turn / 2) for way in working}
        chosen[direction] = sorted(working, key=lambda way: -rates[way.name])[: effort.disk_finalists]
        seen[direction] = {name: round(rate / 1e9, 3) for name, rate in rates.items()}
    return chosen, seen


def _that_run(ways: list[Control]) -> list[Control]:
    """The controls that this machine can run, after laying out their files; io_uring is often forbidden."""
    working: list[Control] = []
    failures: list[str] = []
    for way in ways:
        try:
            way.rate("write", 0.05)
        except LMCacheError as error:
            failures.append(str(error))
        else:
            working.append(way)
    if not working:
        raise LMCacheError("no control runs here: " + "; ".join(failures))
    return working


def _is_direct(directory: Path) -> bool:
    path = directory / "direct"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600))
    except OSError:
        return False
    return True


def measure_disk_lookup(directory: Path, effort: Effort) -> float:
    """Milliseconds of one lookup of 1,000 chunks that are on disk only, median."""
    stored = round_up(object_bytes(TINY.chunk_bytes))
    tier = {
        "name": "disk",
        "capacity": 8 * LOOKUP * stored,
        "backend": {"type": "gds", "path": str(directory / "lookup"), "free_floor": "1%"},
        "lane": {"deadline": _PATIENCE},
    }
    pipeline = pipeline_of(TINY, 4 * LOOKUP, tier)
    keys = fresh_keys(LOOKUP)
    pipeline.store(keys, lambda room: None)
    pipeline.flush(_PATIENCE)
    pipeline.clear("dram")
    if pipeline.lookup(keys).sources != ["disk"] * LOOKUP:
        raise LMCacheError("the lookup did not find every chunk on disk: the measurement is void")
    found = milliseconds(lambda: pipeline.lookup(keys), effort.small_rounds)
    pipeline.close()
    return found
