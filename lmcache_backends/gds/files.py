"""`mode: files`: one file per chunk, for network file systems and for directories that several processes share.

    objects/<h>/<h>/<key in hex>      h: two hex digits' worth of fan-out from the token chain, 256 leaves
    trash-<random>                    objects that were cleared, until they are unlinked
    tmp/<random>                      being written, under a lock that dies with its writer; then renamed

Names come from the key alone. Each process keeps its own books from a scan at start-up: it counts what it found,
what it wrote and what it came across since, not what others wrote unseen; so with n processes the directory may
exceed the capacity by what the others added since this one started. Nothing is synced but directories, by `clear`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lmcache_backends.gds import transfer
from lmcache_backends.gds.folder import BLOCK, Fd, Folder, Io
from lmcache_backends.gds.killpoint import killpoint
from lmcache_core.errors import BAD_BLOCKS, BackendError, BackendUnavailable, CorruptChunk, NoSpace
from lmcache_core.types import HEADER_BYTES, IDENTITY_BYTES, PAGE, ChunkKey, Got, MissReason, Put, Usage, round_up
from lmcache_core.units import Percent

_OBJECTS = "objects"
_TEMPORARY = "tmp"
_TRASH = "trash-"
_ATTEMPTS = 100
_KEY = re.compile(r"[0-9a-f]{64}")
_HEX = "0123456789abcdef"
_BATCH = 16
"""Files open at once per call."""
_ENTRY_SLACK = 3 * PAGE
"""Room kept for what one more file may cost beside its data: two directories, or a block of one and one of extents."""
_DIRECTORIES = 3 + 16 + 256
TOUCH_SECONDS = 60
"""A read renews the access time of a file when it is older than this."""


class _File(NamedTuple):
    nbytes: int
    allocated: int


def file_footprint(nbytes: int) -> int:
    """Whole blocks, and one for the name and the inode's extents."""
    return round_up(nbytes) + PAGE


def least_capacity(object_bytes: int) -> int:
    """Bytes that hold one object beside the directories of all fan-out, which are never removed."""
    return file_footprint(object_bytes) + _DIRECTORIES * PAGE + _ENTRY_SLACK


class FileVolume:
    """One open directory of object files."""

    def __init__(self, folder: Folder, capacity: int, inodes: int, io: Io, free_floor: int | Percent) -> None:
        """Count what is there. Raise `BackendUnavailable`."""
        self.folder = folder
        self.stale = False
        """Set when the books and the medium may differ; the backend then opens the directory anew."""
        self._capacity = capacity
        self._inodes = inodes
        self._lock = threading.Lock()
        self._commit = threading.Lock()
        """Held while a file gets its name, so that `clear` misses none."""
        self._epoch = 0
        self._index: dict[ChunkKey, _File] = {}
        self._unread: set[ChunkKey] = set()
        """Objects whose last read met bad blocks."""
        self._directories: dict[str, int] = {}
        """Bytes each directory occupies, by path."""
        self._used = 0
        """Bytes of files, directories and what is being written."""
        self._writing = 0
        self._unweighed = False
        """Whether a failure may have left a new directory uncounted."""
        try:
            folder.refuse("journal", "segments")
            self._floor = folder.floor_bytes(free_floor)
            self._temporary = folder.enter(_TEMPORARY, create=True)
            self._reap()
            self._direct = folder.direct_flag(io, self._temporary)
            self._empty_trash()
            self._found = self._take_stock(folder.enter(_OBJECTS, create=True))
        except OSError as error:
            raise BackendUnavailable(f"{folder.path} cannot be recovered: {error}") from error

    # -- the contract ------------------------------------------------------------------------------------------
    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """From memory, else from the directory: another process may have stored it."""
        return [key in self._index or self._adopt(key) for key in keys]

    def get_into(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        """Open, read whole files; one that is replaced or deleted meanwhile stays readable until closed."""
        results: list[Got] = [None] * len(keys)
        for at in _batches(len(keys)):
            results[at : at + _BATCH] = self._read(keys[at : at + _BATCH], buffers[at : at + _BATCH])
        return results

    def put_from(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        """Write temporary files, then give them their names."""
        results: list[Put] = [None] * len(keys)
        for at in _batches(len(keys)):
            results[at : at + _BATCH] = self._write(keys[at : at + _BATCH], buffers[at : at + _BATCH])
        return results

    def delete(self, keys: Sequence[ChunkKey]) -> None:
        """Unlink the files. Raise `OSError` for the first that cannot be, after the others."""
        failure: OSError | None = None
        for key in keys:
            killpoint("file.before_unlink")
            try:
                leaf = self._leaf(key)
                self.folder.unlink(key.hex(), leaf)
                self._weigh(_path(key), leaf)  # xfs gives a directory's blocks back
            except FileNotFoundError:
                pass
            except OSError as error:
                failure = failure or error
                continue
            self._forget(key)
        if failure is not None:
            raise failure

    def clear(self) -> None:
        """Remove every object, whoever stored it, durably: one rename, made lasting, and then the unlinking.

        Raise `BackendError`.
        """
        with self._commit:
            killpoint("clear.before")
            try:
                at = self.folder.fd.number
                with contextlib.suppress(FileNotFoundError):  # another process is clearing
                    os.rename(_OBJECTS, f"{_TRASH}{secrets.token_hex(8)}", src_dir_fd=at, dst_dir_fd=at)
                self.folder.sync(self._temporary)
                killpoint("clear.renamed")
                for name in os.listdir(self._temporary.number):
                    self.folder.unlink(name, self._temporary)
                self._empty_trash()
                objects = self.folder.enter(_OBJECTS, create=True)
            except OSError as error:
                self.stale = True
                raise BackendError(f"{self.folder.path} is not cleared: {error}") from error
            with self._lock:
                self._epoch += 1  # what began to be written before this, perhaps in a file removed above, is gone too
                self._used -= sum(file.allocated for file in self._index.values()) + sum(self._directories.values())
                self._index.clear()
                self._unread.clear()
                self._directories.clear()
            self._weigh_fixed(objects)
            killpoint("clear.after")

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        """What was there at start-up and still is, coldest first, by access or else modification time."""
        return ((key, file.nbytes) for key in self._found if (file := self._index.get(key)) is not None)

    def usage(self) -> Usage:
        """As this process knows it; allocated bytes include directories, temporary files only at their full size."""
        if self._unweighed:
            self._weigh_all()
        with self._lock:
            return Usage(len(self._index), sum(file.nbytes for file in self._index.values()), self._used)

    def close(self) -> None:
        """Nothing is kept in memory only."""
        self.abandon()

    def abandon(self) -> None:
        """Let the directory be opened anew."""
        self.stale = True

    # -- reading -----------------------------------------------------------------------------------------------
    def _read(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Got]:
        results: list[Got] = [None] * len(keys)
        reads: list[tuple[int, Fd, int]] = []
        for i, key in reversed(list(enumerate(keys))):
            try:
                fd = self.folder.open(key.hex(), os.O_RDONLY | os.O_NOATIME | self._direct, self._leaf(key))
            except FileNotFoundError:
                self._forget(key)
                continue
            except OSError as error:
                results[i] = self._unreadable(key, error)
                continue
            info = os.fstat(fd.number)
            if info.st_size < HEADER_BYTES or round_up(info.st_size) > len(buffers[i]):
                results[i] = CorruptChunk(MissReason.CORRUPT, f"{key.hex()}: a file of {info.st_size} bytes")
                continue
            now = time.time_ns()
            if now - info.st_atime_ns > TOUCH_SECONDS * 10**9:
                with contextlib.suppress(OSError):  # a read-only file system is still readable
                    os.utime(fd.number, ns=(now, info.st_mtime_ns))
            self._count(key, info)
            reads.append((i, fd, info.st_size))
        if reads:
            spans = [transfer.span(fd.number, 0, buffers[i], nbytes) for i, fd, nbytes in reads]
            for (i, _, nbytes), got in zip(reads, transfer.read(spans), strict=True):
                if got == nbytes:
                    self._unread.discard(keys[i])
                    results[i] = nbytes
                else:
                    results[i] = self._unreadable(keys[i], transfer.failure(got, keys[i].hex()))
        return results

    def _unreadable(self, key: ChunkKey, error: Exception) -> Exception:
        """What to tell of a read that failed. Bad blocks twice in a row: the object is given up, to be stored anew."""
        bad = isinstance(error, OSError) and error.errno in BAD_BLOCKS
        if bad and key in self._unread:
            return CorruptChunk(MissReason.ERROR, f"{key.hex()} cannot be read, twice in a row")
        if bad:
            self._unread.add(key)
        else:
            self._unread.discard(key)
        return error

    # -- writing -----------------------------------------------------------------------------------------------
    def _write(self, keys: Sequence[ChunkKey], buffers: Sequence[memoryview]) -> list[Put]:
        results: list[Put] = [None] * len(keys)
        writes: list[tuple[int, str, Fd]] = []
        epoch = self._epoch
        if self._unweighed:
            self._weigh_all()
        free = self.folder.free_bytes()
        try:
            for i, key in reversed(list(enumerate(keys))):
                if key in self._index:
                    continue
                if not len(buffers[i]):
                    results[i] = ValueError("an object of 0 bytes")
                    continue
                nbytes = round_up(len(buffers[i]))
                name = secrets.token_hex(16)
                try:
                    free -= nbytes
                    self._reserve(nbytes, free)
                except NoSpace as error:
                    results[i] = error
                    continue
                try:
                    writes.append((i, name, self._open_temporary(name)))
                except OSError as error:
                    self._unreserve(nbytes)
                    results[i] = transfer.no_space(error, name)
            if writes:
                pad = bool(self._direct)
                spans = [transfer.span(fd.number, 0, buffers[i], len(buffers[i]), pad=pad) for i, _, fd in writes]
                killpoint("put.before_data")
                done = transfer.write(spans)
                killpoint("put.after_data")
                for (i, name, fd), span, got in zip(writes, spans, done, strict=True):
                    if got != span.nbytes:
                        results[i] = transfer.failure(got, name)
                        continue
                    try:
                        if span.nbytes != len(buffers[i]):
                            os.ftruncate(fd.number, len(buffers[i]))
                        now = time.time_ns()  # the kernel's own clock is too coarse to order a batch
                        os.utime(fd.number, ns=(now, now))
                        self._publish(keys[i], name, _File(len(buffers[i]), fd.allocated), epoch)
                    except OSError as error:
                        self._unweighed = True
                        results[i] = transfer.no_space(error, name)
        finally:
            for i, name, _ in writes:
                self._unreserve(round_up(len(buffers[i])))
                with contextlib.suppress(OSError):  # what stays is reaped at the next start
                    self.folder.unlink(name, self._temporary)
        return results

    def _open_temporary(self, name: str) -> Fd:
        fd = self.folder.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._direct, self._temporary)
        with contextlib.suppress(OSError):  # a file system without locks: then old litter is never reaped
            fcntl.flock(fd.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        killpoint("file.after_create")
        return fd

    def _publish(self, key: ChunkKey, name: str, file: _File, epoch: int) -> None:
        """Give a complete file its name."""
        with self._commit:
            if epoch != self._epoch:
                return  # cleared meanwhile: stored and gone
            leaf = self._leaf(key, create=True)
            killpoint("file.before_rename")
            os.rename(name, key.hex(), src_dir_fd=self._temporary.number, dst_dir_fd=leaf.number)
            killpoint("file.after_rename")
            with self._lock:
                before = self._index.get(key)
                self._used += file.allocated - (before.allocated if before else 0)
                self._index[key] = file
                self._unread.discard(key)
        self._weigh(_path(key), leaf)  # a name more may have cost it a block

    def _reserve(self, nbytes: int, free: int) -> None:
        """Count a file that is about to be written. Raise `NoSpace`."""
        with self._lock:
            if self._used + nbytes + (self._writing + 1) * _ENTRY_SLACK > self._capacity:
                raise NoSpace(f"{self.folder.path}: {self._used} of {self._capacity} bytes are in use")
            # Below the object itself: the leaf and its parent may have to be made.
            if len(self._index) + len(self._directories) + self._writing + 3 > self._inodes:
                raise NoSpace(f"{self.folder.path}: {len(self._index)} files, limit {self._inodes} inodes")
            if free < self._floor:
                raise NoSpace(f"{self.folder.path}: the file system has less than {self._floor} bytes to spare")
            self._used += nbytes
            self._writing += 1

    def _unreserve(self, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes
            self._writing -= 1

    # -- directories and books ---------------------------------------------------------------------------------
    def _leaf(self, key: ChunkKey, *, create: bool = False) -> Fd:
        """The open directory of a key's file, reached without following links. Raise `OSError`."""
        path = _path(key)
        _, first, second = path.split("/")
        outer = self.folder.enter(first, self.folder.enter(_OBJECTS, create=create), create=create)
        leaf = self.folder.enter(second, outer, create=create)
        if create or path not in self._directories:
            self._weigh(f"{_OBJECTS}/{first}", outer)
            self._weigh(path, leaf)
        return leaf

    def _leaves(self) -> Iterator[tuple[str, Fd]]:
        """Every leaf directory there is, with its path."""
        try:
            objects = self.folder.enter(_OBJECTS)
        except FileNotFoundError:
            return  # another process is clearing
        for first in _HEX:
            try:
                outer = self.folder.enter(first, objects)
            except FileNotFoundError:
                continue
            self._weigh(f"{_OBJECTS}/{first}", outer)
            for second in _HEX:
                with contextlib.suppress(FileNotFoundError):
                    yield f"{_OBJECTS}/{first}/{second}", self.folder.enter(second, outer)

    def _weigh_all(self) -> None:
        """Count all directories anew. Raise `OSError`."""
        self._unweighed = False
        try:
            for path, leaf in self._leaves():
                self._weigh(path, leaf)
        except OSError:
            self._unweighed = True
            raise

    def _weigh(self, path: str, directory: Fd) -> None:
        """Count a directory's own blocks anew."""
        with self._lock:
            allocated = directory.allocated
            self._used += allocated - self._directories.get(path, 0)
            self._directories[path] = allocated

    def _weigh_fixed(self, objects: Fd) -> None:
        """Count the directories that are always there."""
        self._weigh("", self.folder.fd)
        self._weigh(_OBJECTS, objects)
        self._weigh(_TEMPORARY, self._temporary)

    def _adopt(self, key: ChunkKey) -> bool:
        """Whether another process has stored the key; if so, it is counted from now on."""
        try:
            leaf = self._leaf(key)
            info = os.stat(key.hex(), dir_fd=leaf.number, follow_symlinks=False)
        except OSError:
            return False
        self._count(key, info)
        return True

    def _count(self, key: ChunkKey, info: os.stat_result) -> None:
        """Take a file into the books, if it is not in them."""
        with self._lock:
            if key not in self._index:
                self._index[key] = _File(info.st_size, info.st_blocks * BLOCK)
                self._used += info.st_blocks * BLOCK

    def _forget(self, key: ChunkKey) -> None:
        with self._lock:
            file = self._index.pop(key, None)
            self._unread.discard(key)
            if file is not None:
                self._used -= file.allocated

    def _empty_trash(self) -> None:
        """Remove what `clear` took out of the way, now or before somebody was killed. Others may be at it too."""
        for attempt in range(_ATTEMPTS):
            names = [name for name in os.listdir(self.folder.fd.number) if name.startswith(_TRASH)]
            if not names:
                return
            for name in names:
                try:
                    shutil.rmtree(name, dir_fd=self.folder.fd.number)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or attempt == _ATTEMPTS - 1:
                        raise

    def _reap(self) -> None:
        """Remove what writers that are no more left behind: their locks are free."""
        for name in os.listdir(self._temporary.number):
            try:
                fd = self.folder.open(name, os.O_RDWR, self._temporary)
                fcntl.flock(fd.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOENT, errno.ELOOP, errno.EPERM, errno.EISDIR):
                    continue
                raise
            self.folder.unlink(name, self._temporary)

    def _take_stock(self, objects: Fd) -> list[ChunkKey]:
        """Count everything, evict down to the limits, and return the keys, coldest first."""
        ages: dict[ChunkKey, int] = {}
        self._weigh_fixed(objects)
        for path, leaf in self._leaves():
            self._weigh(path, leaf)
            with os.scandir(leaf.number) as entries:
                for entry in entries:
                    if not _KEY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                        continue
                    try:
                        info = os.stat(entry.name, dir_fd=leaf.number, follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # another process deleted it
                    key = ChunkKey(bytes.fromhex(entry.name))
                    self._count(key, info)
                    ages[key] = max(info.st_atime_ns, info.st_mtime_ns)
        coldest = sorted(ages, key=ages.__getitem__)
        for key in coldest:
            if self._used <= self._capacity and len(self._index) + len(self._directories) <= self._inodes:
                break
            self.delete([key])
        return [key for key in coldest if key in self._index]


def _batches(count: int) -> Iterator[int]:
    """Where batches begin, last first: keys come in prefix order, and the deepest is to have the oldest time."""
    return reversed(range(0, count, _BATCH))


def _path(key: ChunkKey) -> str:
    """Directory of the key's file, by its token chain: the first half of a key is the same for a whole model."""
    first = key[IDENTITY_BYTES]
    return f"{_OBJECTS}/{first >> 4:x}/{first & 15:x}"
