"""The movers of the `gds` backend beside the host path: cuFile over a fake library, NIXL's POSIX plugin as it is."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import crash
from faults.disk import build, key_of, new_object, payload_of, read_version

from lmcache_backends.gds import GdsConfig, cufile, mover
from lmcache_backends.gds.backend import DiskBackend, SegmentBackend
from lmcache_backends.gds.cufile import CufileMover
from lmcache_backends.gds.folder import Folder
from lmcache_backends.gds.mover import Failure, Movement, Mover, MoverError, Piece
from lmcache_backends.gds.segments import SegmentVolume
from lmcache_backends.gds.transfer import Span
from lmcache_core import _native
from lmcache_core.cli import main
from lmcache_core.errors import BackendUnavailable, CorruptChunk
from lmcache_core.protocols import BuildContext, Region
from lmcache_core.testing.memory import aligned
from lmcache_core.testing.stateful import StorageStateMachineTests
from lmcache_core.testing.storage import OpenBackend
from lmcache_core.testing.wrappers import Forwarding
from lmcache_core.types import HEADER_BYTES, PAGE, ChunkKey, Got, Put, round_up

SEED = int(os.environ.get("LMCACHE_TEST_SEED", "1"))
HERE = Path(__file__).parent
PAYLOAD = 60 << 10
SLOT = round_up(HEADER_BYTES + PAYLOAD)
CAPACITY = 4 << 20
DEVICE = 1 << 56
"""Where the fake has device memory: the host's, shifted out of anybody's reach."""


class Fake(ctypes.Structure):
    """`fake` of faults/fake_cufile.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("most", "result", "after")),
        *((name, ctypes.c_int32) for name in ("error", "damage", "file_err", "memory_err", "cu_err", "open", "files")),
        *((name, ctypes.c_int32) for name in ("memories", "files_ever", "memories_ever")),
        *((name, ctypes.c_int64) for name in ("calls", "bytes", "through_memory")),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake libcufile, compiled."""
    out = tmp_path_factory.mktemp("cufile") / "libcufile.so"
    source = HERE / "faults" / "fake_cufile.cpp"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("CXX", "c++"), *options, source, "-o", out], check=True)
    return out


@pytest.fixture
def fake(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The fake is what the loader finds. In the end nothing of it may be in use."""
    monkeypatch.setattr(cufile, "candidates", lambda: iter([str(library)]))
    script = Fake.in_dll(ctypes.CDLL(str(library)), "fake")
    ctypes.memset(ctypes.byref(script), 0, ctypes.sizeof(script))
    yield script
    gc.collect()
    left = (script.open, script.files, script.memories)
    assert left == (0, 0, 0), f"drivers, files, memories still registered: {left}"


@pytest.fixture
def store(tmp_path: Path, fake: Any) -> Iterator[Callable[..., DiskBackend]]:
    """Open backends in `tmp_path/kv`, closed in the end."""
    opened: list[DiskBackend] = []

    def make(**options: object) -> DiskBackend:
        opened.append(build(tmp_path / "kv", CAPACITY, HEADER_BYTES + PAYLOAD, **options))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()


class Arena:
    """Registered memory cut into slots."""

    def __init__(self, backend: DiskBackend, slots: int = 8, device: int | None = None) -> None:
        self.memory = aligned(slots * SLOT)
        self.shift = DEVICE if device is not None else 0
        address = _native.address_of(self.memory)
        backend.register(Region(address + self.shift, slots * SLOT, self.memory, device=device))
        self._at = address

    def slot(self, i: int, nbytes: int = SLOT) -> memoryview:
        """As the core lends it: for device memory, a view on addresses nobody can touch."""
        if self.shift:
            return _native.view_at(self._at + self.shift + i * SLOT, nbytes)
        return self.memory[i * SLOT : i * SLOT + nbytes]

    def fill(self, i: int, number: int, version: int = 1) -> memoryview:
        """Put a sealed object into slot `i`; the buffer to store it from."""
        obj = new_object(number, version, PAYLOAD)
        self.memory[i * SLOT : i * SLOT + len(obj)] = obj
        return self.slot(i, len(obj))


def put(backend: DiskBackend, arena: Arena, *numbers: int) -> list[Put]:
    return backend.put_from([key_of(n) for n in numbers], [arena.fill(i, n) for i, n in enumerate(numbers)])


def get(backend: DiskBackend, arena: Arena, number: int) -> int | Exception | None:
    """The version found, verified."""
    arena.memory[:SLOT] = bytes(SLOT)
    return read_version(backend, number, arena.slot(0))


class Through(Forwarding):
    """Lends the backend registered memory only: copies from and to whatever the caller has."""

    def __init__(self, inner: DiskBackend, context: BuildContext) -> None:
        super().__init__(inner)
        self._slot = round_up(context.object_bytes)
        self._arenas: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(4):
            memory = aligned(8 * self._slot)
            inner.register(Region(_native.address_of(memory), len(memory), memory))
            self._arenas.put(memory)

    @contextlib.contextmanager
    def _slots(self) -> Iterator[list[memoryview]]:
        memory = self._arenas.get()
        try:
            yield [memory[i * self._slot : (i + 1) * self._slot] for i in range(8)]
        finally:
            self._arenas.put(memory)

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results: list[Got] = []
        for at in range(0, len(keys), 8):
            with self._slots() as slots:
                part = list(keys[at : at + 8])
                results += self.inner.get_into(part, slots[: len(part)])
                for got, slot, buffer in zip(results[at:], slots, buffers[at:], strict=False):
                    if isinstance(got, int):
                        buffer[:got] = slot[:got]
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results: list[Put] = []
        for at in range(0, len(keys), 8):
            with self._slots() as slots:
                part = buffers[at : at + 8]
                for slot, buffer in zip(slots, part, strict=False):
                    slot[: len(buffer)] = buffer
                sized = [slot[: len(buffer)] for slot, buffer in zip(slots, part, strict=False)]
                results += self.inner.put_from(keys[at : at + 8], sized)
        return results


# -- the contract ------------------------------------------------------------------------------------------------------
class TestContract(StorageStateMachineTests):
    """The storage kit through each mover: everything goes by it, nothing by the host path."""

    examples, steps = 2, 10

    @pytest.fixture(params=["cufile", "nixl"])
    def open_backend(self, request: pytest.FixtureRequest, tmp_path: Path, fake: Any) -> Iterator[OpenBackend]:
        opened: list[Through] = []

        def at(path: Path) -> OpenBackend:
            def make(context: BuildContext) -> Through:
                inner = GdsConfig(path=path, mover=request.param, free_floor="0B").build(context)
                assert isinstance(inner, SegmentBackend)
                opened.append(Through(inner, context))
                return opened[-1]

            return make

        self.other = at(tmp_path / "other")
        yield at(tmp_path / "tier")
        for backend in opened:
            stats = backend.stats()
            assert not stats["fallbacks"], stats
            backend.close()

    def elsewhere(self) -> OpenBackend:
        return self.other


@pytest.mark.parametrize("name", ["cufile", "nixl"])
def test_all_movers_write_the_same_store(store: Callable[..., DiskBackend], fake: Any, name: str) -> None:
    """What one wrote, the others read after a restart, by the journal and by the headers."""
    backend = store(mover=name)
    arena = Arena(backend)
    assert put(backend, arena, *range(8)) == [None] * 8
    assert backend.stats()["moved"] == 8
    for other in ("host", name):
        backend.close()
        backend = store(mover=other)
        arena = Arena(backend)
        assert [get(backend, arena, n) for n in range(8)] == [1] * 8
    assert backend.stats()["moved"] == 8 and not backend.stats()["fallbacks"]


class Anywhere(Movement):
    """Takes all memory for registered."""

    def __init__(self, make: Callable[[], Mover]) -> None:
        super().__init__("cufile", make)
        self._regions.append(Region(0, 0, memoryview(b"")))

    def _region_of(self, span: Span) -> Region:
        return Region(span.address, span.nbytes, memoryview(b""))


def test_killed_at_any_time(tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash suite's cycles with every transfer by the mover: what was acknowledged is there, nothing is wrong."""

    def open_store(options: crash.Options, path: Path) -> DiskBackend:
        plan, movement = options.plan(), Anywhere(CufileMover)
        return SegmentBackend(
            lambda device: SegmentVolume(Folder(path, device), plan, options.io, 0, movement),  # type: ignore[arg-type]
            plan.footprint,
            movement=movement,
        )

    monkeypatch.setattr(crash.Options, "open", open_store)
    cufile.probe(cufile.load())  # once, before the children are forked
    crashes = crash.Crashes(tmp_path, SEED)
    for cycle in range(40):
        crashes.cycle("segments", "put.after_data" if cycle % 4 == 3 else "")
    assert crashes.counts["put.after_data"] > 3 and crashes.counts["verified"] > 400, crashes.counts


def test_a_whole_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`lmcachectl check` writes through a pipeline, and says what moved it."""
    file = tmp_path / "cache.yaml"
    file.write_text(
        f"""chunk_tokens: 16
tiers:
  - {{name: dram, capacity: 8MiB, backend: {{type: cpu}}}}
  - {{name: disk, capacity: 8MiB, backend: {{type: gds, path: {tmp_path / "kv"}, mover: nixl, free_floor: 0B}}}}
"""
    )
    assert main(["check", str(file)]) == 0
    assert "written, read, verified, deleted, mover: NIXL: plugin POSIX" in capsys.readouterr().out


# -- cuFile: registration and transfers --------------------------------------------------------------------------------
def test_files_and_memory_are_registered_once(store: Callable[..., DiskBackend], fake: Any) -> None:
    backend = store(mover="cufile", segment_bytes=PAGE + 4 * SLOT)
    arena = Arena(backend)
    for first in range(0, 16, 4):
        assert put(backend, arena, *range(first, first + 4)) == [None] * 4
    assert [get(backend, arena, n) for n in range(16)] == [1] * 16
    assert (fake.files_ever, fake.memories_ever, fake.open) == (4, 1, 1)
    assert fake.calls == fake.through_memory == 32 and fake.bytes == 32 * SLOT
    stats = backend.stats()
    assert stats == {"mover": "cuFile: nvidia-fs 2.20", "moved": 32, "fallbacks": {}}
    backend.clear()
    gc.collect()
    assert fake.files == 0, "a segment that was removed is still registered"
    backend.close()
    assert (fake.open, fake.memories) == (0, 0)


def test_two_tiers_share_driver_and_memory(tmp_path: Path, fake: Any) -> None:
    """The second finds the memory registered; the driver stays open until both are closed."""
    first, second = (build(tmp_path / name, CAPACITY, HEADER_BYTES + PAYLOAD, mover="cufile") for name in "ab")
    arena = Arena(first)
    second.register(Region(_native.address_of(arena.memory), len(arena.memory), arena.memory))
    assert put(first, arena, 1) == put(second, arena, 1) == [None]
    assert (fake.open, fake.memories_ever) == (1, 1)
    first.close()
    assert get(second, arena, 1) == 1 and second.stats()["moved"] == 2 and fake.open == 1
    second.close()


def test_short_transfers_are_continued(store: Callable[..., DiskBackend], fake: Any) -> None:
    backend = store(mover="cufile")
    arena = Arena(backend)
    fake.most = 3 * PAGE
    assert put(backend, arena, 1, 2) == [None, None]
    assert [get(backend, arena, n) for n in (1, 2)] == [1, 1]
    assert fake.calls == 4 * -(-SLOT // (3 * PAGE)) and backend.stats()["moved"] == 4
    fake.most = PAGE + 512  # ends inside a page: never continued there
    assert get(backend, arena, 2) == 1
    assert backend.stats()["fallbacks"] == {"cuFileRead: a transfer that ended too early, too late or inside a page": 1}


@pytest.mark.parametrize(
    "result,error,said",
    [
        (-1, errno.EIO, "Input/output error"),
        (-5008, 0, "CU_FILE_IO_NOT_SUPPORTED (5008)"),
        (-5099, 0, "error 5099"),
        (-errno.EINVAL, 0, "Invalid argument"),
        (1 << 63, 0, None),
        (SLOT + 1, 0, "too late"),
        (0, 0, "too early"),
    ],
)
def test_errors_are_told_and_the_host_path_takes_over(
    store: Callable[..., DiskBackend], fake: Any, result: int, error: int, said: str | None
) -> None:
    backend = store(mover="cufile")
    arena = Arena(backend)
    assert put(backend, arena, 1) == [None]
    if said == "too early":
        fake.most, fake.result = PAGE, SLOT + 1  # a page, then more than there is
    else:
        fake.result, fake.error = ctypes.c_int64(result).value, error
    assert put(backend, arena, 2) == [None]
    assert [get(backend, arena, n) for n in (1, 2)] == [1, 1]
    fallbacks = backend.stats()["fallbacks"]
    assert sum(fallbacks.values()) == 3 and len(fallbacks) == 2, fallbacks
    assert {text.split(":")[0] for text in fallbacks} == {"cuFileWrite", "cuFileRead"}
    assert all((said or "") in text or said == "too early" for text in fallbacks), fallbacks


def test_after_failures_in_a_row_it_is_not_tried_again(store: Callable[..., DiskBackend], fake: Any) -> None:
    backend = store(mover="cufile")
    arena = Arena(backend)
    assert put(backend, arena, 1) == [None]
    fake.result = -5010
    for _ in range(mover.FAILURES - 1):
        assert get(backend, arena, 1) == 1
    fake.result = 0
    assert get(backend, arena, 1) == 1, "one that works in between counts the others as past"
    fake.result = -5010
    for _ in range(mover.FAILURES):
        assert get(backend, arena, 1) == 1
    assert fake.open == fake.files == fake.memories == 0, "what is not used any more is still registered"
    calls, stats = fake.calls, backend.stats()
    assert stats["mover"].startswith(
        "host path, because cuFile failed 5 times in a row, last: cuFileRead: CU_FILE_NVFS"
    )
    assert get(backend, arena, 1) == 1 and put(backend, arena, 2) == [None]
    assert fake.calls == calls and backend.stats()["moved"] == stats["moved"]


def test_what_cannot_be_registered_is_used_without(store: Callable[..., DiskBackend], fake: Any) -> None:
    backend = store(mover="cufile")
    fake.memory_err, fake.cu_err = 5036, 2
    arena = Arena(backend)
    assert put(backend, arena, 1) == [None] and get(backend, arena, 1) == 1
    assert fake.calls == 2 and fake.through_memory == 0 and backend.stats()["moved"] == 2
    [reason] = backend.stats()["fallbacks"]
    assert "CU_FILE_GPU_MEMORY_PINNING_FAILED (5036)" in reason and "(2)" in reason

    fake.memory_err, fake.file_err, fake.cu_err = 0, 5019, 0
    backend.close()
    backend = store(mover="cufile")
    arena = Arena(backend)
    assert get(backend, arena, 1) == 1
    assert backend.stats()["fallbacks"] == {"cuFileHandleRegister: CU_FILE_INVALID_FILE_OPEN_FLAG (5019)": 1}


def test_memory_from_elsewhere_takes_the_host_path(store: Callable[..., DiskBackend], fake: Any) -> None:
    backend = store(mover="cufile")
    arena = Arena(backend)
    assert backend.put_from([key_of(1)], [new_object(1, 1, PAYLOAD)]) == [None]
    assert get(backend, arena, 1) == 1
    assert fake.calls == 1 and not backend.stats()["fallbacks"]


def test_wrong_bytes_are_detected(store: Callable[..., DiskBackend], fake: Any) -> None:
    backend = store(mover="cufile")
    arena = Arena(backend)
    assert put(backend, arena, 1) == [None]
    fake.damage = 1
    assert isinstance(get(backend, arena, 1), CorruptChunk)
    assert put(backend, arena, 2) == [None]
    fake.damage = 0
    assert get(backend, arena, 1) == 1
    assert isinstance(get(backend, arena, 2), CorruptChunk)


def test_device_memory(store: Callable[..., DiskBackend], fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` starts cuFile for it, in the device's context on each thread; what then fails is an error, not a crash."""
    current: list[tuple[int, int]] = []
    monkeypatch.setattr(cufile, "_primary_context", ctypes.c_void_p)
    monkeypatch.setattr(cufile, "_drive", lambda name, *_: current.append((threading.get_ident(), len(name))))
    backend = store()
    assert backend.stats() == {} and fake.open == 0
    host, device = Arena(backend), Arena(backend, device=0)
    assert backend.stats()["mover"] == "cuFile: nvidia-fs 2.20"
    assert put(backend, device, 1, 2) == [None, None] and fake.calls == fake.through_memory == 2
    assert get(backend, host, 1) == 1 and fake.calls == 2, "host memory takes the host path"
    device.memory[:SLOT] = bytes(SLOT)
    outcome: list[Got] = []
    reader = threading.Thread(target=lambda: outcome.extend(backend.get_into([key_of(2)], [device.slot(0)])))
    reader.start()
    reader.join()
    assert outcome == [HEADER_BYTES + PAYLOAD]
    assert bytes(device.memory[HEADER_BYTES : HEADER_BYTES + PAYLOAD]) == payload_of(2, 1, PAYLOAD).tobytes()
    assert len({thread for thread, _ in current}) == 2
    fake.result = -5044
    [error] = backend.get_into([key_of(2)], [device.slot(0)])
    assert isinstance(error, OSError) and error.errno == errno.EFAULT


@pytest.mark.parametrize("name", ["auto", "nixl"])
def test_device_memory_without_a_driver(
    store: Callable[..., DiskBackend], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cufile, "candidates", lambda: iter(()))
    backend = store(mover=name)
    arena = Arena(backend, device=0)
    [error] = put(backend, arena, 1)
    assert isinstance(error, OSError) and error.errno == errno.EFAULT
    stats = backend.stats()
    why = stats["mover"] if name == "auto" else next(iter(stats["fallbacks"]))
    assert why.removeprefix("host path, because ").startswith("cuFile cannot be loaded"), stats
    assert stats["moved"] == 0


def read_bytes(path: Path) -> bytes:
    """Empty where the file is gone by now."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


# -- cuFile: the driver ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "told,said",
    [
        ("hang", "has not ended within 0.3 s"),
        ("crash", "ended the process that tried it (exit -11)"),
        ("5001", "cuFileDriverOpen: CU_FILE_DRIVER_NOT_INITIALIZED (5001)"),
        ("5011/100", "cuFileDriverOpen: CU_FILE_CUDA_DRIVER_ERROR (5011), "),
    ],
)
def test_the_driver_is_tried_in_another_process(
    store: Callable[..., DiskBackend],
    fake: Any,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: str,
    said: str,
) -> None:
    """Named, an unusable driver is an error in time; nothing of it was opened in this process, and it is tried once."""
    monkeypatch.setenv("FAKE_CUFILE_OPEN", told)
    monkeypatch.setattr(cufile, "PROBE_S", 0.3 if told == "hang" else 60.0)
    cufile._verdict.cache_clear()
    try:
        begun = time.monotonic()
        with pytest.raises(BackendUnavailable, match="mover `cufile` cannot be used") as caught:
            store(mover="cufile")
        assert said in str(caught.value)
        assert told != "hang" or time.monotonic() - begun < 5.0
        with pytest.raises(BackendUnavailable):
            store(mover="cufile")
        assert cufile._verdict.cache_info().misses == 1 and fake.open == 0
        left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if os.fsencode(library) in read_bytes(p)]
        assert not left, f"a process that tries the driver is left: {left}"
    finally:
        cufile._verdict.cache_clear()


def test_the_real_library_is_survived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NVIDIA's own: without a GPU its driver refuses, or spins for ever where /proc/modules is missing."""
    monkeypatch.setattr(cufile, "PROBE_S", 0.5)
    if not any(Path(name).is_file() for name in cufile.candidates()):
        pytest.fail("nvidia-cufile is not installed: make install")
    api = cufile.load()
    assert Path(api.path).name.startswith("libcufile.so")
    with contextlib.suppress(MoverError):  # with a GPU it may work
        cufile.probe(api)
    _, why_not = cufile._verdict(api.path, cufile.PROBE_S)
    cufile._verdict.cache_clear()
    assert not why_not or why_not.startswith(("cuFileDriverOpen: CU_FILE_", "opening its driver has not ended"))


def test_over_cufile_python_itself(tmp_path: Path, library: Path) -> None:
    """With a `libcufile.so` on the loader's path cufile-python imports, and its library is the one in use."""
    script = f"""
import json, sys
from pathlib import Path
from lmcache_backends.gds import GdsConfig
from lmcache_core.protocols import BuildContext, Region
assert not {{"torch", "cufile", "nixl", "nixl_cu13"}} & sys.modules.keys()
from lmcache_core import _native
from lmcache_core.testing.memory import aligned
context = BuildContext(tier="disk", object_bytes={SLOT}, capacity={CAPACITY}, threads=2)
backend = GdsConfig(path=Path({str(tmp_path / "kv")!r}), mover="cufile", free_floor=0).build(context)
memory = aligned({SLOT})
backend.register(Region(_native.address_of(memory), len(memory), memory))
assert backend.put_from([b"k" * 32], [memory]) == [None]
import cufile.bindings as theirs
assert theirs.CUfileDescr.handle.offset == 8 and theirs.CUfileDescr.fs_ops.offset == 16
assert "torch" not in sys.modules
print(json.dumps(backend.stats()))
backend.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_LIBRARY_PATH": str(library.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"mover": "cuFile: nvidia-fs 2.20", "moved": 1, "fallbacks": {}}


@pytest.mark.parametrize(
    "options,said",
    [
        ({"mover": "cufile", "mode": "files"}, "mover `cufile` is for files that stay open"),
        ({"mover": "nixl", "isolate": "always"}, "mover `nixl` needs the engine's own memory"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GdsConfig(path=tmp_path, **options)


# -- NIXL, and whatever loses track of its I/O ------------------------------------------------------------------------
def test_a_failed_nixl_transfer_ends_it(store: Callable[..., DiskBackend], fake: Any, tmp_path: Path) -> None:
    """A file cut short under it: what is left of the objects is read by the host path."""
    backend = store(mover="nixl")
    arena = Arena(backend)
    assert put(backend, arena, 1, 2, 3) == [None] * 3
    agent = weakref.ref(backend._movement._mover._agent.agent)  # type: ignore[union-attr, attr-defined]
    [segment] = (tmp_path / "kv").glob("segment-*")
    os.truncate(segment, PAGE + 2 * SLOT + PAGE)
    assert [get(backend, arena, n) for n in (1, 2)] == [1, 1]
    gc.disable()
    try:
        assert isinstance(get(backend, arena, 3), CorruptChunk)
        assert agent() is None, "the agent, which may still be writing, outlives the call"
    finally:
        gc.enable()
    stats = backend.stats()
    assert stats["mover"].startswith("host path, because NIXL was lost: NIXL: a transfer by POSIX"), stats
    assert stats["moved"] == 5 and sum(stats["fallbacks"].values()) == 1
    assert get(backend, arena, 1) == 1 and backend.stats()["moved"] == 5


class Losing(Mover):
    """Writes late: its transfers fail, and only closing it ends them."""

    name = "losing"

    def __init__(self) -> None:
        self.under_way = threading.Semaphore(0)
        self.go = threading.Event()
        self.closed = False
        self.lose = True

    def start(self) -> str:
        return "test"

    def register(self, region: Region) -> None: ...

    def open(self, fd: int) -> int:
        return fd

    def shut(self, file: int) -> None:
        assert not self.closed

    def move(self, pieces: Sequence[Piece], *, write: bool) -> list[Failure | None]:
        if self.lose:
            return [Failure("no idea", lost=True)] * len(pieces)
        self.under_way.release()
        assert self.go.wait(30)
        return [Failure("nothing moved")] * len(pieces)

    def close(self) -> None:
        self.closed = True


def test_memory_is_kept_until_a_lost_mover_is_closed(
    store: Callable[..., DiskBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose I/O may still be under way does not return while others use the mover, so that it stays open."""
    losing = Losing()
    monkeypatch.setitem(sys.modules["lmcache_backends.gds"]._MOVERS, "nixl", lambda: losing)
    backend = store(mover="nixl")
    assert backend.put_from([key_of(1)], [new_object(1, 1, PAYLOAD)]) == [None]
    slow, fast = Arena(backend), Arena(backend)
    losing.lose = False
    versions: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()

    def read(name: str, arena: Arena) -> None:
        versions.put((name, get(backend, arena, 1)))

    threads = [threading.Thread(target=read, args=pair) for pair in (("slow", slow), ("fast", fast))]
    threads[0].start()
    assert losing.under_way.acquire(timeout=30)
    losing.lose = True
    threads[1].start()
    with pytest.raises(queue.Empty):
        versions.get(timeout=0.2)
    assert not losing.closed
    losing.go.set()
    for thread in threads:
        thread.join(30)
    assert losing.closed
    assert sorted(versions.get() for _ in threads) == [("fast", 1), ("slow", 1)]
    assert backend.stats()["mover"] == "host path, because losing was lost: no idea"
