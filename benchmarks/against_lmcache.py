"""LMCache 0.5.6 beside lmcache-core in one run: both sides and a memcpy control take turns, round by round.

LMCache lives in an environment of its own (see docs/benchmarks.md); `peer_worker.py` runs there and measures one step
at a time on request, this process measures ours. Chunks are 32 MiB (256 tokens of Llama-3.1-8B in bfloat16), one copy
thread on both sides, pools full and warm unless the row says otherwise. Prints a table and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np

from lmcache_backends.redis_store import RedisConfig
from lmcache_backends.redis_store.rig import Server
from lmcache_core import _native
from lmcache_core.cli import bench_common
from lmcache_core.cli.bench_common import (
    CHUNK_TOKENS,
    Arena,
    Arm,
    Effort,
    copy_arms,
    fresh_keys,
    interleave,
    pipeline_of,
)
from lmcache_core.cli.bench_disk import DiskTier
from lmcache_core.cli.bench_tiers import CONTROL_BATCH, LOOKUP, TINY, TOKENS, MemoryTier
from lmcache_core.cli.console import emit, warn, working
from lmcache_core.cli.layouts import preset
from lmcache_core.cli.model import default_directory
from lmcache_core.errors import LMCacheError
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.protocols import BuildContext
from lmcache_core.types import ChunkKey, object_bytes, round_up

LEVEL = 0.97
"""From this ratio on two sides count as level: the spread of a quiet machine."""

THREADS = 2
"""Callers of our Redis backend at a time; LMCache's connector brings threads of its own."""

LAYOUT = preset("llama-3.1-8b", CHUNK_TOKENS)
WORKER = Path(__file__).with_name("peer_worker.py")


class Peer:
    """The worker process in LMCache's environment, for the time of a `with` block."""

    def __init__(self, python: str) -> None:
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise LMCacheError(
                f"cannot start {python}: {error.strerror}; see docs/benchmarks.md for its set-up"
            ) from error

    def __enter__(self) -> Peer:
        try:
            self._answer("start")
        except LMCacheError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, op: str, **args: Any) -> float:
        """One step; its value. Raise `LMCacheError` when it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, "args": args}) + "\n")
        self._process.stdin.flush()
        return self._answer(op)

    def arm(self, op: str, **args: Any) -> Arm:
        """The step as one side of a comparison."""
        return lambda _: self(op, **args)

    def _answer(self, op: str) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LMCacheError(f"LMCache's process ended at {op!r}: is lmcache==0.5.6 installed there with torch?")
        answer = json.loads(line)
        if "error" in answer:
            raise LMCacheError(f"LMCache: {answer['error']}")
        return float(answer["value"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: medians over the rounds, in the row's unit."""

    name: str
    unit: str
    ours: float
    theirs: dict[str, float]
    """By part of LMCache: `legacy` is the in-process engine, `mp` the storage manager of the multiprocess server."""
    ratio: float
    """Times as fast as the faster of theirs: median over the rounds."""
    control: float | None = None
    """A memcpy of the same bytes, where bytes are copied."""

    @property
    def verdict(self) -> str:
        return "ahead" if self.ratio > 1 / LEVEL else "level" if self.ratio >= LEVEL else "BEHIND"


def compare(name: str, unit: str, scale: float, rounds: int, arms: Mapping[str, Arm]) -> Row:
    """Interleave `ours`, LMCache's parts and perhaps `control`. Arms return rates; seconds where `unit` is a time."""
    timed = unit in ("ms", "us/key")
    found = interleave(arms, rounds)
    rates = {arm: [1 / x for x in xs] if timed else xs for arm, xs in found.items()}
    theirs = [arm for arm in arms if arm not in ("ours", "control")]
    best = max(theirs, key=lambda arm: statistics.median(rates[arm]))
    middle = {arm: round(statistics.median(xs) * scale, 3) for arm, xs in found.items()}
    return Row(
        name,
        unit,
        middle["ours"],
        {arm: middle[arm] for arm in theirs},
        round(statistics.median(a / b for a, b in zip(rates["ours"], rates[best], strict=True)), 3),
        middle.get("control"),
    )


def memory_rows(peer: Peer, effort: Effort) -> list[Row]:
    """Put, get and first puts of 32 MiB chunks."""
    chunk = LAYOUT.chunk_bytes
    source, target = Arena(chunk, effort.span), Arena(chunk, effort.span)
    source.fill()
    size = max(1, min(effort.copy_batch // chunk, source.chunks // 2))
    lengths = np.full(size, chunk, dtype=np.int64)
    control = copy_arms(source, target, size, 1)["memcpy"]

    def copy_in(slots: Any) -> None:
        _native.copy_batch(slots, source.addresses(source.take(size)), lengths)

    def copy_out(slots: Any) -> None:
        _native.copy_batch(target.addresses(target.take(size)), slots, lengths)

    peer("memory", chunks=source.chunks, size=size)
    tier = MemoryTier(LAYOUT, source.chunks, size)
    tier.fill(copy_in)
    rows = []
    ours: dict[str, Arm] = {"put": lambda _: tier.put(copy_in), "get": lambda _: tier.get(copy_out)}
    for name, mine in ours.items():
        arms = {"ours": mine, "control": control, **{part: peer.arm(name, part=part) for part in ("legacy", "mp")}}
        rows.append(compare(f"memory {name}", "GB/s", 1e-9, effort.copy_rounds, arms))
    batches = tier.batches
    tier.close()
    cold: dict[str, list[float]] = {}
    for _ in range(effort.cold_builds):
        tier = MemoryTier(LAYOUT, source.chunks, size)
        for part in ("legacy", "mp"):
            peer("fresh", kind=part)
        arms = {"ours": ours["put"], "control": control, **{p: peer.arm("put", part=p) for p in ("legacy", "mp")}}
        for arm, rates in interleave(arms, batches).items():
            cold.setdefault(arm, []).extend(rates)
        tier.close()
    replay: dict[str, Arm] = {arm: rates.__getitem__ for arm, rates in cold.items()}
    rows.append(compare("memory put, fresh pool", "GB/s", 1e-9, effort.cold_builds * batches, replay))
    for part in ("legacy", "mp"):
        peer("forget", kind=part)
    return rows


class Control:
    """Our control plane over a full pool of tiny chunks, in batches of 128 keys."""

    def __init__(self) -> None:
        self._pipeline = pipeline_of(TINY, 8 * CONTROL_BATCH)
        self._identity = Identity(model="bench/model", weights="0" * 64, layout=TINY)
        self._next = 0
        self._tokens = np.zeros(0, dtype=np.int32)
        self._keys: list[ChunkKey] = []
        for _ in range(8):
            self.store(0)

    def store(self, _: int) -> float:
        """Seconds of reserve + slot addresses + commit."""
        self._keys = fresh_keys(CONTROL_BATCH)
        begun = perf_counter()
        self._reserve(self._keys)
        return perf_counter() - begun

    def load(self, _: int) -> float:
        """Seconds of fetch + slot addresses + release."""
        begun = perf_counter()
        self._fetch(self._keys)
        return perf_counter() - begun

    def store_tokens(self, _: int) -> float:
        """The same from token ids."""
        first, self._next = self._next, self._next + CONTROL_BATCH * CHUNK_TOKENS
        self._tokens = np.arange(first, self._next, dtype=np.int32)
        begun = perf_counter()
        self._reserve(chunk_keys(self._identity, self._tokens))
        return perf_counter() - begun

    def load_tokens(self, _: int) -> float:
        """The same from token ids."""
        begun = perf_counter()
        self._fetch(chunk_keys(self._identity, self._tokens))
        return perf_counter() - begun

    def _reserve(self, keys: Sequence[ChunkKey]) -> None:
        with self._pipeline.reserve(keys) as room:
            _ = room.addresses
            if room.commit() != CONTROL_BATCH:
                raise LMCacheError("not every key was stored: the measurement is void")

    def _fetch(self, keys: Sequence[ChunkKey]) -> None:
        with self._pipeline.fetch(keys).result() as lease:
            _ = lease.addresses
            if len(lease) != CONTROL_BATCH:
                raise LMCacheError("not every key was found: the measurement is void")


def small_rows(peer: Peer, effort: Effort) -> list[Row]:
    """Lookups, hashing and the control plane."""
    rounds = effort.small_rounds
    peer("small")
    rows = []

    pipeline = pipeline_of(TINY, LOOKUP)
    present, absent = fresh_keys(LOOKUP), fresh_keys(LOOKUP)
    pipeline.store(present, lambda room: None)
    for name, op, keys in (("present", "hit", present), ("absent", "miss", absent)):

        def ours(_: int, keys: list[ChunkKey] = keys) -> float:
            begun = perf_counter()
            pipeline.lookup(keys)
            return perf_counter() - begun

        arms: dict[str, Arm] = {"ours": ours, **{p: peer.arm(op, part=f"{p}_lookup") for p in ("legacy", "mp")}}
        rows.append(compare(f"lookup of 1,000 chunks, {name}", "ms", 1e3, rounds, arms))
    pipeline.close()

    identity = Identity(model="bench/model", weights="0" * 64, layout=TINY)
    array = np.random.default_rng(3).integers(0, 150_000, TOKENS, dtype=np.int32)
    given = {"an array": (array, ("legacy_tensor",)), "a list": (array.tolist(), ("legacy_list", "mp_list"))}
    for name, (tokens, others) in given.items():

        def hashed(_: int, tokens: Any = tokens) -> float:
            begun = perf_counter()
            chunk_keys(identity, tokens)
            return perf_counter() - begun

        arms = {"ours": hashed, **{which.split("_")[0]: peer.arm("hash", which=which) for which in others}}
        rows.append(compare(f"keys of 128k tokens from {name}", "ms", 1e3, max(5, rounds // 2), arms))

    control = Control()
    scale = 1e6 / CONTROL_BATCH

    def beside(mine: Arm, op: str) -> dict[str, Arm]:
        return {
            "ours": mine,
            "legacy": peer.arm(op, part="legacy_control"),
            "mp": peer.arm(op, part="mp_control", copy=False),
        }

    arms = beside(control.store, "store")
    rows.append(compare("store of 128 keys, evicting, no copy", "us/key", scale, rounds, arms))
    arms = beside(control.load, "load")
    rows.append(compare("load of 128 keys, no copy", "us/key", scale, rounds, arms))
    arms = {"ours": control.store_tokens, "legacy": peer.arm("store", part="engine")}
    rows.append(compare("tokens -> keys -> store, no copy", "us/key", scale, rounds, arms))
    arms = {"ours": control.load_tokens, "legacy": peer.arm("load", part="engine")}
    rows.append(compare("tokens -> keys -> load, no copy", "us/key", scale, rounds, arms))
    return rows


def disk_rows(peer: Peer, effort: Effort, directory: Path) -> list[Row]:
    """Put and get of 32 MiB chunks, like beside like: direct I/O, then the page cache. Theirs has no checksums."""
    stored = round_up(object_bytes(LAYOUT.chunk_bytes))
    size = max(2, effort.disk_batch // LAYOUT.chunk_bytes)
    source = Arena(LAYOUT.chunk_bytes, size * stored)
    source.fill()
    peer("disk", directory=str(directory / "theirs"), chunks=size)
    turn = effort.disk_turn
    rows = []
    for io in ("direct", "buffered"):
        tier = DiskTier(LAYOUT, directory / io, size, source, io)
        arms: dict[str, Arm] = {
            "ours": lambda _, tier=tier: tier.put(turn),
            "legacy": peer.arm("put", part=io, seconds=turn),
        }
        what = "direct I/O" if io == "direct" else "into the page cache"
        rows.append(compare(f"disk put, {what}", "GB/s", 1e-9, effort.disk_rounds, arms))
        if io == "direct":
            arms = {
                "ours": lambda _, tier=tier: tier.get(turn),
                "legacy": peer.arm("get", part=io, seconds=turn),
            }
            rows.append(compare("disk get, direct I/O", "GB/s", 1e-9, effort.disk_rounds, arms))
        tier.close()
    return rows


def redis_rows(peer: Peer, effort: Effort, directory: Path) -> list[Row]:
    """Put and get of 8 MiB chunks on one Redis server: whole calls of our backend, sealed objects, no retries."""
    chunks, nbytes = 16, 8 << 20
    seconds = effort.disk_turn
    source = Arena(object_bytes(nbytes), (chunks + 2) * round_up(object_bytes(nbytes)))
    source.fill()
    views = [memoryview(source.piece(i)).cast("B") for i in range(chunks)]
    keys = fresh_keys(chunks)
    with Server(directory / "redis") as server:
        config = RedisConfig(url=f"redis://127.0.0.1:{server.port}")
        backend = config.build(BuildContext("bench", object_bytes(nbytes), None, THREADS, deadline=60.0))
        peer("redis", url=f"redis://127.0.0.1:{server.port}", chunks=chunks)
        pool = ThreadPoolExecutor(THREADS)
        parts = [slice(at, at + chunks // THREADS) for at in range(0, chunks, chunks // THREADS)]

        def moving(call: Callable[[slice], list[Any]], good: Any) -> Arm:
            def arm(_: int) -> float:
                moved, begun = 0, perf_counter()
                while not moved or perf_counter() - begun < seconds:
                    if any(result != good for part in pool.map(call, parts) for result in part):
                        raise LMCacheError("Redis did not take or give every object: the measurement is void")
                    moved += chunks * nbytes
                return moved / (perf_counter() - begun)

            return arm

        put = moving(lambda part: backend.put_from(keys[part], views[part]), None)
        get = moving(lambda part: backend.get_into(keys[part], views[part]), object_bytes(nbytes))
        rows = []
        for name, ours in (("put", put), ("get", get)):
            arms: dict[str, Arm] = {"ours": ours, "legacy": peer.arm(name, part="redis", seconds=seconds)}
            rows.append(compare(f"Redis {name}, 8 MiB", "GB/s", 1e-9, effort.disk_rounds, arms))
        pool.shutdown()
        backend.close()
    return rows


def render(rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [
        "| | unit | lmcache-core | LMCache, in process | LMCache, multiprocess | memcpy | ratio | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        legacy = " / ".join(f"{value:g}" for part, value in row.theirs.items() if part != "mp") or "-"
        mp = f"{row.theirs['mp']:g}" if "mp" in row.theirs else "-"
        memcpy = f"{row.control:g}" if row.control is not None else ""
        cells = [row.name, row.unit, f"{row.ours:g}", legacy, mp, memcpy, f"{row.ratio:.2f}", row.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print. 0 when lmcache-core is ahead or level in every row, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("PEER_PYTHON", ".venv-peer/bin/python"),
        help="Python of the environment that has LMCache (default: PEER_PYTHON, or %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--path", type=Path, metavar="DIR", help="where to measure the disk (default: the cache directory)"
    )
    parser.add_argument(
        "--only", choices=("memory", "disk", "redis", "small"), action="append", help="only these; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    args = parser.parse_args(argv)
    effort = bench_common.effort(args.quick)
    parent = args.path or default_directory().parent
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    rows: list[Row] = []
    parts: dict[str, Callable[[Peer], list[Row]]] = {
        "memory": lambda peer: memory_rows(peer, effort),
        "disk": lambda peer: disk_rows(peer, effort, directory),
        "redis": lambda peer: redis_rows(peer, effort, directory),
        "small": lambda peer: small_rows(peer, effort),
    }
    try:
        for part, measure in parts.items():
            if args.only and part not in args.only:
                continue
            with working(f"{part}: lmcache-core and LMCache in turns"), Peer(args.peer_python) as peer:
                rows += measure(peer)
    except LMCacheError as error:
        warn(str(error))
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if not args.json:
        print(render(rows), end="\n\n")
    emit({
        "machine": bench_common.describe_machine(),
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
    })  # fmt: skip
    return 0 if all(row.ratio >= LEVEL for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
