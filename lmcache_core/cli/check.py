"""`lmcachectl check FILE`: load a configuration, build it, and send random chunks through every tier and back."""

from __future__ import annotations

import argparse
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from lmcache_core import redact
from lmcache_core.build import build
from lmcache_core.cli.console import OK, PROBLEM, add_json, emit, table, warn, working
from lmcache_core.cli.layouts import add_model, of_model
from lmcache_core.config import PipelineConfig, TierConfig, load
from lmcache_core.errors import ConfigError
from lmcache_core.gpu import Event, Stream, copy_batch
from lmcache_core.hookspecs import hookimpl
from lmcache_core.layout import KVLayout
from lmcache_core.mirror import Mirror
from lmcache_core.pipeline import Pipeline
from lmcache_core.plugins import Plugins
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, SerdeContext, StorageBackend
from lmcache_core.testing.serde import kv_like
from lmcache_core.tier import StorageTier
from lmcache_core.types import KEY_BYTES, ChunkKey
from lmcache_core.units import format_bytes, format_seconds, parse_seconds

T = TypeVar("T")

_CHUNKS = 4
_PART_MEMORY = 1 << 30
"""Memory for trying one storage tier alone, in bytes."""
_PATIENCE = 4
"""How many deadlines of its lane a tier gets for the whole round trip, """
_PATIENCE_S = 10.0
"""and at least so many seconds."""
_BUILD_S = 30.0
"""Seconds for building one backend: it connects, or reads what an earlier process left."""
_FILL_S_PER_GIB = 1.0
"""Seconds more for each GiB of memory, which is touched page by page."""


@dataclass(slots=True)
class Row:
    """What became of one tier."""

    tier: str
    backend: str
    ok: bool
    detail: str
    """What was done, or the reason why it failed."""
    write_s: float | None = None
    read_s: float | None = None
    nbytes: int = 0
    """Raw bytes sent each way."""


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="validate a configuration, build it, and round-trip every tier",
        description="Validate a configuration, build it, and round-trip random sealed chunks through every tier. "
        "What is written is deleted again.",
    )
    parser.add_argument("file", nargs="?", type=Path, help="YAML or TOML (default: LMCACHE_CONFIG_FILE, environment)")
    add_model(parser)
    parser.add_argument(
        "--timeout",
        type=_duration,
        metavar="TIME",
        help=f"how long building one backend, and one round trip, may take, e.g. 2min (default: {_BUILD_S:.0f}s for "
        f"building, {_PATIENCE} deadlines of the tier and at least {_PATIENCE_S:.0f}s for the round trip)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def _duration(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError("must be above 0 and at most a day")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when every tier works, 1 when one does not; a wrong configuration raises `ConfigError`."""
    loaded = load(args.file)
    config = loaded.config
    layout = of_model(args.model, config.chunk_tokens) if args.model else _small(config.chunk_tokens)
    for note in loaded.notes:
        warn(f"note: {note}")
    before = _open_files()
    started = perf_counter()
    with working("building the pipeline and trying every tier"):
        rows, opened = _Check(config, layout, args.timeout).run(before)
    secrets = redact.collect(config.model_dump())
    for row in rows:
        row.detail = redact.scrub(row.detail, secrets)  # clients repeat addresses and credentials in their errors
    seconds = perf_counter() - started
    ok = all(row.ok for row in rows)
    if args.json:
        emit({
            "ok": ok,
            "source": loaded.source,
            "seconds": round(seconds, 3),
            "chunk_bytes": layout.chunk_bytes,
            "open_files": opened,
            "notes": list(loaded.notes),
            "tiers": [asdict(row) for row in rows],
        })  # fmt: skip
    else:
        print(_text(rows, layout, loaded.source, opened, seconds))
    return OK if ok else PROBLEM


def _small(chunk_tokens: int) -> KVLayout:
    """Big enough to exercise alignment and codecs, small enough for every capacity."""
    return KVLayout("lknhd", "bfloat16", 4, 2, 2, 64, chunk_tokens, chunk_tokens)


@dataclass(frozen=True, slots=True)
class _Step:
    """What a build is doing, since when and for how long it may."""

    tier: str | None
    """The tier whose backend is being built; None for everything after the backends."""
    what: str
    since: float
    limit: float


class _Watch:
    """Follows a build from backend to backend, from inside: a plugin around every `build`."""

    def __init__(self, config: PipelineConfig, limit: float) -> None:
        gib = (config.host_tiers[0].capacity or 0) / (1 << 30)
        self._limit = limit
        self._rest = limit + _FILL_S_PER_GIB * gib
        self.step = self._next(None, "preparing the tiers")
        self.built: list[MemoryBackend | StorageBackend] = []

    def _next(self, tier: str | None, what: str) -> _Step:
        return _Step(tier, what, perf_counter(), self._rest if tier is None else self._limit)

    @hookimpl(wrapper=True, tryfirst=True)
    def lmcache_build_backend(
        self, config: BackendConfig, context: BuildContext
    ) -> Generator[None, MemoryBackend | StorageBackend, MemoryBackend | StorageBackend]:
        self.step = self._next(context.tier, f"building backend `{config.type}`")
        try:
            self.built.append((yield))
            return self.built[-1]
        finally:
            self.step = self._next(None, "allocating memory and reading what is stored")


@dataclass(frozen=True, slots=True)
class _Hung:
    """A build that did not end in its time. Its thread stays behind; nothing waits for it."""

    tier: str | None
    reason: str


class _Check:
    """Tries the tiers of one configuration; nothing that hangs keeps it."""

    def __init__(self, config: PipelineConfig, layout: KVLayout, timeout: float | None) -> None:
        self._config = config
        self._layout = layout
        self._timeout = timeout

    def run(self, before: int) -> tuple[list[Row], int]:
        """One row per tier, and how many files the whole pipeline holds open (0 when it could not be built)."""
        memory, *storage = self._config.host_tiers
        pipeline = self._build(self._config)
        if not isinstance(pipeline, Pipeline):
            return self._one_by_one(pipeline), 0
        opened = _open_files() - before
        rows = [_try_memory(memory, pipeline)]
        if self._config.device_tier is not None and pipeline.mirror is not None:
            rows.insert(0, _try_device(self._config.device_tier, pipeline.mirror, pipeline))
        rows += [self._try(tier, pipeline.tiers[i], pipeline) for i, tier in enumerate(storage)]
        self._close(pipeline)
        return rows, opened

    def _build(self, config: PipelineConfig) -> Pipeline | _Hung | Exception:
        """The pipeline, or why there is none; a plugin's own exceptions are findings here, whatever they are."""
        watch = _Watch(config, self._timeout or _BUILD_S)
        plugins = Plugins()
        plugins.register(watch, "lmcachectl-check")
        answer = _started("check-build", lambda: build(config, self._layout, plugins=plugins))
        while True:
            step = watch.step
            try:
                return answer.get(timeout=max(0.0, step.since + step.limit - perf_counter()))
            except queue.Empty:
                if watch.step is step:
                    # What was built may hold locks that the next try needs.
                    closing = [_started("check-close", backend.close) for backend in watch.built]
                    _wait(closing, step.limit)
                    return _Hung(step.tier, f"{step.what} has not ended within {format_seconds(step.limit)}")

    def _one_by_one(self, whole: _Hung | Exception) -> list[Row]:
        """The pipeline could not be built: find out whose fault it is, tier by tier."""
        config = self._config
        memory, *storage = config.host_tiers
        known = {whole.tier: whole.reason} if isinstance(whole, _Hung) else {}
        rows: list[Row] = []
        if memory.name in known:
            alone: Pipeline | _Hung | Exception = whole
        else:
            alone = self._build(config.model_copy(update={"tiers": (memory,)}))
        if not isinstance(alone, Pipeline):
            rows.append(_failed(memory, _reason(alone)))
            return rows + [_failed(tier, f"not tried: tier `{memory.name}` failed") for tier in storage]
        rows.append(_try_memory(memory, alone))
        self._close(alone)
        small = memory.model_copy(update={"capacity": min(memory.capacity or 0, _PART_MEMORY)})
        for tier in storage:
            if tier.name in known:
                rows.append(_failed(tier, known[tier.name]))
                continue
            pipeline = self._build(config.model_copy(update={"tiers": (small, tier)}))
            if not isinstance(pipeline, Pipeline):
                rows.append(_failed(tier, _reason(pipeline)))
                continue
            rows.append(self._try(tier, pipeline.tiers[0], pipeline))
            self._close(pipeline)
        if all(row.ok for row in rows):
            # Every tier works alone; together they do not fit, or it is the GPU tier, which is nothing alone.
            if config.device_tier is not None:
                return [_failed(config.device_tier, _reason(whole)), *rows]
            rows[0] = _failed(memory, _reason(whole))
        return rows

    def _try(self, tier: TierConfig, storage: StorageTier, pipeline: Pipeline) -> Row:
        limit = self._timeout or max(_PATIENCE_S, _PATIENCE * tier.lane.deadline)
        answer = _started(f"check-{tier.name}", lambda: _round_trip(tier, storage, pipeline))
        try:
            row = answer.get(timeout=limit)
        except queue.Empty:
            return _failed(tier, f"no answer within {format_seconds(limit)}: the medium hangs")
        return row if isinstance(row, Row) else _failed(tier, _reason(row))

    def _close(self, pipeline: Pipeline) -> None:
        """Close the pipeline, but never wait for a medium that hangs."""
        limit = self._timeout or _BUILD_S
        answer = _started("check-close", lambda: pipeline.close(min(_PATIENCE_S, limit)))
        try:
            error = answer.get(timeout=2 * limit)
        except queue.Empty:
            warn(f"closing the pipeline has not ended within {format_seconds(2 * limit)}")
        else:
            if error is not None:
                warn(f"closing the pipeline failed: {type(error).__name__}")


def _started(name: str, work: Callable[[], T]) -> queue.SimpleQueue[T | Exception]:
    """Run `work` on a thread that nobody has to wait for; the queue gets its result, or what it raised."""
    answer: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            answer.put(work())
        except Exception as error:
            answer.put(error)

    threading.Thread(target=attempt, name=name, daemon=True).start()
    return answer


def _try_memory(tier: TierConfig, pipeline: Pipeline) -> Row:
    data = _random(pipeline)
    keys = _keys(len(data))
    with pipeline.reserve(keys) as room:
        start = perf_counter()
        for i, chunk in enumerate(data):
            room.view(i)[:] = chunk
        middle = perf_counter()
        same = all(bytes(room.view(i)) == chunk for i, chunk in enumerate(data))
        end = perf_counter()
    if not same:
        return _failed(tier, "bytes read back differ from the bytes written")
    detail = f"{pipeline.slots.count} slots of {format_bytes(pipeline.slots.slot_bytes)}"
    return Row(tier.name, tier.backend.type, True, detail, middle - start, end - middle, sum(map(len, data)))


def _try_device(tier: TierConfig, mirror: Mirror, pipeline: Pipeline) -> Row:
    data = [np.frombuffer(chunk, np.uint8) for chunk in _random(pipeline)]
    back = [np.zeros_like(chunk) for chunk in data]
    lengths = np.array([chunk.size for chunk in data])
    theirs, ours = (np.array([array.ctypes.data for array in side]) for side in (data, back))
    stream, done = Stream(mirror.device), Event(mirror.device)
    with pipeline.reserve(_keys(len(data))) as room:
        at = room.on_device(stream.handle)
        ends = [perf_counter()]
        for to, source in ((at, theirs), (ours, at)):
            copy_batch(to, source, lengths, stream.handle, mirror.device)
            done.record(stream.handle)
            done.synchronize()
            ends.append(perf_counter())
    done.close()
    stream.close()
    if not all(map(np.array_equal, data, back)):
        return _failed(tier, "bytes read back differ from the bytes written")
    detail = f"{mirror.count} slots of {format_bytes(mirror.place_bytes)} on GPU {mirror.device}"
    return Row(tier.name, tier.backend.type, True, detail, ends[1] - ends[0], ends[2] - ends[1], int(lengths.sum()))


def _round_trip(tier: TierConfig, storage: StorageTier, pipeline: Pipeline) -> Row:
    data = _numbers(pipeline) if tier.lossy else _random(pipeline)
    keys = _keys(len(data))
    if tier.write == "never":
        start = perf_counter()
        present = storage.backend.contains(keys)
        if any(present):
            return _failed(tier, "says that it has keys nobody ever stored")
        row = Row(tier.name, tier.backend.type, True, "read only: it was asked, nothing was written")
        row.read_s = perf_counter() - start
        return row
    with pipeline.reserve(keys) as room:
        for i, chunk in enumerate(data):
            room.view(i)[:] = chunk
        start = perf_counter()
        problem = _problem("write", storage, storage.write(keys, room.slots, storage.epoch))
        middle = perf_counter()
        try:
            if problem is None:
                for i in range(len(data)):
                    room.view(i)[:] = bytes(len(data[i]))
                problem = _problem("read", storage, storage.read(keys, room.slots))
            end = perf_counter()
            if problem is None and not (tier.lossy or all(bytes(room.view(i)) == d for i, d in enumerate(data))):
                problem = "bytes read back differ from the bytes written"
        finally:
            storage.forget(keys)
        if problem is None and any(storage.backend.contains(keys)):
            problem = "deleted objects are still there"
    if problem is not None:
        return _failed(tier, problem)
    codec = f", codec {storage.codec}" if tier.serde else ""
    chosen = "".join(
        f", {name}: {value}" for name, value in storage.stats()["medium"].items() if isinstance(value, str)
    )
    detail = f"{len(data)} chunks written, read, verified, deleted{codec}{chosen}"
    return Row(tier.name, tier.backend.type, True, detail, middle - start, end - middle, sum(map(len, data)))


def _problem(operation: str, storage: StorageTier, outcomes: Sequence[object]) -> str | None:
    bad = [str(outcome) for outcome in outcomes if outcome is not None]
    if not bad:
        return None
    detail = f": {storage.last_error}" if storage.last_error else ""
    return f"{operation} failed for {len(bad)} of {len(outcomes)} chunks ({', '.join(sorted(set(bad)))}){detail}"


def _random(pipeline: Pipeline) -> list[bytes]:
    generator = np.random.default_rng()
    return [generator.bytes(pipeline.layout.chunk_bytes) for _ in range(min(_CHUNKS, pipeline.slots.count))]


def _numbers(pipeline: Pipeline) -> list[bytes]:
    """What a lossy serde is made for: random bytes are rarely numbers."""
    context = SerdeContext(layout=pipeline.layout, chunk_bytes=pipeline.layout.chunk_bytes)
    return [kv_like(context, seed) for seed in range(min(_CHUNKS, pipeline.slots.count))]


def _keys(count: int) -> list[ChunkKey]:
    """Keys of no identity: they meet no real chunk."""
    return [ChunkKey(os.urandom(KEY_BYTES)) for _ in range(count)]


def _failed(tier: TierConfig, reason: str) -> Row:
    return Row(tier.name, tier.backend.type, False, reason)


def _wait(answers: Sequence[queue.SimpleQueue[Any]], limit: float) -> None:
    """Give several things `limit` seconds together to end."""
    end = perf_counter() + limit
    for answer in answers:
        try:
            answer.get(timeout=max(0.0, end - perf_counter()))
        except queue.Empty:
            return


def _reason(error: _Hung | Exception) -> str:
    if isinstance(error, _Hung):
        return error.reason
    if isinstance(error, ConfigError):
        return "; ".join(f"{p.what}" + (f" (fix: {p.fix})" if p.fix else "") for p in error.problems)
    return str(error) or repr(error)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _text(rows: Sequence[Row], layout: KVLayout, source: str, opened: int, seconds: float) -> str:
    rate: Callable[[Row, float | None], str] = lambda row, s: "-" if s is None else _speed(row.nbytes, s)  # noqa: E731
    cells = [["tier", "backend", "result", "write", "read", ""]]
    for row in rows:
        result = "ok" if row.ok else "FAILED"
        cells.append([row.tier, row.backend, result, rate(row, row.write_s), rate(row, row.read_s), row.detail])
    bad = sum(not row.ok for row in rows)
    verdict = "every tier works" if not bad else f"{bad} of {len(rows)} tiers failed"
    files = f", {opened} open files" if opened else ""
    return (
        f"{source}: valid\n{table(cells)}\n"
        f"{verdict} ({format_bytes(layout.chunk_bytes)} chunks{files}, {format_seconds(seconds)})"
    )


def _speed(nbytes: int, seconds: float) -> str:
    return (
        f"{format_seconds(seconds)} ({nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s)"
        if nbytes
        else format_seconds(seconds)
    )
