"""`lmcachectl plugins`: what is installed and what a configuration names. Imports none of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lmcache_core.cli.console import OK, add_json, emit, table
from lmcache_core.config import named_plugins
from lmcache_core.plugins import Installed, installed


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plugins",
        help="list installed plugins and which of them a configuration activates",
        description="List installed plugins. Installed is not active: only what a configuration names is imported. "
        "This command imports none.",
    )
    parser.add_argument("file", nargs="?", type=Path, help="YAML or TOML (default: LMCACHE_CONFIG_FILE, environment)")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    named, source = named_plugins(args.file)
    found = installed()
    present = {(plugin.group, plugin.name) for plugin in found}
    missing = sorted(named - present)
    if args.json:
        emit({
            "ok": not missing,
            "source": source,
            "plugins": [_record(plugin, (plugin.group, plugin.name) in named) for plugin in found],
            "missing": [{"group": group, "name": name} for group, name in missing],
        })  # fmt: skip
        return OK
    rows = [["group", "name", "active", "distribution", "version", "module", "location"]]
    for p in found:
        active = "yes" if (p.group, p.name) in named else "-"
        rows.append([p.group, p.name, active, p.distribution, p.version, p.target, p.file])
    print(f"active means named by the configuration ({source})")
    print(table(rows))
    for group, name in missing:
        print(f"missing: the configuration names `{name}`, which nothing installed provides in {group}")
    return OK


def _record(plugin: Installed, active: bool) -> dict[str, Any]:
    names = ("group", "name", "distribution", "version", "target", "file")
    return {**{name: getattr(plugin, name) for name in names}, "active": active}
