"""`lmcachectl bench`: what the tiers reach on this machine, as ratios to controls of the same run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lmcache_core.cli import (
    bench_backend,
    bench_codec,
    bench_common,
    bench_disk,
    bench_serving,
    bench_tiers,
    codec_quality,
)
from lmcache_core.cli.bench_common import CHUNK_TOKENS, Effort, Ratio, work_directory
from lmcache_core.cli.bench_disk import DiskResult
from lmcache_core.cli.console import OK, add_json, emit, table
from lmcache_core.cli.layouts import flat, preset
from lmcache_core.errors import LMCacheError
from lmcache_core.layout import KVLayout
from lmcache_core.units import format_bytes

TARGETS: dict[str, tuple[str, float]] = {
    "cpu_put_vs_memcpy": (">=", 0.95),
    "cpu_get_vs_memcpy": (">=", 0.95),
    "cold_put_vs_memcpy": (">=", 0.5),
    "disk_put_vs_fio": (">=", 0.9),
    "disk_get_vs_fio": (">=", 0.9),
    "lookup_1000_ms": ("<=", 0.3),
    "keys_mtok_s": (">=", 100.0),
    "control_us_per_key": ("<=", 2.0),
}
"""The figures and what this project holds itself to."""

MODELS = ("llama-3.1-8b", "smollm2-135m")
"""Presets whose chunks are measured: 32 MiB and 5.6 MiB."""

_TIERS = """\
Measure the memory tier, the disk tier and the control plane of this machine, each beside a control of the same run.

figures (the worst over the chunk sizes where there are several):
  cpu_put_vs_memcpy    reserve + copy + commit into a full memory tier (each put evicts), as a share of the best
                       memcpy of the same bytes with as many threads
  cpu_get_vs_memcpy    fetch + copy out + release, likewise
  cold_put_vs_memcpy   the first put into every slot of a pool that was just built, likewise
  disk_put_vs_fio      commit until everything is sealed, written (no fsync) and journalled, as a share of fio's best
                       of psync, io_uring and libaio, iodepth 1 and 4, 1 and 2 jobs, blocks of one chunk, direct
                       I/O, warmed buffers in huge pages, same directory; without fio, of plain pread and pwrite
  disk_get_vs_fio      fetch until every chunk is in memory and verified, likewise
  lookup_1000_ms       lookup of 1,000 chunks that are in memory
  keys_mtok_s          token ids (an int32 array of 128k) to keys, million tokens per second
  control_us_per_key   reserve + commit + lookup + fetch + release of 128 keys in a full memory tier, no data copied

method:
  Every round runs each side once, in rotating order; a ratio is the median over the rounds of subject / control, a
  time the median. Of several controls the fastest (by median) counts. Sources, destinations and pools are each twice
  the last-level cache, so nothing is found in it. GB are 10^9 bytes of payload; headers are not counted.
"""


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="measure tiers against controls of the same run"
    )
    kinds = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    tiers: argparse.ArgumentParser = kinds.add_parser(
        "tiers",
        help="memory tier against memcpy, disk tier against fio, control plane",
        description=_TIERS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiers.add_argument("--quick", action="store_true", help="fewer rounds, one chunk size on disk: under a minute")
    tiers.add_argument(
        "--path", type=Path, metavar="DIR", help="where to measure the disk (default: the cache directory)"
    )
    tiers.add_argument("--chunk-bytes", type=int, metavar="N", help=f"one chunk size instead of {' and '.join(MODELS)}")
    add_json(tiers)
    tiers.set_defaults(run=run_tiers)
    bench_backend.register(kinds)
    bench_codec.register(kinds)
    codec_quality.register(kinds)
    bench_serving.register(kinds)


def run_tiers(args: argparse.Namespace) -> int:
    """Measure and print. Raise `LMCacheError` when something cannot be measured."""
    layouts = _layouts(args.chunk_bytes)
    effort = bench_common.effort(args.quick)
    on_disk = dict(list(layouts.items())[:1]) if args.quick else layouts
    with work_directory(args.path) as directory:
        result = measure_tiers(layouts, on_disk, directory, effort)
    result["options"] = {"quick": args.quick, "path": str(args.path) if args.path else None, **asdict(effort)}
    if args.json:
        emit(result)
    else:
        print(render(result))
    return OK


def _layouts(chunk_bytes: int | None) -> dict[str, KVLayout]:
    if chunk_bytes is None:
        return {name: preset(name, CHUNK_TOKENS) for name in MODELS}
    if chunk_bytes < CHUNK_TOKENS or chunk_bytes % CHUNK_TOKENS:
        raise LMCacheError(f"--chunk-bytes {chunk_bytes}: must be a positive multiple of {CHUNK_TOKENS}, its tokens")
    return {format_bytes(chunk_bytes): flat(chunk_bytes // CHUNK_TOKENS, CHUNK_TOKENS)}


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; each call of the yielded function begins the next of `total` steps."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def step(text: str) -> None:
            nonlocal begun
            progress.update(task, description=text, completed=begun)
            begun += 1

        yield step


def measure_tiers(
    layouts: Mapping[str, KVLayout], on_disk: Mapping[str, KVLayout], directory: Path, effort: Effort
) -> dict[str, Any]:
    """All figures with what they come from, as plain data: chunks of `layouts` in memory, of `on_disk` in `directory`.

    The directory must be empty and the caller's own; files stay in it.
    """
    machine = bench_common.describe_machine()
    copies: dict[str, dict[str, Ratio]] = {}
    disks: dict[str, DiskResult] = {}
    with _steps(len(layouts) + len(on_disk) + 4) as step:
        step("keys")
        keys = bench_tiers.measure_keys(effort)
        step("control plane")
        control = bench_tiers.measure_control(effort)
        step("lookups")
        lookup = bench_tiers.measure_lookup(effort)
        step("lookups on disk")
        lookup["disk"] = bench_disk.measure_disk_lookup(directory, effort)
        for name, layout in layouts.items():
            step(f"memory, {format_bytes(layout.chunk_bytes)} chunks")
            copies[name] = bench_tiers.measure_copies(layout, effort)
        for name, layout in on_disk.items():
            step(f"disk, {format_bytes(layout.chunk_bytes)} chunks")
            disks[name] = bench_disk.measure_disk(layout, directory, effort)
    return {
        "figures": {
            "cpu_put_vs_memcpy": min(found["put"].ratio for found in copies.values()),
            "cpu_get_vs_memcpy": min(found["get"].ratio for found in copies.values()),
            "cold_put_vs_memcpy": min(found["cold"].ratio for found in copies.values()),
            "disk_put_vs_fio": min(found.put.ratio for found in disks.values()),
            "disk_get_vs_fio": min(found.get.ratio for found in disks.values()),
            "lookup_1000_ms": lookup["memory"],
            "keys_mtok_s": keys["int32"],
            "control_us_per_key": control["evicting"]["total"],
        },
        "targets": {name: f"{sign} {value:g}" for name, (sign, value) in TARGETS.items()},
        "baseline": {"memory": "memcpy", "disk": next(iter(disks.values())).baseline},
        "machine": machine,
        "chunk_bytes": {name: layout.chunk_bytes for name, layout in layouts.items()},
        "memory": {name: {kind: asdict(ratio) for kind, ratio in found.items()} for name, found in copies.items()},
        "disk": {name: asdict(found) for name, found in disks.items()},
        "lookup_ms": lookup,
        "keys_mtok_s": keys,
        "control_us_per_key": control,
    }


def met(name: str, value: float) -> bool:
    """Whether a figure reaches its target."""
    sign, target = TARGETS[name]
    return value >= target if sign == ">=" else value <= target


def render(result: Mapping[str, Any]) -> str:
    """The result for people."""
    machine = result["machine"]
    head = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, {machine['date']}"
    figures = [["figure", "value", "target", ""]]
    for name, value in result["figures"].items():
        figures.append([name, f"{value:g}", result["targets"][name], "ok" if met(name, value) else "NOT MET"])
    rates = [["", "ratio", "GB/s", "control", ""]]
    for name, found in result["memory"].items():
        rates += [_row(f"memory {kind}, {name}", ratio) for kind, ratio in found.items()]
    for name, found in result["disk"].items():
        rates += [_row(f"disk {kind}, {name}", found[kind]) for kind in ("put", "get")]
    control = "  ".join(f"{mode} {times['total']:g}" for mode, times in result["control_us_per_key"].items())
    small = [
        ["lookup of 1,000 chunks, ms", _pairs(result["lookup_ms"])],
        ["keys, million tokens/s", _pairs(result["keys_mtok_s"])],
        ["control plane, us per key", control],
        ["baseline on disk", result["baseline"]["disk"]],
    ]
    return "\n\n".join([head, table(figures), table(rates), table(small)])


def _row(name: str, ratio: Mapping[str, Any]) -> list[str]:
    return [name, f"{ratio['ratio']:g}", f"{ratio['subject']:.2f}", f"{ratio['control']:.2f}", ratio["control_name"]]


def _pairs(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:g}" for name, value in values.items())
