"""The memory budget, checked by the kernel: baseline + budget + 64 MiB is enough whatever is asked, and one slot more
of arena than promised would not be hidden by that slack for long: twice the arena is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(120), pytest.mark.hardware]

CHILD = Path(__file__).with_name("memory_budget_child.py")
MIB = 1 << 20
BUDGET = 160 * MIB
SECONDS = 2.5


def _parents() -> Iterator[Path]:
    """Directories in which a memory cgroup may be made: below our own, else below the root of the controller."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from (Path("/sys/fs/cgroup/memory") / path.lstrip("/"), Path("/sys/fs/cgroup/memory"))
        elif not controllers:
            for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
                yield from (root / path.lstrip("/"), root)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of our own. Skips where none can be made."""
    tried = []
    for parent in _parents():
        made = parent / f"lmcache-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            continue
        if (made / "memory.limit_in_bytes").exists() or (made / "memory.max").exists():
            try:
                yield made
            finally:
                made.rmdir()
            return
        made.rmdir()
        tried.append(f"{parent}: no memory controller")
    pytest.skip(f"no memory cgroup can be made here: {'; '.join(tried) or 'no cgroup file system'}")


def run(cgroup: Path, directory: Path, chunk_tokens: int, factor: float) -> subprocess.CompletedProcess[str]:
    """The child, in the cgroup from its first instruction on."""
    arguments = [str(cgroup), str(chunk_tokens), str(BUDGET), str(factor), str(directory), str(SECONDS)]
    enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    command = ["/bin/sh", "-c", enter, str(cgroup), sys.executable, str(CHILD), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.parametrize("chunk_tokens", [17, 12_001], ids=["17 KiB", "11.7 MiB"])
def test_the_budget_holds_under_adversarial_load(cgroup: Path, tmp_path: Path, chunk_tokens: int) -> None:
    child = run(cgroup, tmp_path, chunk_tokens, 1.0)
    assert child.returncode == 0, f"ended with {child.returncode} (-9 is the OOM killer): {child.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(child.stdout)
    assert found["peak"] <= found["limit"]
    # The limit was no formality: the arena lies within it, and the load used everything.
    assert found["peak"] >= found["baseline"] + 0.9 * BUDGET
    assert found["users"] == 4 and found["served"] > 0 and found["evicted"] > 0
    assert found["hits"]["dram"] and found["hits"]["near"]
    print(f"{found['used'] - found['baseline'] - BUDGET >> 10} KiB beyond the budget at the end: {found}")


def test_a_cache_that_cheats_is_killed(cgroup: Path, tmp_path: Path) -> None:
    """The same load with twice the arena: the check above can fail."""
    child = run(cgroup, tmp_path, 257, 2.0)
    assert child.returncode == -signal.SIGKILL, (child.returncode, child.stdout, child.stderr[-2000:])
