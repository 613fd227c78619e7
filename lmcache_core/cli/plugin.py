"""`lmcachectl plugin new | test | bench`: for people who write plugins."""

from __future__ import annotations

import argparse
from typing import Any

from lmcache_core.cli import bench_backend, plugin_new, plugin_test


def add(subparsers: Any) -> None:
    """Register the sub-commands."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plugin", help="write a plugin: start one, test it against the contract, measure it"
    )
    kinds = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    plugin_new.register(kinds)
    plugin_test.register(kinds)
    bench: argparse.ArgumentParser = kinds.add_parser(
        "bench",
        help="measure an installed backend beside the best tool of its medium",
        description=bench_backend.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench_backend.add_arguments(bench)
