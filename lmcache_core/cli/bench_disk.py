"""Measurements of the disk tier: puts and gets through the pipeline against fio on the same directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np

from lmcache_core import _native
from lmcache_core.cli.bench_common import Arena, Arm, Effort, Ratio, fresh_keys, interleave, pipeline_of
from lmcache_core.cli.bench_tiers import LOOKUP, TINY, milliseconds
from lmcache_core.errors import LMCacheError
from lmcache_core.layout import KVLayout
from lmcache_core.types import ChunkKey, object_bytes, round_up
from lmcache_core.units import format_bytes

Direction = Literal["write", "read"]

_PATIENCE = 600.0
"""Seconds for one batch; a benchmark waits for a slow disk."""
_HELD = 3
"""Batches on disk at once."""


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
    """A pipeline over a disk tier that holds the last few batches."""

    def __init__(self, layout: KVLayout, directory: Path, size: int, source: Arena) -> None:
        self._size = size
        self._source = source
        self._lengths = np.full(size, layout.chunk_bytes, dtype=np.int64)
        stored = round_up(object_bytes(layout.chunk_bytes))
        disk = {
            "name": "disk",
            "capacity": (_HELD * size + 2) * stored + (16 << 20),
            "backend": {"type": "gds", "path": str(directory), "free_floor": "1%"},
            # A batch goes to the lane at once; the defaults would drop what lies beyond them.
            "lane": {"inflight": 2 * size * stored, "queue": 2 * size + 64, "deadline": _PATIENCE},
        }
        # A lane gets at most a quarter of memory.
        self._pipeline = pipeline_of(layout, 4 * size + 4, disk)
        self._idle: deque[tuple[list[ChunkKey], int]] = deque()

    def put(self, number: int) -> float:
        """Seconds from commit until a batch is sealed, written and in the journal."""
        keys = fresh_keys(self._size)
        with self._pipeline.reserve(keys) as room:
            _native.copy_batch(
                room.addresses, self._source.addresses(self._source.pieces(number, self._size)), self._lengths
            )
            begun = perf_counter()
            room.commit()
            written = self._pipeline.flush(_PATIENCE)
            seconds = perf_counter() - begun
        if not written or not all(self._pipeline.tiers[0].present(keys) or [False]):
            raise LMCacheError("not every chunk was written: the measurement is void")
        self._idle.append((keys, number))
        if len(self._idle) > _HELD - 1:
            self._idle.popleft()
        return seconds

    def get(self, number: int) -> float:
        """Seconds from fetch until a batch is in memory and verified; `number` is the round's and unused."""
        keys, stored = self._idle.popleft()
        self._idle.append((keys, stored))
        self._pipeline.clear("dram")
        begun = perf_counter()
        lease = self._pipeline.retrieve(keys)
        seconds = perf_counter() - begun
        with lease:
            if lease.sources != ["disk"] * self._size:
                raise LMCacheError(
                    f"{lease.sources.count('disk')} of {self._size} chunks came from disk ({lease.reason})"
                )
            last = int(self._source.pieces(stored, self._size)[-1])
            if lease.view(self._size - 1) != self._source.piece(last).data:
                raise LMCacheError("bytes read differ from the bytes written")
        return seconds

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
    chosen, looked_at = _finalists(ways, effort)
    tier = DiskTier(layout, directory / "tier", size, source)
    for number in range(_HELD + 1):
        tier.put(number)  # until every segment has been written once, as fio's files have

    def turn(batch: Callable[[int], float]) -> Arm:
        """As many batches as take as long as a turn of fio, their pauses not counted."""

        def run(number: int) -> float:
            seconds, done = 0.0, 0
            while seconds < effort.disk_turn:
                seconds += batch(number + done)
                done += 1
            return done * size * layout.chunk_bytes / seconds

        return run

    def control(way: Control, direction: Direction) -> Arm:
        return lambda _: way.rate(direction, effort.disk_turn)

    arms = {"put": turn(tier.put), "get": turn(tier.get)}
    for direction, ways in chosen.items():
        arms |= {f"{direction} {way.name}": control(way, direction) for way in ways}
    rates = interleave(arms, effort.disk_rounds)
    tier.close()
    ratios = {
        subject: Ratio.of(rates, subject, [name for name in rates if name.startswith(f"{direction} ")])
        for subject, direction in (("put", "write"), ("get", "read"))
    }
    return DiskResult(ratios["put"], ratios["get"], baseline, looked_at, _is_direct(directory))


def _finalists(
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
