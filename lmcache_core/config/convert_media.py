"""The media of LMCache's `remote_url` and of its L2 adapters, as tiers of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lmcache_core import redact
from lmcache_core.config import classic
from lmcache_core.config.convert import ASSUMED_CAPACITY, Converter, Given, Kind, Tier, gib_of, idle, size, truth
from lmcache_core.errors import Problem
from lmcache_core.plugins import BACKENDS

_NOWHERE = {
    "lm": "LMCache's own server has no counterpart; use `redis` or a directory that machines share",
    "infinistore": "there is no such backend",
    "eic": "there is no such backend",
    "hf3fs": "there is no such backend; where 3FS is mounted, write a tier with backend `gds` and `mode: files`",
    "mock": "it is a testing aid",
    "blackhole": "it is a testing aid",
    "audit": "it is a testing aid",
    "external": "no configuration can name code; backends are plugins found by name",
    "plugin": "no configuration can name code; backends are plugins found by name",
    "azure": "write a tier with backend `fsspec` and `url: az://container/kv`",
    "bigtable": "there is no such backend",
    "sagemaker-hyperpod": "there is no such backend",
}
_EXTRA_DROPPED = {
    "save_chunk_meta": "every object describes itself",
    "save_only_first_rank": "not available in this version",
    "s3_num_io_threads": "the backend has its own `concurrency`",
    "s3_prefer_http2": "the client decides",
    "s3_enable_s3express": "the client decides by the bucket's name",
    "fs_connector_relative_tmp_dir": "temporary files lie beside the objects",
    "fs_connector_read_ahead_size": "chunks are read whole",
    "valkey_sync_num_workers": "see `lane.threads`",
    "audit_actual_remote_url": "wrap backends with a plugin from `plugins:`",
    "lookup_backoff_time": "a breaker decides when a failed tier is asked again",
    "force_store_wait": "stores never wait",
}
_EXTRA_READ = (
    "s3_region",
    "disable_tls",
    "aws_access_key_id",
    "aws_secret_access_key",
    "username",
    "password",
    "resp_num_threads",
    "valkey_username",
    "valkey_password",
    "valkey_database",
    "valkey_mode",
    "valkey_enable_ttl",
    "valkey_ttl_sec",
    "tls_enable",
    "fs_connector_use_odirect",
    "disk_io_threads",
    "master_server_address",
    "metadata_server",
    "local_hostname",
    "protocol",
    "device_name",
    "global_segment_size",
)
_MOONCAKE = ("metadata_server", "local_hostname", "protocol", "device_name", "global_segment_size")
_ADAPTER_COMMON = {
    "affinity_tag": "there is one kind of memory",
    "shared": "tiers may always be shared, where their medium is",
    "per_op_workers": "reads and writes have as many threads each, see `lane.threads`",
}


def directory(c: Converter, name: str, path: str, key: str, *, files: bool, limit: int | None) -> Tier:
    """A tier in a directory, with a capacity: nothing here grows without limit."""
    backend = {"type": "gds", "path": path, **({"mode": "files"} if files else {})}
    tier = c.tier(name, backend)
    tier.comments["backend.path"] = key
    if limit:
        tier.settings["capacity"] = size(limit)
    else:
        tier.settings["capacity"] = ASSUMED_CAPACITY
        tier.comments["capacity"] = "chosen: there was no limit"
        reason = f"had no limit; {ASSUMED_CAPACITY} of the file system is assumed, choose one"
        c.report(f"{key} (capacity)", Kind.ASSUMED, f"tiers.{tier.settings['name']}.capacity", reason, _where(c, key))
    tier.settings["backend"] = tier.settings.pop("backend")  # last, as people write it
    return tier


def _where(c: Converter, key: str) -> str:
    return c.given[key].where if key in c.given else ""


# -- remote_url ----------------------------------------------------------------------------------------------


def remote(c: Converter) -> Tier | None:
    """The tier of `remote_url`, with what `extra_config` says about it."""
    given = c.given.get("remote_url")
    if given is None or given.value in (None, "", "null", "None"):
        return None
    url = given.value
    scheme, separator, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if not separator or not rest:
        c.wrong("remote_url", "must be a URL", "write e.g. `remote_url: redis://host:6379`")
        return None
    if scheme in ("redis", "rediss", "valkey", "resp", "unix", "redis-sentinel", "redis-cluster"):
        return _redis(c, scheme, rest, given)
    if scheme == "s3":
        return _s3(c, rest, given)
    if scheme in ("fs", "file"):
        return _fs(c, url, given)
    if scheme == "mooncakestore":
        return _mooncake_url(c, rest, given)
    if scheme not in _NOWHERE and c.has(BACKENDS, scheme) and "url" in c.plugins.backend(scheme).model_fields:
        tier = c.tier("remote", {"type": scheme})
        c.put(tier, "backend.url", _without_login(c, tier, url, given), "remote_url")
        return tier
    reason = _NOWHERE.get(scheme, f"no backend `{scheme}` is installed: `pip install lmcache-backend-{scheme}`")
    c.report("remote_url", Kind.DROPPED, reason=reason)
    return None


def _without_login(c: Converter, tier: Tier, url: str, given: Given) -> str:
    """The URL without a password, and without a user where the backend has a setting for it."""
    head, separator, rest = url.partition("://")
    login, at, address = rest.rpartition("@")
    if not at:
        return url
    user, _, password = login.partition(":")
    fields = c.plugins.backend(tier.settings["backend"]["type"]).model_fields
    if user and "username" in fields:
        c.put(tier, "backend.username", user, "remote_url (user)", where=given.where)
    elif user and not password:
        return url if "password" not in fields else f"{head}{separator}{address}"
    if password:
        setting = "password" if "password" in fields else "url"
        c.secret("remote_url (password)", tier, setting, given)
    return f"{head}{separator}{address}"


def _redis(c: Converter, scheme: str, rest: str, given: Given) -> Tier:
    tls = "tls_enable" in c.extra and truth(c.extra["tls_enable"].value)
    kind = "unix" if scheme == "unix" else "rediss" if scheme == "rediss" or tls else "redis"
    tier = c.tier("remote", {"type": "redis"})
    first, *others = _without_login(c, tier, f"{kind}://{rest}", given).split(",")
    first, _, options = first.partition("?")
    number = c.extra.get("valkey_database")
    if number is not None and number.value not in (None, 0, "0"):
        first = f"{first.rstrip('/')}/{number.value}"
    c.put(tier, "backend.url", first, "remote_url")
    if options:
        c.report("remote_url (options)", Kind.DROPPED, reason="options of a URL are settings of the backend here")
    cluster = scheme == "redis-cluster" or (
        "valkey_mode" in c.extra and str(c.extra["valkey_mode"].value).lower() == "cluster"
    )
    if scheme == "redis-sentinel":
        tier.settings["backend"]["mode"] = "sentinel"
        tier.settings["backend"]["service"] = "mymaster"
        tier.comments["backend.service"] = "chosen: it was in REDIS_SERVICE_NAME"
        reason = "LMCache takes it from REDIS_SERVICE_NAME; `mymaster` is assumed"
        c.report("remote_url (service)", Kind.ASSUMED, "tiers.remote.backend.service", reason, given.where)
    elif cluster:
        tier.settings["backend"]["mode"] = "cluster"
    if others and (scheme == "redis-sentinel" or cluster):
        tier.settings["backend"]["hosts"] = others
    elif others:
        c.report("remote_url (hosts)", Kind.DROPPED, reason="one server has one address; see `mode` for clusters")
    for prefix in ("", "valkey_"):
        _login(c, tier, f"{prefix}username", f"{prefix}password")
    ttl = c.extra.get("valkey_ttl_sec")
    if ttl is not None and "valkey_enable_ttl" in c.extra and truth(c.extra["valkey_enable_ttl"].value):
        c.put(tier, "backend.ttl", ttl.value, "extra_config.valkey_ttl_sec")
    used = {"tls_enable": "url", "valkey_database": "url", "valkey_mode": "mode", "valkey_enable_ttl": "ttl"}
    for name, setting in used.items():
        if name in c.extra:
            c.report(f"extra_config.{name}", Kind.KEPT, f"tiers.remote.backend.{setting}")
    if "resp_num_threads" in c.extra:
        c.put(tier, "lane.threads", c.extra["resp_num_threads"].value, "extra_config.resp_num_threads")
    return tier


def _login(c: Converter, tier: Tier, user: str, password: str) -> None:
    if (given := c.extra.get(user)) is not None and given.value:
        c.put(tier, "backend.username", str(given.value), f"extra_config.{user}")
    if (given := c.extra.get(password)) is not None and given.value:
        c.secret(f"extra_config.{password}", tier, "password", given)


def _s3(c: Converter, rest: str, given: Given) -> Tier:
    region, insecure = c.extra.get("s3_region"), c.extra.get("disable_tls")
    plain = insecure is not None and truth(insecure.value)
    tier = s3_tier(c, rest, region.value if region else None, plain=plain)
    kind = tier.settings["backend"]["type"]
    c.report("remote_url", Kind.KEPT, "tiers.remote.backend.url", f"backend `{kind}`; objects lie below `lmcache/`")
    if region:
        c.report("extra_config.s3_region", Kind.KEPT, "tiers.remote.backend")
    if insecure:
        _tls(c, tier, "extra_config.disable_tls", plain=plain)
    for name in ("aws_access_key_id", "aws_secret_access_key"):
        if name in c.extra:
            c.secret(f"extra_config.{name}", tier, name, c.extra[name], name.upper())
    return tier


def _tls(c: Converter, tier: Tier, key: str, *, plain: bool) -> None:
    """Whether asking for no TLS had an effect: only an endpoint of one's own can be written with `http://`."""
    if plain and "http://" not in str(tier.settings["backend"]):
        c.report(key, Kind.DROPPED, reason="TLS is always used with this endpoint")
    else:
        c.report(key, Kind.KEPT if plain else Kind.IDLE, reason="" if plain else "turns something off")


def s3_tier(c: Converter, address: str, region: Any, *, plain: bool) -> Tier:
    """A bucket, given as `bucket` or as `bucket.host`, LMCache's way; by the `s3` plugin where it is installed."""
    host = address.removeprefix("s3://").strip("/")
    bucket, dot, endpoint = host.partition(".")
    amazon = endpoint.startswith("s3") and endpoint.endswith(("amazonaws.com", "amazonaws.com.cn"))
    scheme = "http" if plain else "https"
    custom = f"{scheme}://{endpoint}" if dot and not amazon else None
    url = f"s3://{bucket}/lmcache"
    wanted: dict[str, Any] = {"url": url}
    wanted |= {"region": str(region)} if region else {}
    wanted |= {"endpoint": custom} if custom else {}
    wanted |= {"allow_http": True} if custom and plain else {}
    if c.has(BACKENDS, "s3") and wanted.keys() <= c.plugins.backend("s3").model_fields.keys():
        return c.tier("remote", {"type": "s3", **wanted})
    client = {key: value for key, value in (("region_name", region), ("endpoint_url", custom)) if value}
    options = {"storage_options": {"client_kwargs": client}} if client else {}
    return c.tier("remote", {"type": "fsspec", "url": url, **options})


def _fs(c: Converter, url: str, given: Given) -> Tier | None:
    # Not `urlsplit`: it raises for a host that it does not like, and the host means nothing here.
    place = url.partition("://")[2].partition("?")[0].partition("#")[0]
    paths = [path for path in place[len(place.partition("/")[0]) :].split(",") if path]
    if not paths:
        c.wrong("remote_url", "must name a directory", "write e.g. `fs://localhost:0/mnt/kv`")
        return None
    tier = directory(c, "remote", paths[0], "remote_url", files=True, limit=None)
    c.report("remote_url", Kind.KEPT, "tiers.remote.backend.path")
    if len(paths) > 1:
        c.report("remote_url (directories)", Kind.DROPPED, reason="a tier has one directory", where=given.where)
    direct = c.extra.get("fs_connector_use_odirect")
    if direct is not None:
        _direct(c, tier, "extra_config.fs_connector_use_odirect", direct.value)
    return tier


def _direct(c: Converter, tier: Tier, key: str, value: Any) -> None:
    if truth(value):
        c.put(tier, "backend.io", "direct", key)
    else:
        c.report(key, Kind.IDLE, reason="`io: auto` decides by the file system")


def _mooncake_url(c: Converter, rest: str, given: Given) -> Tier | None:
    master = c.extra.get("master_server_address")
    address = str(master.value) if master else rest.strip("/").partition("/")[0]
    settings = {name: c.extra[name].value for name in _MOONCAKE if name in c.extra}
    tier = _mooncake(c, address, settings, "remote_url", "extra_config.")
    if tier is not None:
        c.report("remote_url", Kind.KEPT, "tiers.remote.backend.master")
        if master:
            c.report("extra_config.master_server_address", Kind.KEPT, "tiers.remote.backend.master")
    return tier


def _mooncake(c: Converter, master: str, settings: Mapping[str, Any], key: str, prefix: str) -> Tier | None:
    if not c.has(BACKENDS, "mooncake"):
        reason = "no backend `mooncake` is installed: `pip install lmcache-backend-mooncake`"
        c.report(key, Kind.DROPPED, reason=reason)
        return None
    tier = c.tier("remote", {"type": "mooncake", "master": master})
    fields = c.plugins.backend("mooncake").model_fields
    for name, value in settings.items():
        if name in fields and redact.hide(value) != value:
            c.secret(f"{prefix}{name}", tier, name, Given(None, _where(c, key)))
        elif name in fields:
            c.put(tier, f"backend.{name}", value, f"{prefix}{name}")
        else:
            c.report(f"{prefix}{name}", Kind.DROPPED, reason="backend `mooncake` has no such setting")
    return tier


# -- extra_config --------------------------------------------------------------------------------------------


def extras(c: Converter) -> None:
    """Account for what nothing has asked about in `extra_config`."""
    for name, given in c.extra.items():
        key = f"extra_config.{name}"
        if key in c.done:
            continue
        if name in _EXTRA_DROPPED:
            c.report(key, Kind.DROPPED, reason=_EXTRA_DROPPED[name])
        elif given.value in (None, False, ""):
            c.report(key, Kind.IDLE, reason="turns something off")
        elif name in _EXTRA_READ:
            c.report(key, Kind.DROPPED, reason="the tier that it is for is not there")
        elif classic.dropped(name) is not None:
            c.report(key, Kind.DROPPED, reason=classic.dropped(name) or "")
        else:
            c.report(key, Kind.DROPPED, reason="it belonged to another backend or plugin")


# -- L2 adapters ---------------------------------------------------------------------------------------------


def adapter(c: Converter, index: int, spec: Mapping[str, Any], where: str) -> None:
    """One `--l2-adapter` of LMCache's server."""
    key = f"l2_adapter[{index}]"
    kind = spec.get("type")
    make = _ADAPTERS.get(kind) if isinstance(kind, str) else None
    if make is None:
        if isinstance(kind, str) and kind in _LOST_ADAPTERS:
            c.report(key, Kind.DROPPED, reason=f"`{kind}`: {_LOST_ADAPTERS[kind]}", where=where)
        else:
            what = f"`{kind}` is no adapter that is known" if kind else "has no `type`"
            fix = f"adapters that become tiers: {', '.join(sorted(_ADAPTERS))}"
            c.problems.append(Problem(where, f"{key}.type", what, "", fix))
        return
    rest = {name: value for name, value in spec.items() if name != "type"}
    before = len(c.changes)
    tier = make(c, key, rest)
    if tier is not None:
        c.report(key, Kind.KEPT, f"tiers.{tier.settings['name']}")
        _common(c, tier, key, rest, where)
        _left_over(c, tier, key, rest)
        for name in spec:
            if name != "type" and f"{key}.{name}" not in c.done:
                c.report(f"{key}.{name}", Kind.KEPT, f"tiers.{tier.settings['name']}")
    c.changes[before:] = [replace(change, where=change.where or where) for change in c.changes[before:]]


def _left_over(c: Converter, tier: Tier, key: str, rest: Mapping[str, Any]) -> None:
    for name in rest:
        shown = f"{key}.{name}"
        reason = _ADAPTER_COMMON.get(name, f"backend `{tier.settings['backend']['type']}` has no such setting")
        nothing = idle(name, rest[name])
        c.report(shown, Kind.IDLE if nothing else Kind.DROPPED, reason=nothing or reason)


def _common(c: Converter, tier: Tier, key: str, rest: dict[str, Any], where: str) -> None:
    """Keys that every adapter has."""
    eviction = rest.pop("eviction", None)
    if isinstance(eviction, Mapping):
        c.eviction([tier], f"{key}.eviction", str(eviction.get("eviction_policy", "")).lower(), where)
        for name in ("trigger_watermark", "eviction_ratio"):
            if name in eviction:
                c.report(f"{key}.eviction.{name}", Kind.DROPPED, reason="a tier evicts one by one, when full")
    serde = rest.pop("serde", None)
    if isinstance(serde, Mapping):
        c.serde(tier, f"{key}.serde", str(serde.get("type", "")), where)
        for name in [name for name in serde if name != "type"]:
            c.report(f"{key}.serde.{name}", Kind.DROPPED, reason="see the serde's own settings", where=where)
    if rest.pop("persist_enabled", True) is False:
        c.report(f"{key}.persist_enabled", Kind.DROPPED, reason="what is stored survives a restart", where=where)
    workers = rest.pop("num_workers", None)
    if isinstance(workers, int) and 1 <= workers <= 256:
        c.put(tier, "lane.threads", workers, f"{key}.num_workers")
    elif workers is not None:
        rest["num_workers"] = workers


def _text(c: Converter, key: str, rest: dict[str, Any], name: str) -> str | None:
    value = rest.pop(name, None)
    if isinstance(value, str) and value:
        return value
    c.problems.append(Problem("l2 adapter", f"{key}.{name}", "must be text, and not empty", "", f"write `{name}`"))
    return None


def _limit(c: Converter, key: str, rest: dict[str, Any]) -> int:
    """An adapter's `max_capacity_gb` in bytes; 0 where there is none, or a wrong one."""
    try:
        return gib_of(rest.pop("max_capacity_gb", 0))
    except ValueError:
        what, fix = "must be a number of GiB", "write e.g. `100`"
        c.problems.append(Problem("l2 adapter", f"{key}.max_capacity_gb", what, "", fix))
        return 0


def _fs_adapter(c: Converter, key: str, rest: dict[str, Any]) -> Tier | None:
    path = _text(c, key, rest, "base_path")
    if path is None:
        return None
    limit = _limit(c, key, rest)
    tier = directory(c, "disk", path, f"{key}.base_path", files=True, limit=limit)
    if "use_odirect" in rest:
        _direct(c, tier, f"{key}.use_odirect", rest.pop("use_odirect"))
    return tier


def _address(node: str) -> str:
    """A host without a login: `username` and `password` say that."""
    return node.strip().rpartition("@")[2]


def _resp_adapter(c: Converter, key: str, rest: dict[str, Any]) -> Tier | None:
    host, port = _text(c, key, rest, "host"), rest.pop("port", 6379)
    if host is None:
        return None
    tier = c.tier("redis", {"type": "redis", "url": f"redis://{_address(host)}:{port}"})
    _adapter_login(c, key, rest, tier)
    return tier


def _valkey_adapter(c: Converter, key: str, rest: dict[str, Any]) -> Tier | None:
    given = _text(c, key, rest, "startup_nodes")
    nodes = [_address(node) for node in (given or "").split(",") if node.strip()]
    if given is not None and not nodes:
        c.problems.append(Problem("l2 adapter", f"{key}.startup_nodes", "names no node", "", "write e.g. `host:6379`"))
    if not nodes:
        return None
    first, *others = nodes
    scheme = "rediss" if rest.pop("tls_enable", False) else "redis"
    cluster, number = rest.pop("cluster_mode", False), rest.pop("database_id", None)
    url = f"{scheme}://{first}" + (f"/{number}" if number and not cluster else "")
    tier = c.tier("redis", {"type": "redis", "url": url, **({"mode": "cluster"} if cluster else {})})
    if cluster and others:
        tier.settings["backend"]["hosts"] = others
    elif others:
        c.report(f"{key}.startup_nodes", Kind.IDLE, reason="without `cluster_mode` only the first is used there, too")
    if cluster and number is not None:
        c.report(f"{key}.database_id", Kind.IDLE, reason="is ignored in a cluster there, too")
    for name, setting in (("key_prefix", "prefix"), ("ttl_seconds", "ttl"), ("request_timeout", "timeout")):
        if rest.get(name):
            c.put(tier, f"backend.{setting}", rest.pop(name), f"{key}.{name}")
    _adapter_login(c, key, rest, tier)
    return tier


def _adapter_login(c: Converter, key: str, rest: dict[str, Any], tier: Tier) -> None:
    user, password = rest.pop("username", ""), rest.pop("password", "")
    if user:
        c.put(tier, "backend.username", str(user), f"{key}.username")
    if password:
        c.secret(f"{key}.password", tier, "password", Given(None, ""))
    if rest.pop("max_capacity_gb", 0):
        reason = "the server bounds itself by `maxmemory`"
        c.report(f"{key}.max_capacity_gb", Kind.DROPPED, reason=reason)


def _s3_adapter(c: Converter, key: str, rest: dict[str, Any]) -> Tier | None:
    endpoint = _text(c, key, rest, "s3_endpoint")
    if endpoint is None:
        return None
    plain = bool(rest.pop("disable_tls", False))
    tier = s3_tier(c, endpoint, rest.pop("s3_region", None), plain=plain)
    if plain:
        _tls(c, tier, f"{key}.disable_tls", plain=plain)
    for name in ("aws_access_key_id", "aws_secret_access_key"):
        if rest.pop(name, None):
            c.secret(f"{key}.{name}", tier, name, Given(None, ""), name.upper())
    limit = _limit(c, key, rest)
    if limit:
        c.put(tier, "capacity", size(limit), f"{key}.max_capacity_gb")
    return tier


def _mooncake_adapter(c: Converter, key: str, rest: dict[str, Any]) -> Tier | None:
    master = rest.pop("master_server_address", None) or rest.pop("master_server_addr", None)
    if not master:
        master = "localhost:50051"
        c.report(f"{key} (master)", Kind.ASSUMED, reason=f"names no master; `{master}` is assumed")
    settings = {name: rest.pop(name) for name in _MOONCAKE if name in rest}
    return _mooncake(c, str(master), settings, key, f"{key}.")


_Make = Callable[[Converter, str, dict[str, Any]], Tier | None]
_ADAPTERS: dict[str, _Make] = {
    "fs": _fs_adapter,
    "fs_native": _fs_adapter,
    "resp": _resp_adapter,
    "valkey": _valkey_adapter,
    "s3": _s3_adapter,
    "mooncake_store": _mooncake_adapter,
}
_LOST_ADAPTERS = {
    "aerospike": "there is no such backend",
    "bigtable": "there is no such backend",
    "dax": "there is no such backend",
    "fault_inject": "it is a testing aid; the kit injects faults through a plugin",
    "hf3fs": _NOWHERE["hf3fs"],
    "hfbucket": "write a tier with backend `fsspec` and an `hf://` URL",
    "mock": "it is a testing aid",
    "native_plugin": _NOWHERE["plugin"],
    "nixl_native": "there is no such backend",
    "nixl_store": "there is no such backend",
    "nixl_store_dynamic": "there is no such backend",
    "p2p": "not available in this version",
    "plugin": _NOWHERE["plugin"],
    "raw_block": "write a tier with backend `gds` in a directory on the device",
    "sagemaker-hyperpod": "there is no such backend",
}
