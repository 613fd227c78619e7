"""`lmcachectl bench backend TYPE`, also as `plugin bench TYPE`: a backend beside its medium's own best tool."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from lmcache_core import redact
from lmcache_core.cli.bench_common import Ratio, describe_machine, work_directory
from lmcache_core.cli.console import OK, add_json, emit, table, working
from lmcache_core.cli.plugin_media import add_options, parse_options, secrets_of, started
from lmcache_core.errors import BackendError, LMCacheError
from lmcache_core.plugins import Plugins
from lmcache_core.testing.bench import Figures, measure
from lmcache_core.testing.rig import Baseline, Medium
from lmcache_core.types import HEADER_BYTES
from lmcache_core.units import format_bytes, parse_bytes

DESCRIPTION = """\
Start what a backend needs on loopback, by its rig, and measure it beside the best tool or client of its medium.

figures (medians over the rounds; objects are sealed, as a tier's are):
  put_gb_s, get_gb_s   GB/s of the backend: 4 threads with 4 objects a call
  put_vs_baseline      median over the rounds of backend / baseline; the baseline is named in `baseline`
  get_vs_baseline      likewise; both are null where the medium has nothing to compare with
  exists_1000_ms       one `contains` of 1,000 keys, half of them stored
  cpu_s_per_gb         processor seconds of this process for each GB put or got; a server's own are not in it

Every round runs backend and baseline once, in alternating order, so that a slow moment of the machine meets both; the
first does not count where there is time for more than three. The medium is cleared: --option must name a place of its
own.
"""

OBJECT_BYTES = 8 << 20
_SMALL_BYTES = 2 * HEADER_BYTES
_KEYS = 1000
_MIN_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class BackendEffort:
    """How much is measured."""

    rounds: int
    seconds: int
    """Of each direction of each side in one round."""
    working_set: int
    """Bytes on the medium at a time."""
    limit: float
    """Seconds for all rounds: one that would end later does not begin, once there are three."""


FULL = BackendEffort(rounds=9, seconds=2, working_set=1 << 30, limit=240.0)
QUICK = BackendEffort(rounds=5, seconds=1, working_set=1 << 30, limit=40.0)


def register(kinds: Any) -> None:
    """Register `bench backend`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "backend",
        help="any installed backend against the best tool of its medium",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench backend` and `plugin bench` both take."""
    parser.add_argument("type", metavar="TYPE", help="the backend's `type`, see `lmcachectl plugins`")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under a minute")
    parser.add_argument(
        "--object-bytes", type=_size, default=OBJECT_BYTES, metavar="SIZE", help="of each object (default: 8MiB)"
    )
    parser.add_argument(
        "--path", type=Path, metavar="DIR", help="where the medium's files go (default: the cache directory)"
    )
    add_options(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _size(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < _SMALL_BYTES:
        raise argparse.ArgumentTypeError(f"must be at least {format_bytes(_SMALL_BYTES)}")
    return size


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raise `LMCacheError` when something cannot be measured."""
    options = parse_options(args.option)
    effort = QUICK if args.quick else FULL
    plugins = Plugins()
    try:
        with (
            work_directory(args.path) as directory,
            started(plugins, args.type, options, directory) as medium,
            working(f"measuring backend {args.type}"),
        ):
            result = measure_backend(medium, args.object_bytes, effort)
    except BackendError as error:
        raise BackendError(redact.scrub(str(error), secrets_of(options, plugins.backend(args.type)))) from None
    result = {"ok": True, "type": args.type, **result, "options": {"quick": args.quick, **asdict(effort)}}
    if args.json:
        emit(result)
    else:
        print(render(result))
    return OK


def measure_backend(medium: Medium, object_bytes: int, effort: BackendEffort) -> dict[str, Any]:
    """All figures with what they come from, as plain data. The medium must be empty, and is empty in the end."""
    threads = 4
    start, longest = monotonic(), 0.0
    machine = describe_machine()
    seen: list[Figures] = []
    rates: dict[str, list[float]] = {}

    def ours(seconds: int) -> None:
        found = measure(
            medium.config,
            object_bytes=object_bytes,
            seconds=seconds,
            working_set=effort.working_set,
            threads=threads,
            batch=4,
        )
        seen.append(found)
        rates.setdefault("put", []).append(found.put_gb_s * 1e9)
        rates.setdefault("get", []).append(found.get_gb_s * 1e9)

    arms: list[Callable[[int], None]] = [ours]
    if medium.baseline is not None:
        arms.append(_baseline(medium.baseline, object_bytes, rates))
    for number in range(effort.rounds + 1):
        began = monotonic()
        if number >= _MIN_ROUNDS and began - start + longest > effort.limit:
            break
        for arm in arms if number % 2 else reversed(arms):
            arm(effort.seconds)
        longest = max(longest, monotonic() - began)
    if len(seen) > _MIN_ROUNDS:  # connections, first touches
        seen = seen[1:]
        rates = {name: each[1:] for name, each in rates.items()}
    # Where a round's objects are too few to tell what a question about 1,000 keys takes.
    small = measure(
        medium.config, object_bytes=_SMALL_BYTES, seconds=0.5, threads=1, batch=50, working_set=_KEYS * _SMALL_BYTES
    )
    found: dict[str, Any] = {}
    for direction in ("put", "get"):
        control = f"baseline {direction}"
        if control in rates:
            found[direction] = asdict(Ratio.of(rates, direction, [control]))
        else:
            subject = rates[direction]
            found[direction] = {
                "ratio": None,
                "subject": round(statistics.median(subject) / 1e9, 3),
                "subject_best": round(max(subject) / 1e9, 3),
            }
    return {
        "figures": {
            "put_gb_s": found["put"]["subject"],
            "get_gb_s": found["get"]["subject"],
            "put_vs_baseline": found["put"]["ratio"],
            "get_vs_baseline": found["get"]["ratio"],
            "exists_1000_ms": round(small.exists_1000_ms, 3),
            "cpu_s_per_gb": round(statistics.median(figures.cpu_s_per_gb for figures in seen), 3),
        },
        "baseline": medium.baseline.name if medium.baseline is not None else None,
        "machine": machine,
        "object_bytes": object_bytes,
        "threads": threads,
        "rounds": len(seen),
        "put": found["put"],
        "get": found["get"],
        "p99_ms": {
            "put": round(statistics.median(figures.put_p99_ms for figures in seen), 3),
            "get": round(statistics.median(figures.get_p99_ms for figures in seen), 3),
        },
        "gb_s": {name: [round(rate / 1e9, 3) for rate in each] for name, each in rates.items()},
    }


def _baseline(baseline: Baseline, object_bytes: int, rates: dict[str, list[float]]) -> Callable[[int], None]:
    """The other side of each round."""

    def arm(seconds: int) -> None:
        for direction, ask in (("put", baseline.put), ("get", baseline.get)):
            rate = ask(object_bytes, seconds)
            if not rate > 0:
                raise LMCacheError(f"baseline {baseline.name}: {direction} gave {rate} bytes per second")
            rates.setdefault(f"baseline {direction}", []).append(rate)

    return arm


def render(result: Mapping[str, Any]) -> str:
    """The result for people."""
    machine = result["machine"]
    head = (
        f"backend {result['type']}, objects of {format_bytes(result['object_bytes'])}, {result['rounds']} rounds on "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, {machine['date']}"
    )
    rows = [["", "GB/s median", "best", "baseline median", "best", "ratio", "p99 of a call, ms"]]
    for direction in ("put", "get"):
        found = result[direction]
        cells = [f"{found[name]:.3f}" if found.get(name) is not None else "-" for name in _COLUMNS]
        rows.append([direction, *cells, f"{result['p99_ms'][direction]:g}"])
    figures = result["figures"]
    small = [
        ["exists_1000_ms", f"{figures['exists_1000_ms']:g}"],
        ["cpu_s_per_gb", f"{figures['cpu_s_per_gb']:g}"],
        ["baseline", result["baseline"] or "none: this medium has nothing to compare with"],
    ]
    return "\n\n".join([head, table(rows), table(small)])


_COLUMNS = ("subject", "subject_best", "control", "control_best", "ratio")
