"""`convert`: everything LMCache's settings say, key by key, put into one conversion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcache_core.config import classic, text
from lmcache_core.config.convert import ALIASES, Conversion, Converter, Given, Kind, finish, idle, size
from lmcache_core.config.convert_media import adapter, directory, extras, remote
from lmcache_core.config.draft import OVERLAY
from lmcache_core.config.findings import Code
from lmcache_core.config.loader import CONFIG_FILE
from lmcache_core.errors import ConfigError, Problem
from lmcache_core.plugins import Plugins
from lmcache_core.spelling import closest

_PREFIX = "LMCACHE_"
_NO_KEYS = frozenset({CONFIG_FILE, "LMCACHE_NATIVE", "LMCACHE_USE_EXPERIMENTAL", "LMCACHE_LOG_LEVEL"})
_DEFAULT_CPU_GIB = 5.0
_NOTHING = (None, False, "", "null", "None", "false", "False")


def convert(
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    adapters: Sequence[str] = (),
    l1_gib: float | None = None,
) -> Conversion:
    """Convert a file, variables, and adapters of LMCache's server (JSON texts); variables win over the file.

    Raise `ConfigError` when the file cannot be read or holds a value that LMCache would refuse, too.
    """
    given: dict[str, Given] = {}
    sources = []
    if file is not None:
        given |= _of_file(file)
        sources.append(file.name)
    if env is not None:
        given |= _of_environment(env)
        sources.append("the environment")
    if adapters:
        sources.append("adapters of its server")
    c = Converter(given, Plugins())
    specs = [_adapter(i, raw, c.problems) for i, raw in enumerate(adapters)]
    _aliases(c)
    _extra(c)
    _chunks(c)
    _memory(c, l1_gib)
    _directories(c)
    tier = remote(c)
    if tier is not None:
        _patience(c)
    for i, spec in enumerate(specs):
        if spec is not None:
            adapter(c, i, spec, f"--l2-adapter {i + 1}")
    _encoding(c)
    _policy(c)
    extras(c)
    _rest(c)
    return finish(c, " and ".join(sources) or "LMCache's defaults")


def _of_file(file: Path) -> dict[str, Given]:
    doc = text.read(file)
    if doc.problems:
        raise ConfigError(doc.problems)
    ours = classic.OURS & doc.data.keys()
    if ours:
        what = f"is a configuration of lmcache-core already: it has `{min(ours)}`"
        raise ConfigError([Problem(str(file), "", what, fix="use it as it is", code=Code.CLASSIC)])
    places = {key: f"{doc.name}:{doc.places[(key,)][0]}" for key in doc.data}
    return {key: Given(value, places[key]) for key, value in doc.data.items()}


def _of_environment(env: Mapping[str, str]) -> dict[str, Given]:
    names = [n for n in env if n.startswith(_PREFIX) and not n.startswith(OVERLAY) and n not in _NO_KEYS]
    found = {}
    for name in sorted(names):
        value = env[name].strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name.removeprefix(_PREFIX).lower()] = Given(value, f"env:{name}")
    return found


def _adapter(index: int, raw: str, problems: list[Problem]) -> dict[str, Any] | None:
    try:
        spec = json.loads(raw)
    except (ValueError, RecursionError):
        spec = None
    if isinstance(spec, dict):
        return spec
    where, fix = f"--l2-adapter {index + 1}", 'write e.g. `{"type": "fs", "base_path": "/mnt/kv"}`'
    problems.append(Problem(where, f"l2_adapter[{index}]", "is not a JSON object", "", fix, code=Code.CLASSIC))
    return None


def _aliases(c: Converter) -> None:
    """Old names count as the new ones, which win where both are given."""
    for old, new in ALIASES.items():
        if old in c.given:
            given = c.given.pop(old)
            if new in c.given:
                reason = f"is the old name of `{new}`, which is given, too"
                c.report(old, Kind.DROPPED, reason=reason, where=given.where)
            else:
                c.given[new] = given
                c.names[new] = old


def _extra(c: Converter) -> None:
    given = c.given.get("extra_config")
    value = given.value if given else None
    if given is None or value in _NOTHING:
        return
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        c.wrong("extra_config", "must be a mapping", "write `key: value` lines below it; JSON in the environment")
        return
    c.extra = {str(key): Given(item, given.where) for key, item in value.items()}
    c.report("extra_config", Kind.KEPT, reason="key by key, see `extra_config.*`")


def _chunks(c: Converter) -> None:
    tokens = c.value("chunk_size", int, "must be a whole number", "write e.g. `256`")
    if tokens is not None:
        if not 1 <= tokens <= 65536:
            c.wrong("chunk_size", "must be between 1 and 65536", "write e.g. `256`")
        c.top["chunk_tokens"] = tokens
        c.comments["chunk_tokens"] = "chunk_size"
        c.report("chunk_size", Kind.KEPT, "chunk_tokens")


def _memory(c: Converter, l1_gib: float | None) -> None:
    tier = c.tier("dram", {"type": "cpu"})
    backend = tier.settings.pop("backend")
    nbytes = c.gib("max_local_cpu_size")
    if l1_gib is not None:
        tier.settings["capacity"] = size(int(l1_gib * (1 << 30)))
        c.report("--l1-size-gb", Kind.KEPT, "tiers.dram.capacity", where="argument")
    elif nbytes:
        c.put(tier, "capacity", size(nbytes), "max_local_cpu_size")
    else:
        tier.settings["capacity"] = size(int(_DEFAULT_CPU_GIB * (1 << 30)))
        tier.comments["capacity"] = "LMCache's default"
    if "max_local_cpu_size" in c.given and (l1_gib is not None or not nbytes):
        reason = "no memory tier can be without memory" if l1_gib is None else "--l1-size-gb is given"
        c.report("max_local_cpu_size", Kind.CHANGED, "tiers.dram.capacity", reason)
    tier.settings["backend"] = backend
    local = c.value("local_cpu", classic.parse_bool, "must be true or false", "write `true` or `false`")
    if local is False:
        c.report("local_cpu", Kind.CHANGED, "tiers.dram", "the memory tier stays: every chunk passes through memory")
    elif "local_cpu" in c.given:
        c.report("local_cpu", Kind.KEPT, "tiers.dram")


def _directories(c: Converter) -> None:
    limit = c.gib("max_local_disk_size")
    used = False
    for key, name in (("local_disk", "disk"), ("gds_path", "gds")):
        given = c.given.get(key)
        if given is None or given.value in _NOTHING:
            continue
        if not isinstance(given.value, str):
            c.wrong(key, "must be a directory", f"write e.g. `{key}: /var/cache/lmcache`")
            continue
        parts = [part.strip().removeprefix("file://") for part in given.value.split(",")]
        first, *others = [part for part in parts if part] or [""]
        if not first:
            c.wrong(key, "must be a directory", f"write e.g. `{key}: /var/cache/lmcache`")
            continue
        tier = directory(c, name, first, key, files=False, limit=limit)
        c.report(key, Kind.KEPT, f"tiers.{tier.settings['name']}.backend.path")
        if others:
            reason = (
                f"a tier has one directory; {len(others)} more are left out: stripe the disks, or give each engine one"
            )
            c.report(f"{key} (directories)", Kind.CHANGED, reason=reason, where=given.where)
        if limit:
            tier.comments["capacity"] = "max_local_disk_size"
            used = True
        threads = c.extra.get("disk_io_threads")
        if threads is not None and isinstance(threads.value, int) and 1 <= threads.value <= 256:
            c.put(tier, "lane.threads", threads.value, "extra_config.disk_io_threads")
    if "max_local_disk_size" in c.given:
        kind, reason = (Kind.KEPT, "") if used else (Kind.IDLE, "there is no directory to limit")
        c.report("max_local_disk_size", kind, "tiers.*.capacity" if used else "", reason)


def _patience(c: Converter) -> None:
    """How long a remote tier is waited for."""
    given = c.given.get("blocking_timeout_secs")
    seconds = c.value("blocking_timeout_secs", float, "must be a number of seconds", "write e.g. `10`")
    if given is not None and seconds is not None and 0 < seconds <= 3600 and not idle("blocking_timeout_secs", seconds):
        tier = next(tier for tier in c.tiers if tier.settings["name"] == "remote")
        reason = "the longest wait for one batch of chunks"
        c.put(tier, "lane.deadline", f"{seconds:g}s", "blocking_timeout_secs", Kind.CHANGED, reason)


def _encoding(c: Converter) -> None:
    given = c.given.get("remote_serde")
    if given is None:
        return
    kind = "" if given.value is None else str(given.value).lower()
    there = [tier for tier in c.tiers if tier.settings["name"] == "remote"]
    if there:
        c.serde(there[0], "remote_serde", kind, given.where)
    else:
        c.report("remote_serde", Kind.IDLE, reason="there is no remote tier")


def _policy(c: Converter) -> None:
    given = c.given.get("cache_policy")
    if given is not None:
        c.eviction(c.tiers, "cache_policy", str(given.value or "lru").lower(), given.where)


def _rest(c: Converter) -> None:
    """Every key that nothing above has accounted for."""
    broken = {problem.path for problem in c.problems}
    for key, given in c.given.items():
        if key in c.done or key in broken:
            continue
        reason = classic.dropped(key)
        nothing = idle(key, given.value)
        if reason is None and key not in classic.TRANSLATED:
            near = closest(key, [*classic.TRANSLATED, *classic.DROPPED])
            hint = f"; did you mean `{near}`?" if near else ""
            c.report(key, Kind.UNKNOWN, reason=f"is no key of LMCache's, which ignores it as well{hint}")
        elif nothing or key in classic.TRANSLATED:
            c.report(key, Kind.IDLE, reason=nothing or "turns something off")
        else:
            c.report(key, Kind.DROPPED, reason=reason or "")
