"""From LMCache's settings (0.5.6: YAML, `LMCACHE_*` variables, L2 adapter JSON) to ours, with an account of every key.

Loading a classic file (`classic.py`) and converting one follow the same table of keys. Converting is for moving: what
has no counterpart is named with the reason, what means something else is said, secrets are not copied.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lmcache_core import redact
from lmcache_core.config import classic
from lmcache_core.config.draft import OVERLAY
from lmcache_core.config.findings import Code, shorten
from lmcache_core.errors import ConfigError, Problem
from lmcache_core.plugins import EVICTIONS, SERDES, Plugins

T = TypeVar("T")

_PLAIN = re.compile(r"(?![0-9.]+$)(?![0-9]+e[0-9]+$)[A-Za-z0-9/][A-Za-z0-9_./-]*%?", re.ASCII | re.IGNORECASE)
"""Text that needs no quotes in YAML."""
ASSUMED_CAPACITY = "10%"
"""For a directory that had no limit."""
ALIASES = {
    "enable_xpyd": "enable_pd",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "nixl_role": "pd_role",
    "controller_url": "controller_pull_url",
    "lmcache_worker_port": "lmcache_worker_ports",
    "plugin_locations": "runtime_plugin_locations",
    "external_backends": "storage_plugins",
}
"""Old names that LMCache still reads."""
_DEFAULTS: dict[str, Any] = {
    "local_disk_path_sharding": "by_gpu",
    "pre_caching_hash_algorithm": "builtin",
    "blend_min_tokens": 256,
    "blend_special_str": " # # ",
    "mp_port": 5555,
    "lmcache_worker_heartbeat_delay_time": 10,
    "pd_allocation_timeout_sec": float("inf"),
    "pd_shutdown_timeout_sec": 5.0,
    "pd_condition_poll_interval_sec": 0.005,
    "pd_backend_mode": "async",
    "gds_path_sharding": "by_gpu",
    "maru_pool_size": 4.0,
    "use_gds": True,
    "gds_backend": "cufile",
    "internal_api_server_host": "127.0.0.1",
    "internal_api_server_port_start": 6999,
    "blocking_timeout_secs": 10,
    "py_enable_gc": True,
    "lookup_timeout_ms": 3000,
    "lazy_memory_initial_ratio": 0.2,
    "lazy_memory_expand_trigger_ratio": 0.5,
    "lazy_memory_step_ratio": 0.1,
    "chunk_statistics_strategy": "memory_bloom_filter",
    "pin_timeout_sec": 300,
    "pin_check_interval_sec": 30,
    "max_hidden_state_cpu_size": 2.0,
    "hidden_states_retrieve_mode": "prefix_strict",
}
"""LMCache's defaults, where they are not null, false or zero: setting one changes nothing there."""
_OURS_ALREADY = {"save_decode_cache": True, "save_unfull_chunk": False, "enable_async_loading": True}
"""Values that ask for what is always done here."""


class Kind(enum.StrEnum):
    """What became of a key."""

    KEPT = "kept"
    IDLE = "idle"
    """Not taken over, and nothing is lost: it was LMCache's default, or is what is always done here."""
    CHANGED = "changed"
    """Taken over with another meaning."""
    ASSUMED = "assumed"
    """Something had to be chosen that LMCache does not say."""
    SECRET = "secret"
    """Not copied: to be handed over by the environment."""
    DROPPED = "dropped"
    UNKNOWN = "unknown"
    """No key of LMCache's either."""


HARMLESS = frozenset({Kind.KEPT, Kind.IDLE})


@dataclass(frozen=True, slots=True)
class Given:
    """A setting of LMCache's: its value, and where it stands."""

    value: Any
    where: str


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one key."""

    key: str
    where: str
    kind: Kind
    to: str = ""
    """Our setting."""
    reason: str = ""


@dataclass(slots=True)
class Tier:
    """One tier on its way: our settings, and the key each came from."""

    settings: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Conversion:
    """The result: settings as `load` takes them, the same as text, and the account."""

    data: dict[str, Any]
    text: str
    changes: list[Change]

    @property
    def lossless(self) -> bool:
        """Whether every key means here what it meant there."""
        return all(change.kind in HARMLESS for change in self.changes)


class Converter:
    """Collects tiers and changes; the parts of `convert` add to it."""

    def __init__(self, given: Mapping[str, Given], plugins: Plugins) -> None:
        self.given = dict(given)
        self.plugins = plugins
        self.extra: dict[str, Given] = {}
        self.changes: list[Change] = []
        self.problems: list[Problem] = []
        self.tiers: list[Tier] = []
        self.top: dict[str, Any] = {}
        self.comments: dict[str, str] = {}
        self.names: dict[str, str] = {}
        """Keys that were given by an old name."""
        self.done: set[str] = set()
        """Keys accounted for."""

    # -- reporting -------------------------------------------------------------------------------------------
    def report(self, key: str, kind: Kind, to: str = "", reason: str = "", where: str = "") -> None:
        """Account for a key, once."""
        given = self.given.get(key) or self.extra.get(key.removeprefix("extra_config."))
        place = where or (given.where if given else "")
        self.done.add(key)
        self.changes.append(Change(self.names.get(key, key), place, kind, to, redact.hide_urls(reason)))

    def wrong(self, key: str, what: str, fix: str, given: Given | None = None) -> None:
        """A value that LMCache would not take either."""
        given = given or self.given[key]
        hidden = redact.telling(key) or "url" in key or key == "extra_config"
        value = redact.HIDDEN if hidden else shorten(given.value)
        why = "the tier would not be what the key asks for"
        self.problems.append(Problem(given.where, key, what, why, fix, value=value, code=Code.CLASSIC))

    def secret(self, key: str, tier: Tier, setting: str, given: Given, variable: str = "") -> None:
        """Leave a secret where it is."""
        name = variable or f"{OVERLAY}TIERS__{tier.settings['name'].upper()}__BACKEND__{setting.upper()}"
        to = f"tiers.{tier.settings['name']}.backend.{setting}"
        self.report(key, Kind.SECRET, to, f"not copied; hand it over as environment variable {name}", given.where)

    # -- building --------------------------------------------------------------------------------------------
    def tier(self, name: str, backend: dict[str, Any]) -> Tier:
        """A new tier, with a name of its own."""
        names = {tier.settings["name"] for tier in self.tiers}
        unique = next(n for n in (name, *(f"{name}{i}" for i in range(2, 99))) if n not in names)
        made = Tier({"name": unique, "backend": backend})
        self.tiers.append(made)
        return made

    def put(
        self,
        tier: Tier,
        setting: str,
        value: Any,
        key: str,
        kind: Kind = Kind.KEPT,
        reason: str = "",
        where: str = "",
    ) -> None:
        """Set what a key says, and account for it."""
        node = tier.settings
        *path, last = setting.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
        tier.comments[setting] = key
        self.report(key, kind, f"tiers.{tier.settings['name']}.{setting}", reason, where)

    def has(self, group: str, name: str) -> bool:
        """Whether such a plugin is installed."""
        return name in self.plugins.names(group)

    def value(self, key: str, parse: Callable[[Any], T], what: str, fix: str) -> T | None:
        """The value of a key, None when it is absent or wrong."""
        given = self.given.get(key)
        if given is None or given.value is None:
            return None
        try:
            return parse(given.value)
        except (ValueError, TypeError, OverflowError):
            self.wrong(key, what, fix)
            return None

    def gib(self, key: str) -> int | None:
        """A number of GiB in bytes."""
        return self.value(key, classic.parse_gib, "must be a size in GiB", "write e.g. `5.0`")

    def serde(self, tier: Tier, key: str, kind: str, source: str) -> None:
        """What encodes a tier's chunks."""
        if kind in ("naive", "none", "null", "", "raw"):
            self.report(key, Kind.KEPT, reason="chunks are stored as they are", where=source)
        elif self.has(SERDES, kind):
            self.put(tier, "serde", {"type": kind}, key)
        else:
            self.report(key, Kind.DROPPED, "", f"no serde `{kind}` is installed: chunks are stored as they are", source)

    def eviction(self, tiers: Sequence[Tier], key: str, kind: str, source: str) -> None:
        """Which chunk goes first."""
        if kind == "lru":
            self.report(key, Kind.KEPT, "eviction", "the default", source)
        elif self.has(EVICTIONS, kind):
            for tier in tiers:
                tier.settings["eviction"] = {"type": kind}
                tier.comments["eviction"] = key
            self.report(key, Kind.KEPT, "eviction", where=source)
        else:
            self.report(key, Kind.DROPPED, "", f"no eviction policy `{kind}` is installed: `lru` is used", source)


def truth(value: Any) -> bool:
    """A truth value as LMCache reads it: of what is no word for one, whether it is anything at all."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "off", "null", "none")):
        return False
    try:
        return classic.parse_bool(value)
    except ValueError:
        return bool(value)


def gib_of(value: Any) -> int:
    """Bytes of an adapter's number of GiB. Raise `ValueError`."""
    try:
        return classic.parse_gib(value or 0)
    except (TypeError, OverflowError) as error:
        raise ValueError("not a size") from error


def idle(key: str, value: Any) -> str:
    """Why leaving a key out loses nothing; empty when something may be lost."""
    plain = _plain(value)
    ours = _OURS_ALREADY.get(key)
    if ours is not None and plain == ours:
        return "is what is always done here"
    if plain in (None, False, "", [], {}) or plain == _DEFAULTS.get(key, 0):
        return "is LMCache's default, or turns something off"
    return ""


def _plain(value: Any) -> Any:
    """A value of the environment as a file would have it."""
    if not isinstance(value, str):
        return value
    words: dict[str, Any] = {"true": True, "false": False, "null": None, "none": None}
    if value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        return float(value)
    except ValueError:
        return value


def finish(converter: Converter, source: str) -> Conversion:
    """Put the parts together. Raise `ConfigError` when a value was wrong."""
    if converter.problems:
        raise ConfigError(converter.problems)
    data: dict[str, Any] = {**converter.top, "tiers": [tier.settings for tier in converter.tiers]}
    lines = [f"# From {source}, by `lmcachectl config from-lmcache`. Check it with `lmcachectl check`."]
    lines += [_line(0, key, value, converter.comments.get(key, "")) for key, value in converter.top.items()]
    lines.append("tiers:")
    for tier in converter.tiers:
        block = list(_block(tier.settings, 4, "", tier.comments))
        lines += [f"  - {block[0].lstrip()}", *block[1:]]
    lost = [change for change in converter.changes if change.kind not in HARMLESS]
    if lost:
        lines += ["", "# Not the same as before:"]
        lines += [" ".join(f"#   {change.key} ({change.kind}): {change.reason}".split()) for change in lost]
    return Conversion(data, "\n".join(lines) + "\n", converter.changes)


def _block(settings: Mapping[str, Any], indent: int, path: str, comments: Mapping[str, str]) -> list[str]:
    lines = []
    for key, value in settings.items():
        here = f"{path}{key}"
        if isinstance(value, Mapping) and value:
            lines.append(_line(indent, key, None, comments.get(here, "")))
            lines += _block(value, indent + 2, f"{here}.", comments)
        else:
            lines.append(_line(indent, key, value, comments.get(here, "")))
    return lines


def _line(indent: int, key: str, value: Any, comment: str) -> str:
    text = f"{' ' * indent}{key}:" + ("" if value is None else f" {_scalar(value)}")
    return f"{text}  # {' '.join(comment.split())}" if comment else text


def _scalar(value: Any) -> str:
    """A value as YAML's flow style writes it; JSON is a part of that."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in ("true", "false", "null"):
        return value
    return json.dumps(value, ensure_ascii=False)


def size(nbytes: int) -> str | int:
    """Bytes in the largest unit that is exact."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes and nbytes % scale == 0:
            return f"{nbytes // scale}{unit}"
    return nbytes
