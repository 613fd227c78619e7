"""`lmcachectl check FILE`: load a configuration, build it, and send random chunks through every tier and back."""

from __future__ import annotations

import argparse
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from lmcache_core.build import build
from lmcache_core.cli.console import OK, PROBLEM, add_json, emit, table, warn, working
from lmcache_core.cli.layouts import add_model, of_model
from lmcache_core.config import PipelineConfig, TierConfig, load
from lmcache_core.errors import ConfigError
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.tier import StorageTier
from lmcache_core.types import KEY_BYTES, ChunkKey
from lmcache_core.units import format_bytes, format_seconds

_CHUNKS = 4
_PART_MEMORY = 1 << 30
"""Memory for trying one storage tier alone, in bytes."""
_PATIENCE = 4
"""How many deadlines of its lane a tier gets for the whole round trip, """
_PATIENCE_S = 10.0
"""and at least so many seconds."""


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
    add_json(parser)
    parser.set_defaults(run=run)


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
        rows, opened = _check(config, layout, before)
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


def _check(config: PipelineConfig, layout: KVLayout, before: int) -> tuple[list[Row], int]:
    """One row per tier, and how many files the whole pipeline holds open (0 when it could not be built)."""
    memory, *storage = config.tiers
    try:
        pipeline = build(config, layout)
    except Exception as error:  # a plugin's own exceptions are findings here, whatever they are
        return _one_by_one(config, layout, error), 0
    try:
        opened = _open_files() - before
        rows = [_try_memory(memory, pipeline)]
        rows += [_try(tier, pipeline.tiers[i], pipeline) for i, tier in enumerate(storage)]
        return rows, opened
    finally:
        pipeline.close()


def _one_by_one(config: PipelineConfig, layout: KVLayout, whole: Exception) -> list[Row]:
    """The pipeline could not be built: find out whose fault it is, tier by tier."""
    memory, *storage = config.tiers
    rows: list[Row] = []
    try:
        pipeline = build(config.model_copy(update={"tiers": (memory,)}), layout)
    except Exception as error:
        rows.append(_failed(memory, _reason(error)))
        return rows + [_failed(tier, f"not tried: tier `{memory.name}` failed") for tier in storage]
    rows.append(_try_memory(memory, pipeline))
    pipeline.close()
    small = memory.model_copy(update={"capacity": min(memory.capacity or 0, _PART_MEMORY)})
    for tier in storage:
        try:
            pipeline = build(config.model_copy(update={"tiers": (small, tier)}), layout)
        except Exception as error:
            rows.append(_failed(tier, _reason(error)))
            continue
        rows.append(_try(tier, pipeline.tiers[0], pipeline))
        pipeline.close()
    if all(row.ok for row in rows):
        # Every tier works alone; together they do not fit.
        rows[0] = _failed(memory, _reason(whole))
    return rows


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


def _try(tier: TierConfig, storage: StorageTier, pipeline: Pipeline) -> Row:
    limit = max(_PATIENCE_S, _PATIENCE * tier.lane.deadline)
    answer: queue.SimpleQueue[Row] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            answer.put(_round_trip(tier, storage, pipeline))
        except Exception as error:
            answer.put(_failed(tier, _reason(error)))

    # A hung medium holds its thread for ever; the command reports it and goes on.
    threading.Thread(target=attempt, name=f"check-{tier.name}", daemon=True).start()
    try:
        return answer.get(timeout=limit)
    except queue.Empty:
        return _failed(tier, f"no answer within {format_seconds(limit)}: the medium hangs")


def _round_trip(tier: TierConfig, storage: StorageTier, pipeline: Pipeline) -> Row:
    data = _random(pipeline)
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
            if problem is None and not all(bytes(room.view(i)) == chunk for i, chunk in enumerate(data)):
                problem = "bytes read back differ from the bytes written"
        finally:
            storage.forget(keys)
        if problem is None and any(storage.backend.contains(keys)):
            problem = "deleted objects are still there"
    if problem is not None:
        return _failed(tier, problem)
    codec = f", codec {storage.codec}" if tier.serde else ""
    detail = f"{len(data)} chunks written, read, verified, deleted{codec}"
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


def _keys(count: int) -> list[ChunkKey]:
    """Keys of no identity: they meet no real chunk."""
    return [ChunkKey(os.urandom(KEY_BYTES)) for _ in range(count)]


def _failed(tier: TierConfig, reason: str) -> Row:
    return Row(tier.name, tier.backend.type, False, reason)


def _reason(error: Exception) -> str:
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
