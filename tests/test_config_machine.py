"""Memory as the container sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmcache_core.config import Loaded, load, machine
from lmcache_core.errors import ConfigError


def proc(directory: Path, cgroup: str) -> None:
    (directory / "proc/self").mkdir(parents=True)
    (directory / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    (directory / "proc/self/cgroup").write_text(cgroup)


def group(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_text(content)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cg")
    return tmp_path


def test_memory_without_a_cgroup(fake: Path) -> None:
    proc(fake, "")
    assert (machine.memory_total(), machine.memory_available()) == (1000 << 10, 800 << 10)


def test_memory_of_nested_version_2_groups(fake: Path) -> None:
    proc(fake, "0::/pod/box\n")
    inner = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "anon 5\n"}
    outer = {"memory.max": "500000\n", "memory.current": "300000\n", "memory.stat": "anon 1\ninactive_file 100000\n"}
    group(fake / "cg", {"memory.max": "max"})
    group(fake / "cg/pod", outer)
    group(fake / "cg/pod/box", inner)
    assert (machine.memory_total(), machine.memory_available()) == (500000, 300000)


def test_memory_of_a_version_1_group_seen_from_inside(fake: Path) -> None:
    proc(fake, "9:memory:/host/only/path\n2:cpu:/x\n0::/\n")
    files = {
        "memory.limit_in_bytes": "400000",
        "memory.usage_in_bytes": "390000",
        "memory.stat": "cache 1 total_inactive_file 90000",
    }
    group(fake / "cg/memory", files)
    assert (machine.memory_total(), machine.memory_available()) == (400000, 100000)


def test_a_group_without_a_limit_does_not_count(fake: Path) -> None:
    proc(fake, "9:memory:/x\n")
    files = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "1", "memory.stat": ""}
    group(fake / "cg/memory/x", files)
    assert machine.memory_total() == 1000 << 10


def test_a_budget_above_the_groups_limit_is_refused(fake: Path) -> None:
    proc(fake, "0::/\n")
    group(fake / "cg", {"memory.max": "500000", "memory.current": "100000", "memory.stat": ""})
    tier = {"name": "dram", "capacity": 450000, "backend": {"type": "cpu"}}
    with pytest.raises(ConfigError, match=r"439 KiB of memory are more than the 391 KiB"):
        load({"tiers": [tier]}, env={})
    assert isinstance(load({"tiers": [{**tier, "capacity": 390000}]}, env={}), Loaded)


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kv").mkdir(mode=0o700)
    tier: dict[str, Any] = {
        "name": "disk",
        "capacity": "1MiB",
        "backend": {"type": "gds", "path": str(tmp_path / "kv")},
    }
    tiers = [{"name": "dram", "capacity": "1MiB", "backend": {"type": "cpu"}}, tier]
    load({"tiers": tiers}, env={})
    # The tests may run as a user who may write everywhere.
    monkeypatch.setattr("lmcache_core.config.checks.os.access", lambda path, mode: path != tmp_path / "kv")
    with pytest.raises(ConfigError, match=rf"cannot write to `{tmp_path}/kv`") as error:
        load({"tiers": tiers}, env={})
    assert error.value.problems[0].path == "tiers[1].backend.path"
    load({"tiers": [tiers[0], {**tier, "write": "never"}]}, env={})
