"""The classic flat keys (`chunk_size`, `local_cpu`, `remote_url`, ...) of another cache's files, translated to tiers.

A file with at least one classic key and none of ours at its top is classic; so is an environment with classic
`LMCACHE_<KEY>` variables when no file is given. Variables win over the file. What has no meaning here is
reported, never silently dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lmcache_core.config.draft import OVERLAY, Draft, Origin
from lmcache_core.config.findings import Code, shorten
from lmcache_core.errors import Problem
from lmcache_core.redact import HIDDEN, telling
from lmcache_core.spelling import closest
from lmcache_core.units import parse_bytes

T = TypeVar("T")

OURS = frozenset({"chunk_tokens", "verify", "recompute", "tenancy", "plugins", "tiers"})
TRANSLATED = (
    "chunk_size",
    "local_cpu",
    "max_local_cpu_size",
    "local_disk",
    "max_local_disk_size",
    "gds_path",
    "remote_url",
    "remote_serde",
    "cache_policy",
)
_WHOLE = "only whole chunks are stored"
_ALWAYS = "every whole chunk is stored as soon as it is known"
_DIGEST = "keys are always SHA-256 chains, equal in every process"
_BOUNDED = "waits are bounded by each tier's lane: `deadline`"
_NOT_HERE = "not available in this version"
_PLUGIN = "backends are plugins found by name, see docs/configuration.md"
DROPPED: dict[str, str] = {
    "save_unfull_chunk": _WHOLE,
    "save_decode_cache": _ALWAYS,
    "pre_caching_hash_algorithm": _DIGEST,
    "pin_timeout_sec": "pins belong to requests and are released with them",
    "pin_check_interval_sec": "pins belong to requests and are released with them",
    "blocking_timeout_secs": _BOUNDED,
    "lookup_timeout_ms": _BOUNDED,
    "min_retrieve_tokens": "every present chunk is used",
    "use_layerwise": "whole chunks are moved",
    "enable_async_loading": "loading is always asynchronous",
    "store_location": "write modes of the tiers decide (`write: never` makes a tier read only)",
    "retrieve_locations": "tiers are asked in the order of the list",
    "numa_mode": _NOT_HERE,
    "lmcache_instance_id": "instances need no name here",
    "py_enable_gc": "the garbage collector is left alone",
    "error_handling": "errors of tiers never reach the engine",
    "save_only_first_rank": _NOT_HERE,
    "reserve_local_cpu_size": "the memory tier never takes more than its capacity",
    "local_disk_path_sharding": "write one tier for each directory",
    "use_gpu_connector_v3": "the engine adapter decides how pages are copied",
    "hit_miss_ratio": "it is a testing aid",
    "cufile_buffer_size": "the `gds` backend reads straight into memory slots",
    "audit_actual_remote_url": "wrap backends with a plugin from `plugins:`",
    "distributed_url": _NOT_HERE,
    "transfer_channel": _NOT_HERE,
    "weka_path": "write a tier with backend `gds` and this path",
    "extra_config": "it belonged to other backends",
    "storage_plugins": _PLUGIN,
    "remote_storage_plugins": _PLUGIN,
    "plugin_locations": "no script is ever started by a configuration",
    "runtime_plugin_locations": "no script is ever started by a configuration",
    "enable_blending": _NOT_HERE,
    "enable_p2p": _NOT_HERE,
    "enable_controller": _NOT_HERE,
    "enable_pd": _NOT_HERE,
    "enable_nixl": _NOT_HERE,
    "enable_nixl_storage": _NOT_HERE,
    "enable_kv_events": _NOT_HERE,
    "track_usage": "there is no telemetry",
    "local_cpu_use_hugepages": "huge pages are asked for wherever the kernel gives them",
    "mp_host": "there is no cache server to connect to: the pipeline lives beside the engine",
    "mp_port": "there is no cache server to connect to: the pipeline lives beside the engine",
    "gds_path_sharding": "write one tier for each directory",
    "gds_buffer_size": "the `gds` backend reads straight into memory slots",
    "use_gds": "write `mover: cufile` in the `gds` backend",
    "gds_backend": "the `gds` backend chooses by `mover:`",
    "maru_path": _NOT_HERE,
    "maru_pool_size": _NOT_HERE,
    "priority_limit": "every chunk is stored",
    "enable_scheduler_bypass_lookup": "lookups always run beside the engine's scheduler",
    "script_allowed_imports": "no script is ever run",
    "run_script_api_enabled": "no script is ever run",
    "remote_config_url": "a configuration is one file and the environment, never fetched",
    "app_id": "a configuration is one file and the environment, never fetched",
    "enable_hidden_state_cache": _NOT_HERE,
    "max_hidden_state_cpu_size": _NOT_HERE,
    "hidden_state_layers": _NOT_HERE,
    "hidden_states_retrieve_mode": _NOT_HERE,
    "enable_chunk_statistics": "the pipeline always counts",
    "enable_xpyd": _NOT_HERE,
    "external_backends": _PLUGIN,
    "ec": "there is no cache of encoder outputs",
}
_FAMILIES: dict[str, str] = {
    "blend_": _NOT_HERE,
    "p2p_": _NOT_HERE,
    "pd_": _NOT_HERE,
    "nixl_": _NOT_HERE,
    "controller_": _NOT_HERE,
    "lmcache_worker_": _NOT_HERE,
    "internal_api_server_": "there is no HTTP server in the engine's process",
    "external_lookup_": _NOT_HERE,
    "lookup_server_": _NOT_HERE,
    "lazy_": "memory is allocated once, at start-up",
    "enable_lazy_": "memory is allocated once, at start-up",
    "mooncake_": "settings of the `mooncake` backend are written in its tier",
    "chunk_statistics_": "the pipeline always counts",
    "ec_": "there is no cache of encoder outputs",
    "s3_": "settings of the `s3` backend are written in its tier",
}
_SCHEMES = {"redis": "redis", "rediss": "redis", "valkey": "redis", "resp": "redis", "unix": "redis"}
_CONVERTED = frozenset({"fs", "file", "redis-sentinel", "redis-cluster", "mooncakestore"})
"""What takes more than the URL to say."""
_OWN_VARIABLES = frozenset({"LMCACHE_CONFIG_FILE", "LMCACHE_NATIVE"})
_DEFAULT_CPU_GIB = 5.0
_GIB = 1 << 30


def dropped(key: str) -> str | None:
    """Why a classic key has no meaning here; None when it is no such key."""
    family = next((reason for prefix, reason in _FAMILIES.items() if key.startswith(prefix)), None)
    return DROPPED.get(key, family)


def is_classic(data: Mapping[str, Any]) -> bool:
    """Whether a file's top level is written in the classic keys."""
    return not OURS & data.keys() and any(key in TRANSLATED or dropped(key) for key in data)


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """Classic keys set in the environment, with the name of their variable."""
    found = {}
    for name in env:
        key = name.removeprefix("LMCACHE_").lower()
        ours = name.startswith(OVERLAY) or name in _OWN_VARIABLES
        if name.startswith("LMCACHE_") and not ours and (key in TRANSLATED or dropped(key)):
            found[key] = name
    return found


def translate(draft: Draft, env: Mapping[str, str]) -> None:
    """Replace the draft's classic data by tiers, each part with the origin of the key it came from."""
    for key, name in variables(env).items():
        draft.put((key,), env[name], Origin(f"environment variable {name}", f"env:{name}"))
    _Translation(draft).run()


class _Translation:
    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._given = dict(draft.data)
        self._sources = {key: self._source(key) for key in self._given}
        self._top = draft.origin(())

    def _source(self, key: str) -> Origin:
        origin, value = self._draft.origin((key,)), self._given[key]
        shown = HIDDEN if telling(key) or (key == "remote_url" and "@" in str(value)) else shorten(value)
        return Origin(origin.where, origin.label, path=key, value=shown)

    def run(self) -> None:
        draft = self._draft
        for key in self._given:
            self._report(key)
        draft.data = {"tiers": []}
        draft.origins = {(): self._top}
        if "chunk_size" in self._given:
            self._put(("chunk_tokens",), self._given["chunk_size"], "chunk_size")
        self._memory()
        for key in ("local_disk", "gds_path"):
            self._disk(key)
        self._remote()
        self._policy()

    def _put(self, loc: tuple[str | int, ...], value: Any, key: str) -> None:
        self._draft.put(loc, value, self._sources.get(key, self._top))

    def _tier(self, key: str, tier: dict[str, Any]) -> int:
        tiers = self._draft.data["tiers"]
        tiers.append(tier)
        self._draft.origins["tiers", len(tiers) - 1] = self._sources.get(key, self._top)
        return len(tiers) - 1

    def _memory(self) -> None:
        gib = self._gib("max_local_cpu_size", _DEFAULT_CPU_GIB)
        self._tier("max_local_cpu_size", {"name": "dram", "backend": {"type": "cpu"}})
        if gib is not None:
            self._put(("tiers", 0, "capacity"), gib, "max_local_cpu_size")
        if self._bool("local_cpu") is False:
            place = self._sources["local_cpu"].label
            self._draft.notes.append(
                f"{place}: `local_cpu: false` keeps a memory tier: every chunk passes through memory"
            )

    def _disk(self, key: str) -> None:
        given = self._given.get(key)
        if given in (None, False, "", "null", "None", "false", "False"):
            return
        if not isinstance(given, str):
            self._wrong(key, "must be a directory", "write `local_disk: file:///var/cache/lmcache/`")
            return
        if "," in given:
            self._wrong(
                key, "several directories need a tier each", "write the file with `tiers:`, one for each directory"
            )
            return
        path = given.removeprefix("file://")
        capacity = self._gib("max_local_disk_size", 0.0)
        name = "disk" if key == "local_disk" else "gds"
        i = self._tier(key, {"name": name, "backend": {"type": "gds", "path": path}})
        self._draft.origins["tiers", i, "backend", "path"] = self._sources[key]
        if capacity:
            self._put(("tiers", i, "capacity"), capacity, "max_local_disk_size")
        else:
            self._put(("tiers", i, "capacity"), 1, key)  # stands in, so that only this problem is reported
            self._wrong(key, "needs `max_local_disk_size`", "add e.g. `max_local_disk_size: 20` (GiB)", Code.MISSING)

    def _remote(self) -> None:
        url = self._given.get("remote_url")
        if url in (None, "", "null", "None"):
            return
        scheme, separator, _ = str(url).partition("://")
        if not isinstance(url, str) or not separator:
            self._wrong("remote_url", "must be a URL", "write e.g. `remote_url: redis://host:6379`")
            return
        if scheme in _CONVERTED:
            fix = "`lmcachectl config from-lmcache FILE -o OUT` writes the tier, with what it lacks"
            self._wrong("remote_url", f"`{scheme}://` needs more than a URL says", fix)
            return
        if scheme in ("valkey", "resp"):
            url = f"redis{separator}{url.partition(separator)[2]}"
        i = self._tier("remote_url", {"name": "remote", "backend": {"type": _SCHEMES.get(scheme, scheme), "url": url}})
        self._draft.origins["tiers", i, "backend"] = self._sources["remote_url"]
        serde = self._given.get("remote_serde")
        if isinstance(serde, str) and serde.lower() not in ("naive", "none", "null", ""):
            self._put(("tiers", i, "serde"), {"type": serde.lower()}, "remote_serde")

    def _policy(self) -> None:
        policy = self._given.get("cache_policy")
        if isinstance(policy, str) and policy.lower() != "lru":
            for i in range(len(self._draft.data["tiers"])):
                self._put(("tiers", i, "eviction"), {"type": policy.lower()}, "cache_policy")

    def _report(self, key: str) -> None:
        if key in TRANSLATED:
            return
        source, reason = self._sources[key], dropped(key)
        if reason is not None:
            self._draft.notes.append(f"{source.label}: `{key}` is ignored: {reason}")
            return
        near = closest(key, [*TRANSLATED, *DROPPED])
        what = f"unknown key; did you mean `{near}`?" if near else "unknown key"
        fix = f"rename it to `{near}`" if near else f"remove it; classic keys with a meaning: {', '.join(TRANSLATED)}"
        self._problem(Code.UNKNOWN, key, what, "an ignored key would leave its default in force without a word", fix)

    # -- values ----------------------------------------------------------------------------------------------
    def _gib(self, key: str, default: float) -> int | None:
        """A classic size, a number of GiB, in bytes; sizes with a unit are understood too."""
        return self._value(key, int(default * _GIB), parse_gib, "must be a size in GiB", "write e.g. `5.0`")

    def _bool(self, key: str) -> bool | None:
        return self._value(key, True, parse_bool, "must be true or false", "write `true` or `false`")

    def _value(self, key: str, default: T, parse: Callable[[Any], T], what: str, fix: str) -> T | None:
        if self._given.get(key) is None:
            return default
        try:
            return parse(self._given[key])
        except (ValueError, TypeError):
            self._wrong(key, what, fix)
            return None

    def _wrong(self, key: str, what: str, fix: str, code: Code = Code.CLASSIC) -> None:
        self._problem(code, key, what, "the tier would not be what the key asks for", fix)

    def _problem(self, code: Code, key: str, what: str, why: str, fix: str) -> None:
        source = self._sources[key]
        self._draft.problems.append(Problem(source.where, key, what, why, fix, value=source.value, code=code))


def parse_gib(value: Any) -> int:
    """Bytes from a number of GiB, or from text with a unit of its own. Raise `ValueError` or `TypeError`."""
    if isinstance(value, str) and not value.strip().replace(".", "", 1).isdigit():
        return parse_bytes(value)
    nbytes = float(value) * _GIB
    if isinstance(value, bool) or not math.isfinite(nbytes) or nbytes < 0:
        raise ValueError("not a size")
    return int(nbytes)


def parse_bool(value: Any) -> bool:
    """A truth value, also as environments write it. Raise `ValueError`."""
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise ValueError("not a truth value") from None
