"""What the commands share: exit codes, JSON, tables, progress."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

OK = 0
PROBLEM = 1
"""Something does not work."""
USAGE = 2
"""The configuration, a plugin or the command line is wrong."""


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option every command has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def emit(record: Mapping[str, Any]) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(record, separators=(",", ":"), default=str))


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Left-aligned columns, two spaces apart; the first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join((indent + line).rstrip() for line in lines)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show on stderr that `text` is under way, when someone is looking."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def warn(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr)
