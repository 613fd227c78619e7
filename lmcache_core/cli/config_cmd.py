"""`lmcachectl config`: work on configuration files. `from-lmcache` converts LMCache's settings to ours."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lmcache_core.cli.console import OK, PROBLEM, add_json, emit, table, warn
from lmcache_core.config import load
from lmcache_core.config.convert import Conversion
from lmcache_core.config.findings import Code
from lmcache_core.config.from_lmcache import convert
from lmcache_core.config.loader import CONFIG_FILE
from lmcache_core.errors import ConfigError, Problem

EPILOG = """\
exit codes:
  0  every key means here what it meant there
  1  written, but something is not the same: read the report
  2  nothing was written: the file cannot be read, or LMCache would refuse it, too
"""


def add(subparsers: Any) -> None:
    """Register the sub-commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "config", help="convert configurations", description="Work on configuration files."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    convert_parser: argparse.ArgumentParser = commands.add_parser(
        "from-lmcache",
        help="convert LMCache's YAML, environment or L2 adapters, and account for every key",
        description="Convert settings of LMCache (0.5.6) to ours, with the account of every key. The YAML goes to "
        "stdout or to OUT, the account to stderr. Secrets are not copied.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert_parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="LMCache's YAML file")
    convert_parser.add_argument(
        "--env", action="store_true", help=f"read LMCACHE_* variables, and the file {CONFIG_FILE} names"
    )
    convert_parser.add_argument(
        "--l2-adapter",
        action="append",
        default=[],
        metavar="JSON",
        help="an adapter of `lmcache server`; may be repeated",
    )
    convert_parser.add_argument("--l1-size-gb", type=_gib, metavar="GIB", help="memory of `lmcache server`")
    convert_parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="where to write; must not exist")
    add_json(convert_parser)
    convert_parser.set_defaults(run=run)


def _gib(text: str) -> float:
    value = float(text)
    if not 0 < value < 1 << 20:
        raise argparse.ArgumentTypeError("must be a number of GiB")
    return value


def run(args: argparse.Namespace) -> int:
    """Convert, check that the result loads, write it, and report."""
    file = args.file
    if args.env and file is None and os.environ.get(CONFIG_FILE):
        file = Path(os.environ[CONFIG_FILE])
    if file is None and not args.env and not args.l2_adapter:
        raise ConfigError([Problem("command line", "", "nothing to convert", fix="give FILE, --env or --l2-adapter")])
    made = convert(file, dict(os.environ) if args.env else None, args.l2_adapter, args.l1_size_gb)
    machine = _load(made)
    if args.output is not None:
        _write(args.output, made.text)
    if args.json:
        emit({
            "ok": made.lossless,
            "output": str(args.output) if args.output else None,
            "text": made.text,
            "config": made.data,
            "changes": [asdict(change) for change in made.changes],
            "counts": dict(Counter(change.kind.value for change in made.changes)),
            "machine": [str(problem.what) for problem in machine],
        })  # fmt: skip
    else:
        if args.output is None:
            print(made.text, end="")
        warn(_report(made, machine))
    return OK if made.lossless else PROBLEM


def _load(made: Conversion) -> list[Problem]:
    """What this machine has against the result; raise `ConfigError` when something else is wrong with it."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "converted.yaml"
        file.write_text(made.text, encoding="utf-8")
        try:
            load(file, env={})
        except ConfigError as error:
            found = [replace(p, where=p.where.removeprefix(f"{directory}/")) for p in error.problems]
            if any(problem.code != Code.MACHINE for problem in found):
                raise ConfigError(found) from error
            return found
    return []


def _write(path: Path, text: str) -> None:
    """Write a new file that only its owner may read: host names are nobody else's business."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        there = isinstance(error, FileExistsError)
        fix = "choose another name, or remove it first" if there else "choose another place"
        what = f"cannot write it: {(error.strerror or str(error)).lower()}"
        raise ConfigError([Problem(str(path), "", what, fix=fix, code=Code.READ)]) from error
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)  # half of it would be believed
        what = f"cannot write it: {(error.strerror or str(error)).lower()}"
        raise ConfigError([Problem(str(path), "", what, fix="choose another place", code=Code.READ)]) from error


def _report(made: Conversion, machine: list[Problem]) -> str:
    rows = [["key", "from", "", "becomes", ""]]
    rows += [[c.key, c.where, c.kind.value, c.to or "-", c.reason] for c in made.changes]
    lines = [table(rows)] if made.changes else ["  nothing was set: LMCache's defaults"]
    lines += [f"note: on this machine it would not start: {p.path}: {p.what}" for p in machine]
    counts = Counter(change.kind.value for change in made.changes)
    verdict = "every key means what it meant" if made.lossless else "not everything is the same"
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "no keys"
    return "\n".join([*lines, f"{verdict} ({listed})"])
