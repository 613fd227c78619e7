"""Classic keys and variables become tiers; what has no meaning is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from dists import Distributions

from lmcache_backends.cpu import CpuConfig
from lmcache_backends.gds import GdsConfig
from lmcache_core.config import PipelineConfig, TierConfig, load
from lmcache_core.errors import ConfigError

GIB = 1 << 30


def write(directory: Path, content: str) -> Path:
    file = directory / "lmcache.yaml"
    file.write_text(content.replace("DIR", str(directory)))
    return file


TIERED = """\
chunk_tokens: 128
tiers:
  - {name: dram, capacity: 64MiB, backend: {type: cpu}}
"""

CLASSIC = """\
chunk_size: 128
local_cpu: true
max_local_cpu_size: 0.5
local_disk: "file://DIR/kv/"
max_local_disk_size: 1.5
cache_policy: LRU
remote_serde: naive
remote_url: null
save_unfull_chunk: true
enable_p2p: false
nixl_role: sender
extra_config: {a: 1}
"""


def test_a_classic_file_becomes_tiers(tmp_path: Path) -> None:
    file = write(tmp_path, CLASSIC)
    loaded = load(file, env={})
    assert loaded.config == PipelineConfig(
        chunk_tokens=128,
        tiers=(
            TierConfig(name="dram", capacity=GIB // 2, backend=CpuConfig()),
            TierConfig(name="disk", capacity=3 * GIB // 2, backend=GdsConfig(path=tmp_path / "kv")),
        ),
    )
    assert loaded.provenance["chunk_tokens"] == f"{file}:1"
    assert loaded.provenance["tiers[0].capacity"] == f"{file}:3"
    assert loaded.provenance["tiers[1].backend.path"] == f"{file}:4"
    assert loaded.provenance["tiers[1].write"] == "default"
    ignored = [note.split("`")[1] for note in loaded.notes]
    assert ignored == ["save_unfull_chunk", "enable_p2p", "nixl_role", "extra_config"]
    assert loaded.notes[0] == f"{file}:9: `save_unfull_chunk` is ignored: only whole chunks are stored"


def test_classic_variables_win_over_a_classic_file_and_stand_alone(tmp_path: Path) -> None:
    file = write(tmp_path, CLASSIC)
    env = {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.25", "LMCACHE_LOCAL_CPU": "False"}
    loaded = load(file, env=env)
    assert loaded.config.chunk_tokens == 64
    assert loaded.config.tiers[0].capacity == GIB // 4
    assert loaded.provenance["tiers[0].capacity"] == "env:LMCACHE_MAX_LOCAL_CPU_SIZE"
    assert any("`local_cpu: false` keeps a memory tier" in note for note in loaded.notes)
    alone = load(None, env=env)
    assert (alone.source, alone.config.chunk_tokens, len(alone.config.tiers)) == ("environment", 64, 1)
    assert load(None, env={**env, "LMCACHE__CHUNK_TOKENS": "32"}).config.chunk_tokens == 32, "overlays come last"


def test_classic_variables_beside_a_tiered_file_are_reported(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, TIERED), env={"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_NATIVE": "0"})
    assert loaded.config.chunk_tokens == 128
    assert len(loaded.notes) == 1
    assert loaded.notes[0].startswith("env:LMCACHE_CHUNK_SIZE: is ignored")


@pytest.mark.parametrize(
    "line, path, value, says",
    [
        ("chunk_size: abc", "chunk_size", "abc", "must be a whole number"),
        ("max_local_cpu_size: -3", "max_local_cpu_size", "-3", "must be a size in GiB"),
        ("max_local_cpu_size: lots", "max_local_cpu_size", "lots", "must be a size in GiB"),
        ("max_local_cpu_size: [1]", "max_local_cpu_size", "[...]", "must be a size in GiB"),
        ("max_local_cpu_size: 1e6", "max_local_cpu_size", "1000000.0", "can be allocated now"),
        ("max_local_cpu_siz: 3", "max_local_cpu_siz", "3", "did you mean `max_local_cpu_size`?"),
        ("local_cpu: perhaps", "local_cpu", "perhaps", "must be true or false"),
        ("local_disk: DIR/kv", "local_disk", "DIR/kv", "needs `max_local_disk_size`"),
        ("local_disk: true", "local_disk", "true", "must be a directory"),
        ("local_disk: /a,/b", "local_disk", "/a,/b", "several directories need a tier each"),
        ("cache_policy: S4-FIFO", "cache_policy", "S4-FIFO", "no eviction policy `s4-fifo` is installed"),
        ("remote_url: far://h", "remote_url", "far://h", "`pip install lmcache-backend-far`"),
        ("remote_url: host", "remote_url", "host", "must be a URL"),
        ("remote_url: fs://h:0/kv", "remote_url", "fs://h:0/kv", "`lmcachectl config from-lmcache FILE -o OUT`"),
        ("colour: red", "colour", "red", "unknown key"),
    ],
)
def test_classic_mistakes_name_the_classic_key(tmp_path: Path, line: str, path: str, value: str, says: str) -> None:
    rest = "" if line.startswith("max_local_cpu_size") else "max_local_cpu_size: 0.1\n"
    file = write(tmp_path, f"{line}\nsave_decode_cache: false\n{rest}")
    with pytest.raises(ConfigError) as error:
        load(file, env={})
    [problem] = error.value.problems
    assert (problem.where, problem.path) == (f"{file}:1:1", path)
    assert problem.value == value.replace("DIR", str(tmp_path))
    assert says in f"{problem.what} {problem.fix}"


def test_a_remote_url_reaches_its_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Distributions(tmp_path).backend("s3")
    loaded = load({"remote_url": "s3://bucket/kv", "remote_serde": "naive", "max_local_cpu_size": 0.1}, env={})
    backend = loaded.config.tiers[1].backend
    assert (backend.type, backend.url) == ("s3", "s3://bucket/kv")  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["redis", "valkey", "resp"])
def test_urls_of_redis_and_its_kin(scheme: str) -> None:
    loaded = load({"remote_url": f"{scheme}://host:6379", "max_local_cpu_size": 0.1}, env={})
    backend = loaded.config.tiers[1].backend
    assert (backend.type, backend.url) == ("redis", "redis://host:6379")  # type: ignore[attr-defined]
