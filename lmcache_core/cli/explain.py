"""`lmcachectl explain FILE`: every setting with its origin, what it will take from the machine, and what fits."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretBytes, SecretStr

from lmcache_core import redact
from lmcache_core.build import beside_slots
from lmcache_core.cli.console import OK, add_json, emit, table
from lmcache_core.cli.layouts import PRESETS, add_model, flat, of_model, preset
from lmcache_core.config import Loaded, TierConfig, load, machine
from lmcache_core.config.findings import Loc, dotted
from lmcache_core.layout import KVLayout
from lmcache_core.mirror import place_bytes
from lmcache_core.plugins import Plugins
from lmcache_core.tier import ASK_THREADS
from lmcache_core.types import object_bytes, round_up
from lmcache_core.units import format_bytes

_BYTES = ("capacity", "inflight")
_SECRETS = (SecretStr, SecretBytes)


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="show every setting with its origin, the budget, and what fits",
        description="Show every setting with its origin, what the pipeline will take, and how many tokens fit. "
        "Builds nothing.",
    )
    parser.add_argument("file", nargs="?", type=Path, help="YAML or TOML (default: LMCACHE_CONFIG_FILE, environment)")
    add_model(parser)
    parser.add_argument(
        "--bytes-per-token", type=_positive, metavar="N", help="instead of a model, bytes of KV per token"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    loaded = load(args.file)
    chunk = loaded.config.chunk_tokens
    if args.bytes_per_token:
        layouts = {f"{args.bytes_per_token} B/token": flat(args.bytes_per_token, chunk)}
    elif args.model:
        layouts = {Path(args.model).name: of_model(args.model, chunk)}
    else:
        layouts = {name: preset(name, chunk) for name in PRESETS}
    plugins = Plugins()
    plugins.activate(loaded.config.plugins)
    record: dict[str, Any] = {
        "ok": True,
        "source": loaded.source,
        "notes": list(loaded.notes),
        "settings": settings(loaded),
        "budget": budget(loaded),
        "fits": [fits(loaded, name, layout, plugins) for name, layout in layouts.items()],
    }
    if args.json:
        emit(record)
    else:
        print(_text(record))
    return OK


def settings(loaded: Loaded) -> list[dict[str, Any]]:
    """Every setting: its path, its value (no secrets), where it came from."""
    found: list[dict[str, Any]] = []

    def walk(value: Any, shown: Any, loc: Loc) -> None:
        if isinstance(value, BaseModel):
            for key in type(value).model_fields:
                walk(getattr(value, key), shown[key], (*loc, key))
        elif isinstance(value, (list, tuple)) and value:
            for i, item in enumerate(value):
                walk(item, shown[i], (*loc, i))
        else:
            name = next((part for part in reversed(loc) if isinstance(part, str)), "")
            plain = redact.HIDDEN if isinstance(value, _SECRETS) else redact.hide(shown, name)
            found.append({"path": dotted(loc), "value": plain, "origin": loaded.provenance[dotted(loc)]})

    walk(loaded.config, loaded.config.model_dump(mode="json"), ())
    return found


def budget(loaded: Loaded) -> dict[str, Any]:
    """What the pipeline will take from the machine, in bytes and counts."""
    memory, *storage = loaded.config.host_tiers
    device = loaded.config.device_tier
    return {
        "device_bytes": None if device is None else device.capacity,
        "memory_bytes": memory.capacity,
        "memory_available_bytes": machine.memory_available(),
        "memory_total_bytes": machine.memory_total(),
        "threads": sum(2 * tier.threads + ASK_THREADS for tier in storage),
        "recompute_tokens_s": loaded.config.recompute.tokens_per_s,
        "recompute_factor": loaded.config.recompute.factor,
        "inflight_bytes": {tier.name: tier.lane.inflight for tier in storage},
        "open_files_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "disks": [disk for tier in storage if (disk := _disk(tier)) is not None],
    }


def _disk(tier: TierConfig) -> dict[str, Any] | None:
    directory = tier.backend.local_directory()
    if directory is None:
        return None
    disk = machine.disk(directory)
    return {
        "tier": tier.name,
        "path": str(directory),
        "capacity_bytes": tier.capacity,
        "free_bytes": disk.free,
        "total_bytes": disk.total,
    }


def fits(loaded: Loaded, name: str, layout: KVLayout, plugins: Plugins) -> dict[str, Any]:
    """How many chunks and tokens of one layout every tier holds. Encoded tiers hold at least that."""
    memory, *storage = loaded.config.host_tiers
    slot = round_up(object_bytes(layout.chunk_bytes))
    staging = beside_slots(loaded.config, layout, plugins)
    device = loaded.config.device_tier
    held: dict[str, int | None] = {}
    if device is not None:
        held[device.name] = (device.capacity or 0) // place_bytes(layout.chunk_bytes)
    held |= {memory.name: max(0, ((memory.capacity or 0) - staging) // slot)}
    held |= {tier.name: None if tier.capacity is None else tier.capacity // slot for tier in storage}
    return {
        "model": name,
        "token_bytes": layout.token_bytes,
        "chunk_bytes": layout.chunk_bytes,
        "slot_bytes": slot,
        "staging_bytes": staging,
        "bypassed_below_bytes_s": _rule(loaded, layout),
        "chunks": held,
        "tokens": {tier: None if n is None else n * layout.chunk_tokens for tier, n in held.items()},
    }


def _rule(loaded: Loaded, layout: KVLayout) -> float | None:
    """The cost rule for one layout: the slowest tier that is read from, in bytes/s; None where speeds are measured."""
    rule = loaded.config.recompute
    rate = rule.tokens_per_s
    return rate * layout.token_bytes / rule.factor if isinstance(rate, (int, float)) else None


def _text(record: dict[str, Any]) -> str:
    lines = [f"configuration: {record['source']}"]
    lines += [f"note: {note}" for note in record["notes"]]
    rows = [["setting", "value", "from"]]
    rows += [[s["path"], _show(s["path"], s["value"]), s["origin"]] for s in record["settings"]]
    lines += [table(rows), "", "takes"]
    budget = record["budget"]
    if budget["device_bytes"] is not None:
        lines.append(f"  GPU      {format_bytes(budget['device_bytes'])} of its memory at start-up")
    free, total = format_bytes(budget["memory_available_bytes"]), format_bytes(budget["memory_total_bytes"])
    lines.append(f"  memory   {format_bytes(budget['memory_bytes'])} at start-up ({free} available of {total})")
    lines += [
        f"  disk     {format_bytes(disk['capacity_bytes'])} at most for `{disk['tier']}` in {disk['path']} "
        f"({format_bytes(disk['free_bytes'])} free of {format_bytes(disk['total_bytes'])})"
        for disk in budget["disks"]
    ]
    lines.append(f"  threads  at most {budget['threads']} for storage tiers")
    lines.append(f"  files    the process may open {budget['open_files_limit']}; `lmcachectl check` counts them")
    lines.append(f"  reads    {_cost_rule(budget)}")
    lines += ["", "fits (chunks of every tier, encoded tiers at least)"]
    tiers = list(record["fits"][0]["chunks"])
    slow = ["bypassed below"] if record["fits"][0]["bypassed_below_bytes_s"] is not None else []
    rows = [["model", "per token", "per chunk", *(f"{tier}: tokens (chunks)" for tier in tiers), *slow]]
    for fit in record["fits"]:
        held = [
            "no limit" if fit["chunks"][t] is None else f"{fit['tokens'][t]:,} ({fit['chunks'][t]:,})" for t in tiers
        ]
        limit = [f"{format_bytes(round(fit['bypassed_below_bytes_s']))}/s"] if slow else []
        rows.append([fit["model"], format_bytes(fit["token_bytes"]), format_bytes(fit["chunk_bytes"]), *held, *limit])
    lines.append(table(rows))
    return "\n".join(lines)


def _cost_rule(budget: dict[str, Any]) -> str:
    rate, factor = budget["recompute_tokens_s"], budget["recompute_factor"]
    if rate is None:
        return (
            "waited for up to the lane's deadline: without `recompute.tokens_per_s` no tier is bypassed for being slow"
        )
    known = "as measured by the adapter" if rate == "measure" else f"{rate:g} tokens/s"
    return (
        f"given up, and slow tiers bypassed, where they take longer than {factor:g} x computing the tokens ({known}); "
        "the speed of each tier is measured, see `stats()`"
    )


def _show(path: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if path.rpartition(".")[2] in _BYTES:
        return format_bytes(value)
    return f"{value} s" if path.endswith("deadline") else str(value)
