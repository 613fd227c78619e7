"""`mode: segments`: preallocated segment files cut into slots, an index in memory, an append-only journal.

Locks: `_lock` guards memory and is never held across I/O, so that reads never wait for writes; `_commit` orders
journal records and changes of the segment files. A slot's life: free -> being written -> its PUT is journalled and
the key visible -> the key invisible, its DELETE journalled, the last reader gone -> free. So no slot is reused while
anything, in memory or after a restart, takes it for what it was; and if a power cut reorders all this, the object's
own seal tells. Nothing is synced but the directory, by `clear`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import re
import secrets
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence

from lmcache_backends.gds import journal, transfer
from lmcache_backends.gds.folder import Fd, Folder, Io
from lmcache_backends.gds.geometry import Geometry, slots_in
from lmcache_backends.gds.journal import Journal, Kind, Record, kind_and_bytes, record
from lmcache_backends.gds.killpoint import killpoint
from lmcache_backends.gds.mover import HOST, Movement
from lmcache_backends.gds.slab import Entry, Segment, Slab
from lmcache_core import _native
from lmcache_core.errors import BAD_BLOCKS, BackendError, BackendUnavailable, CorruptChunk, NoSpace
from lmcache_core.seal import read_header
from lmcache_core.types import PAGE, ChunkKey, Got, MissReason, Put, Usage, object_bytes, round_up
from lmcache_core.units import Percent

_SEGMENT = re.compile(r"segment-(\d{6})")
_TEMPORARY = re.compile(r"(journal|probe-[0-9a-f]{16})\.tmp")
_LOCK = "lock"
_MAGIC = b"LMCSEG\r\n"
_VERSION = 1
_SUPERBLOCK = struct.Struct("<8sQQQQ")
_NOT_OURS = (errno.ELOOP, errno.EPERM, errno.EISDIR, errno.ENXIO)
_SCAN_PAGES = 256


class SegmentVolume:
    """One open directory of segments, used by one process at a time."""

    def __init__(
        self, folder: Folder, geometry: Geometry, io: Io, free_floor: int | Percent, movement: Movement = HOST
    ) -> None:
        """Recover what is there. Raise `BackendUnavailable`."""
        self.folder = folder
        self.stale = False
        """Set when memory and medium may differ; the backend then opens the directory anew."""
        self._geometry = geometry
        self._movement = movement
        self._lock = threading.Lock()
        self._commit = threading.Lock()
        self._slab = Slab()
        self._index: OrderedDict[ChunkKey, Entry] = OrderedDict()
        """Coldest first."""
        self._object_bytes = 0
        self._touched: dict[ChunkKey, None] = {}
        """Read since the last journal record, coldest first."""
        most = geometry.journal_records
        self._journal = Journal(folder, min(2 * geometry.objects + 64, most), most)
        try:
            folder.refuse("objects", "files")
            self._owner = _take_lock(folder)
            self._floor = folder.floor_bytes(free_floor)
            self._reap()
            self._direct = folder.direct_flag(io)
            self._recover()
        except OSError as error:
            raise BackendUnavailable(f"{folder.path} cannot be recovered: {error}") from error

    # -- the contract ------------------------------------------------------------------------------------------
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Lock-free: a dict look-up is atomic, and this may run on the engine's thread."""
        index = self._index
        return [key in index for key in keys]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        """Read, with the slots pinned against reuse."""
        results: list[Got] = [None] * len(keys)
        reads: list[tuple[int, Entry]] = []
        with self._lock:
            for i, key in enumerate(keys):
                entry = self._index.get(key)
                if entry is None:
                    continue
                if len(buffers[i]) < round_up(entry.nbytes):
                    # Stored by other settings; the core deletes it once.
                    what = f"{entry.nbytes} bytes, more than any object of this tier"
                    results[i] = CorruptChunk(MissReason.CORRUPT, what)
                    continue
                entry.readers += 1
                reads.append((i, entry))
            self._touch([keys[i] for i, _ in reads])
        if not reads:
            return results
        try:
            done = self._movement.read([_span(entry, buffers[i]) for i, entry in reads])
        finally:
            with self._lock:
                for _, entry in reads:
                    entry.readers -= 1
                    if entry.gone and not entry.readers:
                        self._slab.give(entry.segment, entry.slot)
        for (i, entry), got in zip(reads, done, strict=True):
            if got >= entry.nbytes:
                results[i] = entry.nbytes
                entry.unread = False
            elif got >= 0:
                results[i] = CorruptChunk(MissReason.CORRUPT, f"{entry.segment.name} ends inside the object")
            elif -got in BAD_BLOCKS and entry.unread:
                # Bad blocks: kept, it would fail every request for its prefix, and never be stored anew. An error all
                # the same: a disk that can read nothing must not look sound.
                results[i] = CorruptChunk(MissReason.ERROR, f"{entry.segment.name} cannot be read, twice in a row")
            else:
                results[i] = transfer.failure(got, entry.segment.name)
                entry.unread = -got in BAD_BLOCKS
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        """Write into free slots, then journal, then show."""
        results: list[Put] = [None] * len(keys)
        entries: list[tuple[int, Entry]] = []
        homeless: list[int] = []
        with self._lock:
            self._touch([key for key in keys if key in self._index])
            for i, key in enumerate(keys):
                if key in self._index:
                    continue
                try:
                    place = self._slab.take(self._geometry.slot_bytes(len(buffers[i])))
                except ValueError as error:
                    results[i] = error
                    continue
                if place is None:
                    homeless.append(i)
                else:
                    entries.append((i, Entry(*place, len(buffers[i]))))
        if homeless:
            entries += self._make_room(homeless, buffers, results)
        if entries:
            self._fill(keys, buffers, entries, results)
        return results

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        """Hide the keys, journal that, then free the slots nobody reads."""
        with self._changing():
            gone: list[tuple[ChunkKey, Entry]] = []
            with self._lock:
                for key in keys:
                    entry = self._index.pop(key, None)
                    if entry is not None:
                        self._touched.pop(key, None)
                        self._object_bytes -= entry.nbytes
                        gone.append((key, entry))
            if not gone:
                return
            killpoint("delete.before_tombstone")
            # A journal that cannot be written is broken, and rewritten before any slot is used again.
            try:
                self._log([_record(Kind.DELETE, key, entry) for key, entry in gone])
            except OSError:
                self._journal.broken = True
            killpoint("delete.after_tombstone")
            with self._lock:
                for _, entry in gone:
                    entry.gone = True
                    if not entry.readers:
                        self._slab.give(entry.segment, entry.slot)

    def clear(self) -> None:
        """Remove every segment, durably: not even a power cut brings an object back. Raise `BackendError`."""
        with self._changing():
            with self._lock:
                segments = list(self._slab.segments.values())
                for segment in segments:
                    segment.retired = True
                self._slab = Slab()
                self._index = OrderedDict()
                self._object_bytes = 0
                self._touched = {}
            killpoint("clear.before")
            try:
                for segment in segments:
                    self.folder.unlink(segment.name)
                    killpoint("clear.unlinked")
                self._journal.rewrite([])
                self.folder.sync()
            except OSError as error:
                self.stale = True
                raise BackendError(f"{self.folder.path} is not cleared: {error}") from error
            killpoint("clear.after")

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        """What is stored now, coldest first."""
        with self._lock:
            found = [(key, entry.nbytes) for key, entry in self._index.items()]
        return iter(found)

    def usage(self) -> Usage:
        """Objects and their bytes; allocated bytes as the medium counts them."""
        with self._commit:
            files = [self.folder.fd, self._owner, *(s.fd for s in self._slab.segments.values())]
            allocated = self._journal.allocated + sum(fd.allocated for fd in files)
            return Usage(len(self._index), self._object_bytes, allocated)

    def close(self) -> None:
        """Keep the order of use for the next start."""
        with self._commit, contextlib.suppress(OSError):
            self._log([])
        self.abandon()

    def abandon(self) -> None:
        """Let another volume open the directory. Files close with the last batch that uses them."""
        with self._commit:
            self.stale = True
            fcntl.flock(self._owner.number, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the commit lock. Raise `BackendUnavailable` when the directory is another volume's by now."""
        with self._commit:
            if self.stale:
                raise BackendUnavailable(f"{self.folder.path} is being opened anew")
            yield

    # -- writing -----------------------------------------------------------------------------------------------
    def _fill(
        self,
        keys: Sequence[ChunkKey],
        buffers: Sequence[memoryview],
        entries: list[tuple[int, Entry]],
        results: list[Put],
    ) -> None:
        written: list[tuple[int, Entry]] = []
        kept: set[int] = set()
        try:
            spans = [_span(entry, buffers[i]) for i, entry in entries]
            killpoint("put.before_data")
            done = self._movement.write(spans)
            killpoint("put.after_data")
            for (i, entry), span, n in zip(entries, spans, done, strict=True):
                if n == span.nbytes:
                    written.append((i, entry))
                else:
                    results[i] = transfer.failure(n, entry.segment.name)
            if written:
                kept = self._publish(keys, written, results)
        finally:
            with self._lock:
                for i, entry in entries:
                    if i not in kept:
                        self._slab.give(entry.segment, entry.slot)

    def _publish(self, keys: Sequence[ChunkKey], written: list[tuple[int, Entry]], results: list[Put]) -> set[int]:
        """Journal what was written and show it; return the positions whose slots are in use now."""
        with self._changing():
            # Nobody else inserts while we hold the commit lock. What was cleared meanwhile counts as stored and gone.
            # Deeper chunks of a prefix enter first, as the colder ones.
            fresh: dict[ChunkKey, tuple[int, Entry]] = {}
            for i, entry in sorted(written, key=lambda pair: pair[0], reverse=True):
                if keys[i] not in self._index and not entry.segment.retired:
                    fresh.setdefault(keys[i], (i, entry))
            try:
                self._log([_record(Kind.PUT, key, entry) for key, (_, entry) in fresh.items()])
            except OSError as error:
                for i, _ in written:
                    if keys[i] in fresh:
                        results[i] = transfer.no_space(error, journal.NAME)
                return set()
            with self._lock:
                for key, (_, entry) in fresh.items():
                    self._index[key] = entry
                    self._object_bytes += entry.nbytes
            return {i for i, _ in fresh.values()}

    def _make_room(
        self, homeless: Sequence[int], buffers: Sequence[memoryview], results: list[Put]
    ) -> list[tuple[int, Entry]]:
        """Slots for the buffers that found none at once, from new, empty or larger-slotted segments."""
        found: list[tuple[int, Entry]] = []
        refusal: tuple[int, Exception] | None = None
        with self._changing():
            for i in homeless:
                nbytes = len(buffers[i])
                if refusal is None or nbytes < refusal[0]:
                    try:
                        found.append((i, Entry(*self._find(nbytes), nbytes)))
                        continue
                    except NoSpace as error:
                        refusal = nbytes, error
                    except OSError as error:
                        refusal = nbytes, transfer.no_space(error, str(self.folder.path))
                results[i] = refusal[1]
        return found

    def _find(self, nbytes: int) -> tuple[Segment, int]:
        if self._journal.broken:
            self._rewrite()
        size = self._geometry.slot_bytes(nbytes)
        while True:
            with self._lock:
                place = self._slab.take(size)
            if place is not None:
                return place
            if not self._extend(size):
                break
        with self._lock:
            place = self._slab.take_larger(nbytes)
        if place is None:
            raise NoSpace(f"{self.folder.path}: no free slot of {size} bytes and no room for another segment")
        return place

    def _extend(self, slot_bytes: int) -> bool:
        """Make free slots of that size, or at least room for them; False when there is nothing left to do."""
        nbytes = self._geometry.file_bytes(slot_bytes, self._room())
        if nbytes and self.folder.free_bytes() - nbytes >= self._floor:
            try:
                segment = self._create(nbytes, slot_bytes)
            except OSError as error:
                if isinstance(transfer.no_space(error, ""), NoSpace):
                    return False
                raise
            with self._lock:
                self._slab.add(segment)
            return True
        with self._lock:
            spare = self._slab.largest_empty()
            if spare is None:
                return False
            self._slab.remove(spare)
        if slots_in(spare.file_bytes, slot_bytes):
            self._reassign(spare, slot_bytes)
        else:
            self._drop(spare)
        return True

    def _create(self, nbytes: int, slot_bytes: int) -> Segment:
        killpoint("segment.before_create")
        for number in itertools.count():
            if number in self._slab.segments:
                continue
            segment_name = f"segment-{number:06d}"
            try:
                fd = self.folder.open(segment_name, os.O_RDWR | os.O_CREAT | os.O_EXCL | self._direct)
            except FileExistsError:
                continue  # something that is not ours has the name
            try:
                os.posix_fallocate(fd.number, 0, nbytes)
                killpoint("segment.after_allocate")
                segment = Segment(number, fd, nbytes, slot_bytes, secrets.randbits(64))
                self._movement.adopt(fd)
                _write_superblock(segment)
            except OSError:
                with contextlib.suppress(OSError):
                    self.folder.unlink(segment_name)
                raise
            killpoint("segment.after_create")
            return segment
        raise AssertionError("unreachable: the numbers are endless")

    def _reassign(self, spare: Segment, slot_bytes: int) -> None:
        """Cut an empty segment, which nobody else can find any more, into slots of another size."""
        killpoint("segment.before_reassign")
        anew = Segment(spare.number, spare.fd, spare.file_bytes, slot_bytes, secrets.randbits(64))
        try:
            _write_superblock(anew)
        except OSError:
            with self._lock:
                self._slab.add(spare)
            raise
        killpoint("segment.after_reassign")
        with self._lock:
            self._slab.add(anew)

    def _drop(self, segment: Segment) -> None:
        """Give a segment that is out of the slab back to the file system."""
        segment.retired = True
        try:
            self.folder.unlink(segment.name)
        except OSError:
            self.stale = True  # it still takes room: count everything again
            raise

    def _room(self) -> int:
        """Bytes that new segments may occupy."""
        used = sum(segment.charge() for segment in self._slab.segments.values())
        return self._geometry.capacity - self._geometry.overhead - used

    # -- journal -----------------------------------------------------------------------------------------------
    def _log(self, records: list[Record]) -> None:
        """Append records, after those of the reads since the last time. Commit lock held. Raise `OSError`."""
        with self._lock:
            touched, self._touched = self._touched, {}
            reads = [_record(Kind.TOUCH, key, self._index[key]) for key in touched]
        batch = reads + records
        if self._journal.broken or not self._journal.fits(len(batch)):
            batch = records  # a snapshot is in the order of use already
            self._rewrite(len(batch))
        if batch:
            killpoint("journal.before_append")
            self._journal.append(batch)
            killpoint("journal.after_append")

    def _rewrite(self, coming: int = 0) -> None:
        with self._lock:
            items = list(self._index.items())
        self._journal.rewrite([_record(Kind.PUT, key, entry) for key, entry in items], coming)

    def _touch(self, keys: Sequence[ChunkKey]) -> None:
        """Note a use of keys in prefix order: the deepest, useless without the others, stays the coldest. Lock held."""
        for key in reversed(keys):
            self._index.move_to_end(key)
            self._touched.pop(key, None)
            self._touched[key] = None

    # -- recovery ----------------------------------------------------------------------------------------------
    def _recover(self) -> None:
        segments = self._open_segments()
        records = self._journal.load()
        taken = _replay(_scan_headers(segments) if records is None else records, segments, self._index)
        for segment in segments.values():
            owners = taken[segment.number]
            segment.free = deque(slot for slot in range(segment.slots) if owners[slot] is None)
            self._slab.add(segment)
        self._object_bytes = sum(entry.nbytes for entry in self._index.values())
        while self._room() < self._journal.excess and self._slab.segments:
            self._shed()
        while len(self._index) > self._journal.most // 2:
            _, entry = self._index.popitem(last=False)
            self._object_bytes -= entry.nbytes
            self._slab.give(entry.segment, entry.slot)
            self._journal.broken = True
        while self._journal.broken:
            try:
                self._rewrite()
            except OSError as error:
                if not isinstance(transfer.no_space(error, ""), NoSpace) or not self._slab.segments:
                    raise
                self._shed()

    def _reap(self) -> None:
        """Remove what a process that was killed left behind; we hold the lock, so nobody is using it."""
        for name in os.listdir(self.folder.fd.number):
            if _TEMPORARY.fullmatch(name):
                self.folder.unlink(name)

    def _open_segments(self) -> dict[int, Segment]:
        segments: dict[int, Segment] = {}
        for name in sorted(os.listdir(self.folder.fd.number)):
            match = _SEGMENT.fullmatch(name)
            if match is None:
                continue
            try:
                fd = self.folder.open(name, os.O_RDWR | self._direct)
            except OSError as error:
                if error.errno in _NOT_OURS:
                    continue
                raise
            segment = _read_superblock(int(match[1]), fd)
            if segment is None:
                self.folder.unlink(name)  # never finished, or of another version: a cache starts over
            else:
                self._movement.adopt(fd)
                segments[segment.number] = segment
        return segments

    def _shed(self) -> None:
        """Drop the segment with the fewest objects."""
        victim = min(self._slab.segments.values(), key=lambda s: s.slots - len(s.free))
        for key in [key for key, entry in self._index.items() if entry.segment is victim]:
            self._object_bytes -= self._index.pop(key).nbytes
        self._slab.remove(victim)
        self._journal.broken = True
        self._drop(victim)


def _span(entry: Entry, buffer: memoryview) -> transfer.Span:
    segment = entry.segment
    return transfer.span(segment.fd.number, segment.offset(entry.slot), buffer, entry.nbytes)


def _record(kind: Kind, key: ChunkKey, entry: Entry) -> Record:
    return record(kind, key, entry.segment.generation, entry.segment.number, entry.slot, entry.nbytes)


def _replay(
    records: Iterable[Record], segments: dict[int, Segment], index: OrderedDict[ChunkKey, Entry]
) -> dict[int, list[ChunkKey | None]]:
    """Fill the index from records in order; return each segment's slots with their keys.

    What does not fit the segments that are there is left out; of two keys in one slot the later has it.
    """
    taken: dict[int, list[ChunkKey | None]] = {number: [None] * s.slots for number, s in segments.items()}
    for key, generation, number, slot, word in records:
        segment = segments.get(number)
        if segment is None or segment.generation != generation or slot >= segment.slots:
            continue
        owners = taken[number]
        kind, nbytes = kind_and_bytes(word)
        if kind == Kind.PUT and 0 < nbytes <= segment.slot_bytes:
            _release(index.pop(key, None), taken)
            before = owners[slot]
            if before is not None:
                del index[before]
            owners[slot] = key
            index[key] = Entry(segment, slot, nbytes)
        elif owners[slot] == key:
            if kind == Kind.TOUCH:
                index.move_to_end(key)
            elif kind == Kind.DELETE:
                _release(index.pop(key), taken)
    return taken


def _release(entry: Entry | None, taken: dict[int, list[ChunkKey | None]]) -> None:
    if entry is not None:
        taken[entry.segment.number][entry.slot] = None


def _scan_headers(segments: dict[int, Segment]) -> list[Record]:
    """Records of all slots that begin with a good header, oldest first: what the journal would say."""
    found: list[tuple[int, Record]] = []
    memory = memoryview(mmap.mmap(-1, _SCAN_PAGES * PAGE))
    pages = [memory[at : at + PAGE] for at in range(0, len(memory), PAGE)]
    for segment in segments.values():
        for first in range(0, segment.slots, _SCAN_PAGES):
            slots = range(first, min(first + _SCAN_PAGES, segment.slots))
            spans = [
                transfer.span(segment.fd.number, segment.offset(slot), page, PAGE)
                for slot, page in zip(slots, pages, strict=False)
            ]
            for slot, page, got in zip(slots, pages, transfer.read(spans), strict=False):
                if got != PAGE:
                    continue
                try:
                    head = read_header(page)
                except CorruptChunk:
                    continue
                nbytes = object_bytes(head.stored_bytes)
                entry = record(Kind.PUT, head.key, segment.generation, segment.number, slot, nbytes)
                found.append((head.created, entry))
    found.sort(key=lambda pair: pair[0])
    return [entry for _, entry in found]


def _take_lock(folder: Folder) -> Fd:
    """Be the only process in the directory, until the descriptor closes. Raise `BackendUnavailable`."""
    try:
        fd = folder.open(_LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.flock(fd.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(fd.number, 32, 0).decode("ascii", "replace").strip()
        raise BackendUnavailable(
            f"{folder.path} is in use by process {owner or '(unknown)'}: give each process a path of its own, or use "
            "`mode: files`, which processes may share"
        ) from error
    except OSError as error:
        raise BackendUnavailable(
            f"{folder.path}/{_LOCK} cannot be locked: {error.strerror}; where locks are missing use `mode: files`"
        ) from error
    with contextlib.suppress(OSError):  # on a full disk the lock holds without the owner's name
        os.pwrite(fd.number, f"{os.getpid():<20}\n".encode(), 0)
    return fd


def _write_superblock(segment: Segment) -> None:
    """Describe the segment in its first page, which must be page aligned for direct I/O."""
    fields = _SUPERBLOCK.pack(_MAGIC, _VERSION, segment.number, segment.generation, segment.slot_bytes)
    with mmap.mmap(-1, PAGE) as page:
        page[: len(fields)] = fields
        page[PAGE - 8 :] = _native.xxh3_64(page[: PAGE - 8]).to_bytes(8, "little")
        if os.pwrite(segment.fd.number, page, 0) != PAGE:
            raise OSError(errno.EIO, "short write of a superblock", segment.name)


def _read_superblock(number: int, fd: Fd) -> Segment | None:
    """The segment a file holds, or None when it is none of this version."""
    with mmap.mmap(-1, PAGE) as page:
        if os.preadv(fd.number, [page], 0) != PAGE:
            return None
        head = page[:]
    magic, version, own_number, generation, slot_bytes = _SUPERBLOCK.unpack_from(head)
    check = _native.xxh3_64(head[: PAGE - 8]).to_bytes(8, "little")
    if head[PAGE - 8 :] != check or (magic, version, own_number) != (_MAGIC, _VERSION, number):
        return None
    if slot_bytes < PAGE or slot_bytes % PAGE:
        return None
    segment = Segment(number, fd, os.fstat(fd.number).st_size, slot_bytes, generation)
    return segment if segment.slots else None
