"""kill -9 and power cuts against the disk backend. The long runs are in `faults/soak_crash.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.crash import MODES, Cuts, killpoints
from faults.disk import build, cannot_mount, disk, key_of, new_object

from lmcache_backends.gds import killpoint

SEED = int(os.environ.get("LMCACHE_TEST_SEED", "1"))
HERE = Path(__file__).parent
OBJECT = 20480

needs_mounts = pytest.mark.skipif(bool(cannot_mount()), reason=cannot_mount() or "mounts are possible")


def run_soak(*arguments: object) -> dict[str, int]:
    """Run the soak script in a process of its own (it forks); what it counted."""
    done = subprocess.run(
        [sys.executable, "-m", "faults.soak_crash", "--json", *map(str, arguments)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


@pytest.mark.slow
def test_a_thousand_kills(tmp_path: Path) -> None:
    """0 wrong bytes, what was acknowledged is there, what was deleted is not, and the books equal the disk's."""
    counts = run_soak("kills", "--cycles", 1000, "--seed", SEED, "--home", tmp_path)
    assert counts["cycles"] == 1000
    assert counts["verified"] > 20_000, counts
    for mode in MODES:
        for point in killpoints(mode):
            assert counts.get(point, 0) > 0, f"nobody died at {point}"


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("kind,options", [("ext4", ""), ("ext4", "nodelalloc,data=writeback"), ("xfs", "")])
def test_power_cuts(tmp_path: Path, kind: str, options: str) -> None:
    """Anything may be lost, nothing may be wrong; and torn objects must have been seen, else nothing was tested."""
    with disk(tmp_path, kind, options=options) as medium:
        cuts = Cuts(medium, SEED, stale_blocks="data=writeback" in options)
        for cycle in range(60):
            cuts.cycle(MODES[cycle % 2])
            if cycle >= 16 and cuts.counts["torn"] >= 20:
                break
    assert cuts.counts["torn"] >= 20, cuts.counts
    assert cuts.counts["alive"] > 0, cuts.counts


@needs_mounts
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("mode", MODES)
def test_what_was_cleared_stays_cleared_without_power(tmp_path: Path, mode: str, kind: str) -> None:
    with disk(tmp_path, kind) as medium:
        backend = build(medium.store, 8 << 20, OBJECT, mode=mode)
        numbers = range(20)
        stored = backend.put_from([key_of(n) for n in numbers], [new_object(n, 1, OBJECT - 4096) for n in numbers])
        assert stored == [None] * 20
        medium.sync()
        backend.clear()
        medium.shutdown()
        backend.close()
        del backend
        medium.unmount()
        medium.mount()
        for _ in range(2):
            backend = build(medium.store, 8 << 20, OBJECT, mode=mode)
            assert backend.contains([key_of(n) for n in numbers]) == [False] * 20
            assert list(backend.scan()) == []
            backend.close()
            (medium.store / "journal").unlink(missing_ok=True)  # and by the headers
        del backend


@needs_mounts
def test_the_power_cut_is_one(tmp_path: Path) -> None:
    """What was synced survives it, what was not is lost: else the tests above prove nothing."""
    with disk(tmp_path, "ext4", 64) as medium:
        (medium.store / "synced").write_bytes(b"there")
        medium.sync()
        (medium.store / "late").write_bytes(b"gone")
        medium.cut_power()
        assert [p.name for p in medium.store.iterdir()] == ["synced"]


def test_killpoints_do_nothing_unless_armed(tmp_path: Path) -> None:
    results = []
    for number, point in enumerate(("", "put.after_data", "put.after_data:2", "no.such.point")):
        script = f"from faults.disk import *; b = build(Path({str(tmp_path)!r}) / 'kv', 2 << 20, {OBJECT})\n"
        script += f"b.put_from([key_of({number})], [new_object({number}, 1, 100)]); print('alive')"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", killpoint.ENVIRONMENT: point},
            capture_output=True,
            text=True,
            check=False,
        )
        results.append((done.returncode, done.stdout.split()[-1:]))
    assert results == [(0, ["alive"]), (-9, []), (0, ["alive"]), (0, ["alive"])]
