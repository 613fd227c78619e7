"""Backends in a process of their own: the contract, and a medium, or a worker, that hangs or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from faults.disk import cannot_mount, disk
from media import served, store, tier
from pydantic import SecretStr

from lmcache_backends.gds import GdsConfig
from lmcache_core.config import LaneConfig
from lmcache_core.errors import BackendUnavailable, Closed, ConfigError, CorruptChunk, NoSpace
from lmcache_core.isolation import wire
from lmcache_core.isolation.mounts import network_file_system
from lmcache_core.isolation.storage import MOST_LEAKED, IsolatedStorage, memory_bytes
from lmcache_core.protocols import BackendConfig, BuildContext, StorageBackend
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.storage import OpenBackend, StorageBackendTests, key_of, new_object
from lmcache_core.types import ChunkKey, object_bytes, round_up

OBJECT = object_bytes(16 << 10)
SLACK = 1.0
"""Seconds that a busy machine may take on top of a deadline."""


def until(true: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for something that happens in another process."""
    end = monotonic() + seconds
    while not true():
        assert monotonic() < end, f"{what}: not within {seconds} s"
        sleep(0.01)


@pytest.mark.parametrize("mode", ["files", "segments"])
class TestContract(StorageBackendTests):
    """The conformance kit across the process boundary."""

    @pytest.fixture
    def open_backend(self, tmp_path: Path, mode: str) -> OpenBackend:
        def opened(context: BuildContext) -> StorageBackend:
            config = GdsConfig.model_validate(
                {"path": tmp_path / "kv", "mode": mode, "isolate": "always", "free_floor": 0}
            )
            backend = config.build(context)
            assert isinstance(backend, IsolatedStorage)
            return backend

        return opened


@pytest.fixture
def isolated(tmp_path: Path) -> Iterator[Callable[..., IsolatedStorage]]:
    """Build isolated file backends with a deadline of 0.5 s: `isolated(path=..., threads=2)`."""
    opened: list[IsolatedStorage] = []

    def make(path: Path = tmp_path / "kv", threads: int = 2, deadline: float = 0.5) -> IsolatedStorage:
        config = GdsConfig.model_validate({"path": path, "mode": "files", "isolate": "always", "free_floor": 0})
        backend = config.build(BuildContext("nfs", OBJECT, 64 << 20, threads, deadline=deadline))
        assert isinstance(backend, IsolatedStorage)
        opened.append(backend)
        return backend

    yield make
    for backend in opened:
        backend.close()


def objects(count: int) -> tuple[list[ChunkKey], list[memoryview]]:
    keys = [key_of(number) for number in range(count)]
    return keys, [new_object(key, OBJECT) for key in keys]


def read(backend: StorageBackend, keys: Sequence[ChunkKey]) -> tuple[list[Any], list[memoryview]]:
    buffers = [aligned(round_up(OBJECT), 0) for _ in keys]
    return backend.get_into(keys, buffers), buffers


def worker_of(backend: IsolatedStorage) -> int:
    worker = backend._worker
    assert worker is not None
    return worker.process.pid


def test_usage_is_that_of_the_latest_change(isolated: Callable[..., IsolatedStorage]) -> None:
    """Answers of one batch overtake each other: an earlier count that comes last says nothing."""
    backend = isolated(threads=4, deadline=5.0)
    keys, stored = objects(60)
    for count in range(2, 61, 2):
        some = [count - 2, count - 1, count - 2]  # the third need not be written: its count is an early one
        assert backend.put_from([keys[i] for i in some], [stored[i] for i in some]) == [None] * 3
        usage = backend.usage()
        assert usage is not None and (usage.objects, usage.object_bytes) == (count, count * OBJECT)


def test_a_stuck_worker_costs_its_callers_their_deadline_and_is_replaced(
    isolated: Callable[..., IsolatedStorage],
) -> None:
    backend = isolated()
    keys, stored = objects(6)
    assert backend.put_from(keys, stored) == [None] * 6
    os.kill(worker_of(backend), signal.SIGSTOP)
    begun = monotonic()
    results, buffers = read(backend, keys)
    assert monotonic() - begun < 0.5 + SLACK
    assert all(isinstance(result, BackendUnavailable) for result in results)
    assert "has not answered" in str(results[0])
    assert all(bytes(buffer) == bytes(len(buffer)) for buffer in buffers)
    # From now on nobody waits at all; the breaker of the core opens on these answers.
    begun = monotonic()
    assert isinstance(read(backend, keys)[0][0], BackendUnavailable)
    assert monotonic() - begun < 0.4
    until(lambda: read(backend, keys)[0] == [OBJECT] * 6, "a new worker")
    assert backend.restarts == 1
    results, buffers = read(backend, keys)
    assert [bytes(buffer[:OBJECT]) for buffer in buffers] == [bytes(obj) for obj in stored]


def test_a_late_answer_frees_its_thread_and_touches_nothing_else(isolated: Callable[..., IsolatedStorage]) -> None:
    backend = isolated(threads=4)
    keys, stored = objects(2)
    backend.put_from(keys, stored)
    pid = worker_of(backend)
    os.kill(pid, signal.SIGSTOP)
    late = aligned(round_up(OBJECT), 0)
    assert isinstance(backend.get_into(keys[:1], [late])[0], BackendUnavailable)
    os.kill(pid, signal.SIGCONT)
    until(lambda: read(backend, keys)[0] == [OBJECT] * 2, "the worker to go on")
    worker = backend._worker
    assert worker is not None
    until(lambda: bool(backend.contains(keys)) and len(worker.free) == len(worker.desks), "the late answer")
    # Whatever the late read brought went into shared memory only, and answers still belong to their requests.
    assert bytes(late) == bytes(len(late))
    _, buffers = read(backend, list(reversed(keys)))
    assert [bytes(buffer[:OBJECT]) for buffer in buffers] == [bytes(obj) for obj in reversed(stored)]
    assert (worker_of(backend), backend.restarts) == (pid, 0)


def test_a_late_answer_never_gives_one_place_to_two_calls(isolated: Callable[..., IsolatedStorage]) -> None:
    """It comes after the caller gave up, and before the caller has put the place back."""
    backend = isolated(threads=4)
    with backend._borrowed(monotonic() + 5) as (worker, desk):
        desk.send({"op": "contains", "keys": []}, monotonic() + 5)
        desk.stuck = True
        until(desk.recovered, "the answer")
        assert backend.contains([key_of(1)]) == [False]
        assert desk not in worker.free
    assert backend.contains([key_of(1)]) == [False]
    assert sorted(map(id, worker.free)) == sorted(map(id, worker.desks))


def test_a_worker_that_dies_is_replaced(isolated: Callable[..., IsolatedStorage]) -> None:
    backend = isolated()
    keys, stored = objects(3)
    backend.put_from(keys, stored)
    os.kill(worker_of(backend), signal.SIGKILL)
    until(lambda: read(backend, keys)[0] == [OBJECT] * 3, "a new worker")
    assert backend.restarts >= 1
    assert backend.contains([*keys, key_of(99)]) == [True, True, True, False]


def test_workers_the_kernel_cannot_end_are_counted_and_capped(
    isolated: Callable[..., IsolatedStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if SIGKILL did nothing, as in a process inside a dead mount."""
    backend = isolated(threads=1)
    keys, stored = objects(1)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: None)
    stuck: list[int] = []
    try:
        while len(stuck) < MOST_LEAKED:
            until(lambda: backend._worker is not None or isinstance(read(backend, keys)[0][0], Closed), "a worker")
            pid = worker_of(backend)
            os.kill(pid, signal.SIGSTOP)
            stuck.append(pid)
            until(lambda: isinstance(read(backend, keys)[0][0], Exception) and backend._worker is None, "to be lost")
            if len(stuck) < MOST_LEAKED:
                until(lambda: read(backend, keys)[0] == [None], "a new worker")
        refused = read(backend, keys)[0][0]
        assert f"{MOST_LEAKED} killed workers are still stuck" in str(refused)
        assert backend._worker is None and not backend._reviving
    finally:
        monkeypatch.undo()
        for pid in stuck:
            os.kill(pid, signal.SIGKILL)
    until(lambda: backend.put_from(keys, stored) == [None], "a worker after the stuck ones have gone")


@pytest.mark.skipif(bool(cannot_mount()), reason=str(cannot_mount()))
def test_a_file_system_that_hangs_for_good(isolated: Callable[..., IsolatedStorage], tmp_path: Path) -> None:
    """A frozen mount keeps writers in the kernel, where no signal reaches them."""
    with disk(tmp_path, "ext4") as broken:
        backend = isolated(path=broken.store)
        keys, stored = objects(8)
        assert backend.put_from(keys[:2], stored[:2]) == [None] * 2
        subprocess.run(["fsfreeze", "-f", str(broken.mnt)], check=True)
        try:
            pid = worker_of(backend)
            begun = monotonic()
            results = backend.put_from(keys[2:], stored[2:])
            assert monotonic() - begun < 0.5 + SLACK
            assert all(isinstance(result, BackendUnavailable) for result in results)
            until(lambda: isinstance(backend.put_from(keys[2:], stored[2:])[0], Exception) and not backend._worker, "")
            state = Path(f"/proc/{pid}/status").read_text()
            assert "State:\tD" in state or "State:\tZ" in state, f"the freeze did not hold the worker: {state[:200]}"
            begun = monotonic()
            backend.close()
            assert monotonic() - begun < 2
        finally:
            subprocess.run(["fsfreeze", "-u", str(broken.mnt)], check=True)
        until(lambda: not Path(f"/proc/{pid}/stat").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text(), "its end")
        again = isolated(path=broken.store)
        results, buffers = read(again, keys[:2])
        assert results == [OBJECT] * 2
        assert [bytes(buffer[:OBJECT]) for buffer in buffers] == [bytes(obj) for obj in stored[:2]]
        again.close()


def test_a_process_with_a_hung_tier_can_end(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from lmcache_backends.gds import GdsConfig
        from lmcache_core.protocols import BuildContext
        from lmcache_core.testing.storage import key_of
        config = GdsConfig(path=Path(sys.argv[1]), mode="files", isolate="always", free_floor=0)
        backend = config.build(BuildContext("nfs", 20480, 64 << 20, 2, deadline=0.2))
        print(backend._worker.process.pid, flush=True)
        os.kill(backend._worker.process.pid, signal.SIGSTOP)
        try:
            backend.contains([key_of(1)])
        except Exception as error:
            print(type(error).__name__, flush=True)
    """
    engine = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "kv")], stdout=subprocess.PIPE, text=True
    )
    assert engine.stdout is not None
    pid = int(engine.stdout.readline())
    try:
        assert engine.stdout.readline().strip() == "BackendUnavailable"
        assert engine.wait(2 + SLACK) == 0
    finally:
        engine.stdout.close()
        os.kill(pid, signal.SIGCONT)
    # Nobody asked it to: it found that the engine has gone.
    until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes(), "its end")


def test_a_pipeline_goes_on_without_its_hung_tier_and_with_it_again(
    pipelines: Any, keys: list[ChunkKey], tmp_path: Path, quick_breaker: None
) -> None:
    config = GdsConfig(path=tmp_path / "kv", mode="files", isolate="always", free_floor=0)
    slow = tier("nfs", backend=config, capacity=64 << 20, lane=LaneConfig(threads=1, deadline=0.5))
    pipeline = pipelines(slow, slots=8, staging=1 << 16)
    assert store(pipeline, keys[:4]) == 4
    assert pipeline.flush(30)
    backend = pipeline.tiers[0].backend
    assert isinstance(backend, IsolatedStorage)
    os.kill(worker_of(backend), signal.SIGSTOP)
    pipeline.clear("dram")
    begun = monotonic()
    assert served(pipeline, keys[:4], timeout=5.0) == 0
    assert monotonic() - begun < 0.5 + SLACK
    until(lambda: served(pipeline, keys[:4], timeout=5.0) == 4, "the tier to be back")


def test_memory_for_isolation_comes_out_of_the_budget(tmp_path: Path) -> None:
    context = BuildContext("nfs", OBJECT, 64 << 20, 6)
    assert GdsConfig(path=tmp_path, mode="files", isolate="always").memory_bytes(context) == memory_bytes(context)
    assert memory_bytes(context) == 6 * round_up(OBJECT)
    assert GdsConfig(path=tmp_path, mode="files", isolate="never").memory_bytes(context) == 0
    assert GdsConfig(path=tmp_path, mode="files").memory_bytes(context) == 0, "a local directory is not isolated"


def test_what_building_raises_comes_through(tmp_path: Path) -> None:
    config = GdsConfig(path=tmp_path / "kv", mode="files", isolate="always")
    with pytest.raises(ConfigError, match=r"tiers\.nfs\.capacity"):
        config.build(BuildContext("nfs", OBJECT, 1000, 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnavailable, match="is not a directory"):
        GdsConfig(path=tmp_path / "file", mode="files", isolate="always").build(BuildContext("n", OBJECT, 1 << 26, 2))


def test_after_close_every_call_says_so(isolated: Callable[..., IsolatedStorage]) -> None:
    backend = isolated()
    pid = worker_of(backend)
    backend.close()
    backend.close()
    assert not Path(f"/proc/{pid}/cmdline").exists()
    keys, stored = objects(1)
    with pytest.raises(Closed):
        backend.contains(keys)
    assert isinstance(backend.put_from(keys, stored)[0], Closed)


def test_calls_share_the_threads_there_are(isolated: Callable[..., IsolatedStorage]) -> None:
    """More callers than places: each gets its own bytes in the end."""
    backend = isolated(threads=2, deadline=20.0)
    keys, stored = objects(12)
    backend.put_from(keys, stored)
    wrong: list[object] = []

    def work(shift: int) -> None:
        for _ in range(5):
            some = keys[shift:] + keys[:shift]
            results, buffers = read(backend, some)
            for key, got, buffer in zip(some, results, buffers, strict=True):
                if got != OBJECT or bytes(buffer[:OBJECT]) != bytes(stored[keys.index(key)]):
                    wrong.append((key, got))

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "error",
    [
        NoSpace("full"),
        CorruptChunk("version", "9"),
        BackendUnavailable("gone"),
        Closed("closed"),
        OSError(5, "Input/output error"),
        ConfigError("capacity"),
    ],
)
def test_errors_keep_their_kind(error: Exception) -> None:
    back = wire.to_error(wire.from_error(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert getattr(back, "reason", None) == getattr(error, "reason", None)
    assert getattr(back, "errno", None) == getattr(error, "errno", None)


def test_other_errors_become_backend_errors_with_their_name() -> None:
    back = wire.to_error(wire.from_error(ZeroDivisionError("by zero")))
    assert (type(back).__name__, str(back)) == ("BackendError", "ZeroDivisionError: by zero")


def test_settings_cross_with_their_secrets() -> None:
    class Secretive(BackendConfig):
        type: str = "secretive"
        password: SecretStr = SecretStr("hunter2")
        path: Path = Path("/srv/kv")
        sizes: tuple[int, ...] = (1, 2)

        def build(self, context: BuildContext) -> StorageBackend:
            raise NotImplementedError

    assert wire.plain(Secretive()) == {
        "type": "secretive",
        "password": "hunter2",
        "path": "/srv/kv",
        "sizes": [1, 2],
    }


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
23 22 0:21 / /srv/nfs rw - nfs4 server:/export rw
24 23 0:22 / /srv/nfs/local\\040disk rw - xfs /dev/vdb rw
25 22 0:23 / /home/me/mnt rw - fuse.sshfs host: rw
26 22 0:24 / /srv/nfs rw - lustre again:/over rw
"""


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/var/cache", None),
        ("/srv/nfs", "lustre"),
        ("/srv/nfs/kv/deep", "lustre"),
        ("/srv/nfsd", None),
        ("/srv/nfs/../nfs/kv", "lustre"),
        ("/srv/nfs/local disk/kv", None),
        ("/home/me/mnt/kv", "fuse.sshfs"),
    ],
)
def test_network_file_systems_are_told_from_the_mount_table(tmp_path: Path, path: str, kind: str | None) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    assert network_file_system(Path(path), table) == kind


def test_without_a_mount_table_everything_is_local(tmp_path: Path) -> None:
    assert network_file_system(Path("/srv"), tmp_path / "none") is None
