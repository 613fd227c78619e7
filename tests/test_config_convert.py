"""`lmcachectl config from-lmcache`: what it writes loads, and every key is accounted for, once."""

from __future__ import annotations

import functools
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from lmcache_keys import ADAPTERS, KEYS

from lmcache_core import plugins
from lmcache_core.cli import main
from lmcache_core.config import classic, load
from lmcache_core.config.convert import ALIASES, Change, Conversion, Kind
from lmcache_core.config.from_lmcache import convert
from lmcache_core.errors import ConfigError
from lmcache_core.plugins import BACKENDS, Plugins

Capture = pytest.CaptureFixture[str]
GIB = 1 << 30


INSTALLED = functools.cache(plugins.installed)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "installed", INSTALLED)  # else most of the time
    for name in list(os.environ):
        if name.startswith("LMCACHE_"):
            monkeypatch.delenv(name)


def write(directory: Path, settings: dict[str, Any], name: str = "theirs.yaml") -> Path:
    file = directory / name
    file.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return file


def loaded(made: Conversion, directory: Path) -> list[dict[str, Any]]:
    """The tiers of what was written, as our loader reads them."""
    file = directory / "ours.yaml"
    file.write_text(made.text)
    config = load(file, env={}).config
    assert load(made.data, env={}).config == config, "text and settings say the same"
    return [tier.model_dump(mode="json") for tier in config.tiers]


def of(made: Conversion, key: str) -> Change:
    [change] = [change for change in made.changes if change.key == key]
    return change


SMALL = {"max_local_cpu_size": 0.25}


# -- every key -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_accounted_for_and_the_result_loads(tmp_path: Path, key: str) -> None:
    made = convert(write(tmp_path, {**SMALL, key: KEYS[key]}))
    loaded(made, tmp_path)
    assert [change.key for change in made.changes].count(key) == 1
    change = of(made, key)
    assert change.where.startswith(str(tmp_path / "theirs.yaml:"))
    assert change.to or change.reason
    assert change.kind is not Kind.UNKNOWN
    from_env = convert(env={f"LMCACHE_{key.upper()}": _as_variable(KEYS[key]), "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.25"})
    if key != "max_local_cpu_size":
        assert (of(from_env, key).kind, of(from_env, key).to) == (change.kind, change.to)
        assert loaded(from_env, tmp_path) == loaded(made, tmp_path)


def _as_variable(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def test_all_keys_at_once(tmp_path: Path) -> None:
    made = convert(write(tmp_path, {**KEYS, **SMALL}))
    assert {change.key for change in made.changes} >= KEYS.keys()
    assert [tier["name"] for tier in loaded(made, tmp_path)] == ["dram", "disk", "gds", "remote"]


def test_every_key_is_known_when_a_classic_file_is_loaded() -> None:
    assert {key for key in KEYS if key not in classic.TRANSLATED and classic.dropped(key) is None} == set()
    assert {key for key in ALIASES if classic.dropped(key) is None} == set()


@pytest.mark.parametrize("old", ALIASES)
def test_old_names_count_as_the_new_ones(tmp_path: Path, old: str) -> None:
    value = KEYS[ALIASES[old]]
    made = convert(write(tmp_path, {**SMALL, old: value}))
    assert (of(made, old).kind, of(made, old).reason) == (Kind.DROPPED, classic.dropped(ALIASES[old]))
    both = convert(write(tmp_path, {**SMALL, old: value, ALIASES[old]: value}))
    assert "is the old name of" in of(both, old).reason


# -- tiers ---------------------------------------------------------------------------------------------------


def test_memory_and_disk(tmp_path: Path) -> None:
    disk = str(tmp_path / "kv")
    theirs = {"chunk_size": 64, "max_local_cpu_size": 0.5, "local_disk": f"file://{disk}", "max_local_disk_size": 1}
    made = convert(write(tmp_path, {**theirs, "save_unfull_chunk": False, "py_enable_gc": True}))
    assert made.lossless
    dram, nvme = loaded(made, tmp_path)
    assert made.data["chunk_tokens"] == 64
    assert (dram["capacity"], nvme["capacity"], nvme["backend"]["path"]) == (GIB // 2, GIB, disk)
    assert "capacity: 512MiB  # max_local_cpu_size\n" in made.text
    assert f"path: {disk}  # local_disk\n" in made.text


def test_what_had_no_limit_gets_one_and_says_so(tmp_path: Path) -> None:
    made = convert(write(tmp_path, {**SMALL, "local_disk": str(tmp_path / "kv")}))
    assert of(made, "local_disk (capacity)").kind is Kind.ASSUMED
    assert not made.lossless
    assert "capacity: 10%" in made.text
    loaded(made, tmp_path)


def test_several_directories_become_the_first(tmp_path: Path) -> None:
    both = f"file://{tmp_path}/a/,file://{tmp_path}/b/"
    made = convert(write(tmp_path, {**SMALL, "local_disk": both, "max_local_disk_size": 0.5}))
    assert loaded(made, tmp_path)[1]["backend"]["path"] == f"{tmp_path}/a"
    assert "1 more are left out" in of(made, "local_disk (directories)").reason


def test_memory_stays_when_it_was_off(tmp_path: Path) -> None:
    made = convert(write(tmp_path, {**SMALL, "local_cpu": False}))
    assert of(made, "local_cpu").kind is Kind.CHANGED
    assert [tier["name"] for tier in loaded(made, tmp_path)] == ["dram"]


REDIS = {
    "redis://localhost:6380/2": {"url": "redis://localhost:6380/2", "mode": "single"},
    "rediss://localhost": {"url": "rediss://localhost"},
    "valkey://localhost:1": {"url": "redis://localhost:1"},
    "resp://localhost:1": {"url": "redis://localhost:1"},
    "unix:///run/redis.sock": {"url": "unix:///run/redis.sock"},
    "redis://me@localhost:1": {"url": "redis://localhost:1", "username": "me"},
    "redis://me:canary-1@localhost:1": {"url": "redis://localhost:1", "username": "me", "password": None},
    "redis-sentinel://a:1,b:2": {"url": "redis://a:1", "mode": "sentinel", "hosts": ["b:2"], "service": "mymaster"},
    "redis-cluster://u:canary-1@a:1,b:2": {"url": "redis://a:1", "mode": "cluster", "hosts": ["b:2"], "username": "u"},
}


@pytest.mark.parametrize("url", REDIS)
def test_redis_urls(tmp_path: Path, url: str) -> None:
    made = convert(write(tmp_path, {**SMALL, "remote_url": url}))
    backend = loaded(made, tmp_path)[1]["backend"]
    assert backend["type"] == "redis"
    assert {key: backend[key] for key in REDIS[url]} == REDIS[url]
    assert of(made, "remote_url").kind is Kind.KEPT
    assert "canary" not in made.text + repr(made.changes)
    if "canary" in url:
        assert "LMCACHE__TIERS__REMOTE__BACKEND__PASSWORD" in of(made, "remote_url (password)").reason


def test_redis_settings_of_extra_config(tmp_path: Path) -> None:
    extra = {
        "valkey_username": "me",
        "valkey_password": "canary-1",
        "valkey_database": 3,
        "valkey_enable_ttl": True,
        "valkey_ttl_sec": 60,
        "tls_enable": True,
        "resp_num_threads": 6,
        "save_chunk_meta": True,
        "something_else": 1,
    }
    made = convert(write(tmp_path, {**SMALL, "remote_url": "valkey://h:1", "extra_config": extra}))
    tier = loaded(made, tmp_path)[1]
    assert (tier["backend"]["url"], tier["backend"]["username"]) == ("rediss://h:1/3", "me")
    assert (tier["backend"]["ttl"], tier["lane"]["threads"]) == (60.0, 6)
    assert {change.key for change in made.changes} >= {f"extra_config.{key}" for key in extra}
    for key in ("tls_enable", "valkey_database", "valkey_enable_ttl", "valkey_ttl_sec", "resp_num_threads"):
        assert of(made, f"extra_config.{key}").kind is Kind.KEPT, key
    assert of(made, "extra_config.valkey_password").kind is Kind.SECRET
    assert "canary" not in made.text + repr(made.changes)


@pytest.mark.parametrize("plugin", [True, False], ids=["s3 plugin", "fsspec"])
def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: bool) -> None:
    if not plugin:
        names = Plugins.names
        monkeypatch.setattr(Plugins, "names", lambda self, group: [n for n in names(self, group) if n != "s3"])
    extra = {"s3_region": "us-west-2", "aws_access_key_id": "canary-1", "aws_secret_access_key": "canary-2"}
    settings = {**SMALL, "remote_url": "s3://bucket.s3.us-west-2.amazonaws.com", "extra_config": extra}
    made = convert(write(tmp_path, settings))
    backend = loaded(made, tmp_path)[1]["backend"]
    assert backend["url"] == "s3://bucket/lmcache"
    if plugin and "s3" in Plugins().names(BACKENDS):
        assert (backend["type"], backend["region"]) == ("s3", "us-west-2")
    else:
        assert backend["type"] == "fsspec"
        assert backend["storage_options"] == {"client_kwargs": {"region_name": "us-west-2"}}
    assert "AWS_SECRET_ACCESS_KEY" in of(made, "extra_config.aws_secret_access_key").reason
    assert "canary" not in made.text + repr(made.changes)
    own = convert(write(tmp_path, {**SMALL, "remote_url": "s3://bucket.minio.local:9000", "extra_config": {}}))
    assert "https://minio.local:9000" in own.text
    loaded(own, tmp_path)


def test_a_shared_directory(tmp_path: Path) -> None:
    extra = {"fs_connector_use_odirect": True, "fs_connector_read_ahead_size": 4096}
    made = convert(write(tmp_path, {**SMALL, "remote_url": f"fs://host:0{tmp_path}/kv", "extra_config": extra}))
    backend = loaded(made, tmp_path)[1]["backend"]
    assert (backend["type"], backend["mode"], backend["io"]) == ("gds", "files", "direct")
    assert backend["path"] == f"{tmp_path}/kv"


def test_mooncake(tmp_path: Path) -> None:
    extra = {"metadata_server": "http://h:8080/metadata", "protocol": "tcp"}
    made = convert(write(tmp_path, {**SMALL, "remote_url": "mooncakestore://h:50051/", "extra_config": extra}))
    tiers = loaded(made, tmp_path)
    if "mooncake" in Plugins().names(BACKENDS):
        assert tiers[1]["backend"]["master"] == "h:50051"
        assert tiers[1]["backend"]["metadata_server"] == extra["metadata_server"]
    else:
        assert of(made, "remote_url").kind is Kind.DROPPED


@pytest.mark.parametrize("scheme", ["lm", "infinistore", "mock", "blackhole", "external", "plugin", "azure", "tape"])
def test_what_cannot_be_reached_is_named(tmp_path: Path, scheme: str) -> None:
    made = convert(write(tmp_path, {**SMALL, "remote_url": f"{scheme}://h:1", "remote_serde": "naive"}))
    assert len(loaded(made, tmp_path)) == 1
    assert (of(made, "remote_url").kind, bool(of(made, "remote_url").reason)) == (Kind.DROPPED, True)
    assert of(made, "remote_serde").kind is Kind.IDLE


def test_patience_serde_and_policy(tmp_path: Path) -> None:
    theirs = {"remote_url": "redis://h:1", "blocking_timeout_secs": 3, "remote_serde": "zstd", "cache_policy": "LRU"}
    made = convert(write(tmp_path, {**SMALL, **theirs}))
    tier = loaded(made, tmp_path)[1]
    assert (tier["lane"]["deadline"], tier["serde"]["type"], tier["eviction"]["type"]) == (3.0, "zstd", "lru")


# -- adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_and_each_of_its_keys(tmp_path: Path, kind: str) -> None:
    made = convert(adapters=[json.dumps({"type": kind, **ADAPTERS[kind]})], l1_gib=0.25)
    tiers = loaded(made, tmp_path)
    whole = of(made, "l2_adapter[0]")
    assert "canary" not in made.text + repr(made.changes)
    if whole.kind is Kind.DROPPED:
        assert (len(tiers), bool(whole.reason)) == (1, True)
        return
    assert len(tiers) == 2
    keys = [change.key for change in made.changes]
    for key in ADAPTERS[kind]:
        assert keys.count(f"l2_adapter[0].{key}") == 1, key


def test_no_tls_is_said_to_be_kept_only_where_it_is(tmp_path: Path) -> None:
    for endpoint, kind in (("bucket.s3.us-west-2.amazonaws.com", Kind.DROPPED), ("bucket.minio.local:9000", Kind.KEPT)):
        extra = {"s3_region": "us-west-2", "disable_tls": True}
        made = convert(write(tmp_path, {**SMALL, "remote_url": f"s3://{endpoint}", "extra_config": extra}))
        assert of(made, "extra_config.disable_tls").kind is kind
        loaded(made, tmp_path)
        spec = {"type": "s3", "s3_endpoint": endpoint, "s3_region": "us-west-2", "disable_tls": True}
        made = convert(adapters=[json.dumps(spec)], l1_gib=0.25)
        assert of(made, "l2_adapter[0].disable_tls").kind is kind


def test_adapters_in_order_after_the_memory_of_the_server(tmp_path: Path) -> None:
    specs = [{"type": "fs", "base_path": f"{tmp_path}/{name}"} for name in "ab"]
    made = convert(adapters=[json.dumps(spec) for spec in specs], l1_gib=0.5)
    tiers = loaded(made, tmp_path)
    assert [tier["name"] for tier in tiers] == ["dram", "disk", "disk2"]
    assert tiers[0]["capacity"] == GIB // 2


# -- mistakes ------------------------------------------------------------------------------------------------


def test_unknown_keys_are_named_with_what_may_have_been_meant(tmp_path: Path) -> None:
    made = convert(write(tmp_path, {**SMALL, "chunk_szie": 64, "colour": "red"}))
    assert (of(made, "chunk_szie").kind, of(made, "colour").kind) == (Kind.UNKNOWN, Kind.UNKNOWN)
    assert "did you mean `chunk_size`?" in of(made, "chunk_szie").reason
    made = convert(env={"LMCACHE_CHUNK_SZIE": "64", "LMCACHE__TIERS__DRAM__CAPACITY": "1GiB"})
    assert [change.key for change in made.changes] == ["chunk_szie"]


@pytest.mark.parametrize(
    "settings, path",
    [
        ({"chunk_size": "many"}, "chunk_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"max_local_cpu_size": "lots"}, "max_local_cpu_size"),
        ({"local_cpu": "perhaps"}, "local_cpu"),
        ({"local_disk": 5}, "local_disk"),
        ({"remote_url": "localhost"}, "remote_url"),
        ({"extra_config": [1]}, "extra_config"),
        ({"tiers": []}, ""),
    ],
)
def test_what_neither_would_take_is_refused(tmp_path: Path, settings: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(write(tmp_path, settings))
    assert [problem.path for problem in error.value.problems] == [path]
    assert error.value.problems[0].fix


@pytest.mark.parametrize("spec", ["{", "[]", "{}", '{"type": "fss"}', '{"type": "fs"}'])
def test_adapters_that_are_none(spec: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(adapters=[spec])
    assert error.value.problems[0].path.startswith("l2_adapter[0]")


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, {**SMALL, "chunk_size": 64})
    assert main(["config", "from-lmcache", str(file)]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["chunk_tokens"] == 64
    assert "every key means what it meant (2 kept)" in err
    target = tmp_path / "ours.yaml"
    theirs = write(tmp_path, {**SMALL, "remote_url": "redis://u:canary-1@h:1", "enable_p2p": True}, "lossy.yaml")
    assert main(["config", "from-lmcache", str(theirs), "-o", str(target), "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["ok"], result["output"], result["text"]) == (False, str(target), target.read_text())
    assert result["counts"] == {"kept": 3, "secret": 1, "dropped": 1}
    assert "canary" not in out + err + target.read_text()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert main(["config", "from-lmcache", str(theirs), "-o", str(target)]) == 2, "nothing is overwritten"
    assert "file exists" in capsys.readouterr().err
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(file))
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "32")
    assert main(["config", "from-lmcache", "--env"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["chunk_tokens"] == 32, "variables win"


def test_the_command_without_anything_to_convert(tmp_path: Path, capsys: Capture) -> None:
    assert main(["config", "from-lmcache"]) == 2
    assert "give FILE, --env or --l2-adapter" in capsys.readouterr().err
    assert main(["config", "from-lmcache", str(tmp_path / "nowhere.yaml")]) == 2
    assert main(["config", "from-lmcache", str(write(tmp_path, {"chunk_size": "x"})), "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["problems"][0]["path"] == "chunk_size"


def test_a_larger_machine_than_this_one(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path, {"max_local_cpu_size": 90000})
    assert main(["config", "from-lmcache", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "capacity: 90000GiB" in out
    assert "on this machine it would not start" in err
