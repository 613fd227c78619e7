"""kill -9 and power cuts against the disk backend, with an expected-state file that survives both.

A cycle: a forked child opens the store (recovery), reads every key back and compares it with what may be there, then
stores, reads, deletes, clears and reopens at random until it is killed: from outside after a random time, or by
itself at a named point. Every cycle draws new options. The parent stays warm, so a cycle costs tens of milliseconds.

`kill -9` leaves the page cache alone, so more is demanded than "exact or miss": what was acknowledged is there,
what was deleted is not, and nothing is corrupt. After a power cut anything may be lost, but nothing may be wrong.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import select
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from faults.disk import Disk, du, key_of, open_object, put_object, size_of

from lmcache_backends.gds import journal, killpoint
from lmcache_backends.gds.backend import DiskBackend, FileBackend, SegmentBackend
from lmcache_backends.gds.files import FileVolume, file_footprint
from lmcache_backends.gds.folder import Folder
from lmcache_backends.gds.geometry import Geometry
from lmcache_backends.gds.segments import SegmentVolume
from lmcache_core.errors import CorruptChunk, NoSpace
from lmcache_core.testing.memory import aligned
from lmcache_core.types import HEADER_BYTES, PAGE, round_up

KEYS = 48
LARGEST = 24 << 10
"""Payload bytes of the largest object."""
SLOT = round_up(HEADER_BYTES + LARGEST)
MODES = ("segments", "files")
_PUT, _DELETE = 1, 2
_FAILED, _SURVIVED = 3, 4


def killpoints(mode: str) -> list[str]:
    """Every named point of that mode, from the sources."""
    home = Path(killpoint.__file__).parent
    sources = ["files.py"] if mode == "files" else ["segments.py", "journal.py"]
    names = {name for f in sources for name in re.findall(r'killpoint\("([a-z_.]+)"\)', (home / f).read_text())}
    return sorted(names)


class Expected:
    """What each key may hold, in a shared mapping of 32-bit words: each is written at once, whoever dies."""

    def __init__(self) -> None:
        columns = 6
        words = memoryview(mmap.mmap(-1, 4 * columns * KEYS + 65536))
        table = words[: 4 * columns * KEYS].cast("I")
        rows = [table[i * KEYS : (i + 1) * KEYS] for i in range(columns)]
        self.held, self.pending, self.coming, self.latest, self.cleared, self._flags = rows
        self._text = words[4 * columns * KEYS :]

    def put(self, key: int) -> int:
        """Announce a put; the version to store."""
        version = self.latest[key] + 1
        self.latest[key] = version
        self.coming[key] = version
        self.pending[key] = _PUT
        return version

    def allowed(self, key: int) -> set[int]:
        """Versions the key may hold now, 0 for none."""
        after = {_PUT: self.coming[key], _DELETE: 0}
        return {self.held[key], after.get(self.pending[key], self.held[key])}

    @property
    def verified(self) -> bool:
        """Whether the last child came as far as knowing what each key holds."""
        return bool(self._flags[0])

    @verified.setter
    def verified(self, value: bool) -> None:
        self._flags[0] = value

    def settle(self, key: int, version: int) -> None:
        """The key holds `version` (0 for none) and nothing is pending."""
        self.held[key] = version
        self.pending[key] = 0

    def report(self, text: str) -> None:
        """Leave a message for the parent."""
        data = text.encode()[-60000:]
        self._text[: len(data) + 1] = data + b"\0"

    @property
    def message(self) -> str:
        return bytes(self._text).split(b"\0", 1)[0].decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Options:
    """How the store is opened in one cycle."""

    mode: str
    capacity: int
    io: str
    segment_slots: int
    largest: int
    journal_factor: int
    threads: int

    @classmethod
    def draw(cls, rng: random.Random, mode: str) -> Options:
        return cls(
            mode=mode,
            capacity=rng.choice((24, 32, 64)) * SLOT + (1 << 20),
            io=rng.choice(("auto", "buffered")),
            segment_slots=rng.choice((1, 3, 8)),
            largest=rng.choice((LARGEST, LARGEST, LARGEST // 2)),
            journal_factor=rng.choice((2, 2, 5)),
            threads=rng.choice((1, 2)),
        )

    def plan(self) -> Geometry:
        """With journals short enough to be compacted often."""
        slot = round_up(HEADER_BYTES + self.largest)
        records = self.journal_factor * (self.capacity // round_up(slot // 8)) + 64
        return Geometry.plan(self.capacity, HEADER_BYTES + self.largest, PAGE + self.segment_slots * slot, records)

    def room(self) -> int:
        """Bytes the store has for objects: when they become fewer, some are dropped at the next start."""
        return self.capacity - (self.plan().overhead if self.mode == "segments" else 0)

    def journal_bytes(self) -> int:
        """Size of the journal."""
        return journal.file_bytes(self.plan().journal_records)

    def open(self, path: Path) -> DiskBackend:
        """The backend."""
        if self.mode == "files":
            return FileBackend(
                lambda device: FileVolume(Folder(path, device), self.capacity, 1000, self.io, 0), file_footprint
            )
        plan = self.plan()
        return SegmentBackend(lambda device: SegmentVolume(Folder(path, device), plan, self.io, 0), plan.footprint)


class Worker:
    """What a child does with the store."""

    def __init__(self, path: Path, expected: Expected, options: Options, seed: int, favour: str = "") -> None:
        """`favour` is a named point that would otherwise hardly be met: what leads there is done more often."""
        self.favour = favour
        self.path = path
        self.expected = expected
        self.options = options
        self.rng = random.Random(seed)
        self.buffers = aligned(8 * SLOT)
        self.backend = options.open(path)
        self.torn = 0

    def verify(self, *, lossy: bool, torn_is_fine: bool, clear_lasts: bool = True) -> None:
        """Read every key. Raise `AssertionError` for anything that may not be."""
        present = 0
        for key in range(KEYS):
            version, torn = self.look(key)
            assert torn_is_fine or not torn, f"key {key} after kill -9: {torn}"
            if torn_is_fine:
                assert version <= self.expected.latest[key], f"key {key} holds version {version} of the future"
            else:
                allowed = self.expected.allowed(key) | ({0} if lossy else set())
                assert version in allowed, f"key {key} holds version {version}, allowed are {allowed}"
            cleared = self.expected.cleared[key]
            assert not clear_lasts or not version or version > cleared, (
                f"key {key} holds version {version}, cleared were all to {cleared}"
            )
            self.expected.settle(key, version)
            present += bool(version)
        self.check_books(present)
        self.expected.verified = True

    def look(self, key: int) -> tuple[int, str]:
        """The version a key holds, 0 for none, and what is wrong with it; then it is deleted, as the core does."""
        buffer = self.buffers[:SLOT]
        got = self.backend.get_into([key_of(key)], [buffer])[0]
        try:
            if isinstance(got, Exception):
                raise got
            return (0 if got is None else open_object(buffer[:got], key)), ""
        except CorruptChunk as error:
            self.torn += 1
            self.backend.delete([key_of(key)])
            return 0, str(error)

    def check_books(self, present: int) -> None:
        """The backend's books, the disk's and ours must agree."""
        usage = self.backend.usage()
        assert usage is not None
        assert usage.objects == present, f"{usage.objects} objects in the books, {present} found"
        on_disk = du(self.path)
        assert usage.allocated_bytes == on_disk, f"{usage.allocated_bytes} bytes in the books, {on_disk} on the disk"
        assert on_disk <= self.options.capacity, f"{on_disk} bytes on the disk, capacity {self.options.capacity}"
        litter = [p.name for p in self.path.rglob("*") if p.suffix == ".tmp" or p.parent.name == "tmp"]
        assert not litter, f"temporary files left: {litter}"

    def run(self, steps: int | None = None) -> None:
        """Random operations, for ever or for so many steps; threads share the keys out between them."""
        if self.options.threads == 1:
            self._work(range(KEYS), self.rng, self.buffers, steps, alone=True)
            return

        def work(part: int) -> None:
            try:
                self._work(range(part, KEYS, 2), random.Random(self.rng.random()), aligned(8 * SLOT), steps)
            except BaseException:
                self.expected.report(traceback.format_exc())
                os._exit(_FAILED)

        threads = [threading.Thread(target=work, args=(part,), daemon=True) for part in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(
        self, keys: range, rng: random.Random, buffers: memoryview, steps: int | None, *, alone: bool = False
    ) -> None:
        while steps is None or steps > 0:
            steps = None if steps is None else steps - 1
            draw = rng.random()
            if self.favour.startswith("clear") and alone and draw < 0.2:
                self._clear()
            elif self.favour.endswith("reassign") and draw < 0.2:
                self._delete(list(keys))  # leaves segments empty, and what comes next has other sizes
            elif draw < 0.5:
                self._put(rng.sample(keys, rng.randint(1, 6)), buffers)
            elif draw < 0.75:
                self._get(rng.sample(keys, rng.randint(1, 6)), buffers)
            elif draw < 0.97 or not alone:
                self._delete(rng.sample(keys, rng.randint(1, 4)))
            elif draw < 0.985:
                self._clear()
            else:
                self.backend.close()
                self.backend = self.options.open(self.path)

    def _put(self, keys: list[int], buffers: memoryview) -> None:
        expected = self.expected
        objects, versions = [], []
        for i, key in enumerate(keys):
            # A key that is present is stored again as it is: content-addressed, and nobody may notice.
            version = expected.held[key] or expected.put(key)
            nbytes = size_of(key, version, LARGEST)
            objects.append(put_object(buffers[i * SLOT : (i + 1) * SLOT], key, version, nbytes))
            versions.append(version)
        results = self.backend.put_from([key_of(key) for key in keys], objects)
        for key, version, result in zip(keys, versions, results, strict=True):
            if result is None:
                expected.held[key] = version
            else:
                # Halved objects refuse the larger ones.
                assert isinstance(result, NoSpace | ValueError), repr(result)
            expected.pending[key] = 0
        if any(isinstance(result, NoSpace) for result in results):
            self._delete(random.Random(versions[0]).sample(range(keys[0] % 2, KEYS, 2), 6))

    def _get(self, keys: list[int], buffers: memoryview) -> None:
        views = [buffers[i * SLOT : (i + 1) * SLOT] for i in range(len(keys))]
        for key, view, got in zip(keys, views, self.backend.get_into([key_of(k) for k in keys], views), strict=True):
            held = self.expected.held[key]
            version = open_object(view[:got], key) if isinstance(got, int) else 0
            assert got is None or isinstance(got, int), repr(got)
            assert version == held, f"key {key} holds version {version}, stored was {held}"

    def _delete(self, keys: list[int]) -> None:
        for key in keys:
            self.expected.pending[key] = _DELETE
        self.backend.delete([key_of(key) for key in keys])
        for key in keys:
            self.expected.settle(key, 0)

    def _clear(self) -> None:
        for key in range(KEYS):
            self.expected.pending[key] = _DELETE
        self.backend.clear()
        for key in range(KEYS):
            self.expected.cleared[key] = self.expected.latest[key]
            self.expected.settle(key, 0)


class Crashes:
    """Cycles of one store in each mode."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home = home
        self.rng = random.Random(seed)
        self.expected = {mode: Expected() for mode in MODES}
        self.counts: Counter[str] = Counter()
        self._room = dict.fromkeys(MODES, 0)
        self._journal = dict.fromkeys(MODES, 0)
        self._lossy = dict.fromkeys(MODES, False)
        self._rumours = dict.fromkeys(MODES, False)

    def cycle(self, mode: str, point: str = "") -> bool:
        """One life and death. With `point` the child dies there; False when it was never reached in that time."""
        rng = self.rng
        options = Options.draw(rng, mode)
        if point.startswith("clear"):
            options = replace(options, threads=1)
        elif point.endswith("reassign"):
            options = replace(options, capacity=16 * SLOT + (256 << 10))  # soon full
        expected = self.expected[mode]
        path = self.home / mode
        if mode == "segments" and rng.random() < 0.05:
            # The headers are read instead. Deleted objects may come back, and slots that were being written are seen.
            (path / "journal").unlink(missing_ok=True)
            self._rumours[mode] = True
        room = options.room()
        # A longer journal takes room too, while it is replaced by a shorter one.
        excess = max(0, self._journal[mode] - options.journal_bytes())
        self._lossy[mode] |= room - excess < self._room[mode]
        self._room[mode] = room
        self._journal[mode] = max(self._journal[mode], options.journal_bytes())
        lossy, rumours = self._lossy[mode], self._rumours[mode]
        seed = rng.getrandbits(32)
        expected.verified = False

        def live(ready: int) -> None:
            worker = Worker(path, expected, options, seed, favour=point)
            worker.verify(lossy=lossy, torn_is_fine=rumours)
            os.write(ready, b"r")
            killpoint.arm(f"{point}:{1 + seed % 3}" if point else "")
            worker.run()

        # One in four dies during recovery, the others at work.
        early = not point and rng.random() < 0.25
        by_itself = _fork(live, expected, options, rng.uniform(0, 0.02) if not point else 0.3, from_birth=early)
        self.counts["cycles"] += 1
        self.counts[point or "anywhere"] += by_itself or not point
        if expected.verified:
            self.counts["verified"] += KEYS
            self._lossy[mode] = self._rumours[mode] = False
            self._journal[mode] = options.journal_bytes()
        return by_itself


def _fork(
    live: Callable[[int], None],
    expected: Expected,
    options: Options,
    seconds: float,
    *,
    from_birth: bool = False,
    cut_power: Callable[[], None] | None = None,
) -> bool:
    """Run `live` in a child, and kill it so long after it says that it is ready, or after its birth.

    Whether it had died by then. Raise `AssertionError` when it failed; what it says after `cut_power`, which is called
    before it is killed, does not count.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        code = _SURVIVED
        try:
            live(tell)
        except BaseException:
            expected.report(traceback.format_exc())
            code = _FAILED
        finally:
            os._exit(code)
    os.close(tell)
    with _closing(os.pidfd_open(child)) as life, _closing(ready):
        if not from_birth:
            select.select([life, ready], [], [], 60)
        died = bool(select.select([life], [], [], seconds)[0])
        if not died:
            if cut_power is not None:
                cut_power()
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and (died or cut_power is None):
        raise AssertionError(f"{options}:\n{expected.message}")
    return died


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


class Cuts:
    """Power cuts of a store on a disk of its own."""

    def __init__(self, disk: Disk, seed: int, *, stale_blocks: bool = False) -> None:
        """`stale_blocks`: after a power cut the file system may show, in a new file, what a removed file held in the
        same blocks (ext4 with data=writeback). Then an object that was cleared may be found in its old place, whole
        and sealed, when the same key was written there again and that write was lost."""
        self.disk = disk
        self.stale_blocks = stale_blocks
        self.rng = random.Random(seed)
        self.expected = {mode: Expected() for mode in MODES}
        self.counts: Counter[str] = Counter()

    def cycle(self, mode: str, run_s: float = 0.08) -> None:
        """Work for a while, lose the power, and look at what is left: through the journal, then through the headers."""
        path = self.disk.store / mode
        expected = self.expected[mode]
        options = Options.draw(self.rng, mode)
        seed = self.rng.getrandbits(32)

        def live(ready: int) -> None:
            worker = Worker(path, expected, options, seed)
            for key in range(KEYS):
                expected.settle(key, worker.look(key)[0])
            threading.Thread(target=self._noise, args=(path, seed), daemon=True).start()
            os.write(ready, b"r")
            worker.run()

        seconds = run_s * (0.5 + self.rng.random())
        if _fork(live, expected, options, seconds, cut_power=self.disk.shutdown):
            raise AssertionError(f"{options}: nobody may die of its own accord here")
        self.disk.unmount()
        self.disk.mount()
        self._look(path, options, seed)
        if mode == "segments":
            (path / "journal").unlink(missing_ok=True)
            self._look(path, options, seed)
        self.counts["cuts"] += 1

    def _look(self, path: Path, options: Options, seed: int) -> None:
        worker = Worker(path, self.expected[options.mode], options, seed)
        worker.verify(lossy=True, torn_is_fine=True, clear_lasts=not self.stale_blocks)
        self.counts["torn"] += worker.torn
        self.counts["alive"] += sum(bool(version) for version in worker.expected.held)
        worker.backend.close()

    def _noise(self, path: Path, seed: int) -> None:
        """Until the power goes: commit the file system's log all the time, as a neighbour's fsync does, and write parts
        of our files back in no good order, as the kernel may."""
        rng = random.Random(seed)
        with contextlib.suppress(OSError):
            other = os.open(self.disk.mnt / "neighbour", os.O_RDWR | os.O_CREAT)
            while True:
                files = [p for p in path.iterdir() if p.is_file()]
                for file in rng.sample(files, min(4, len(files))):
                    _write_back(file, rng)
                os.pwrite(other, rng.randbytes(64), 0)
                os.fsync(other)


def _write_back(file: Path, rng: random.Random) -> None:
    """Start writing a part of a file back; wait for nothing."""
    with contextlib.suppress(FileNotFoundError), _closing(os.open(file, os.O_RDONLY)) as fd:
        pages = max(1, os.fstat(fd).st_size // PAGE)
        # For dirty pages the advice "not needed" means: write them.
        first, count = rng.choice(((rng.randrange(pages), 1), (rng.randrange(pages), 3), (0, pages)))
        os.posix_fadvise(fd, first * PAGE, count * PAGE, os.POSIX_FADV_DONTNEED)
