"""The append-only journal of a segment store: what is where, so that a restart need not read every header.

One preallocated file: a header page, then records of 64 bytes, little-endian:

    offset size  field
         0   32  key
        32    8  generation of the segment
        40    4  segment
        44    4  slot
        48    7  object bytes
        55    1  kind: 1 put, 2 delete, 3 touch
        56    8  XXH3-64 of bytes 0..55, xor the journal's generation

A batch is appended with one write and never synced: the journal is a hint, every object it leads to is verified
by the core. A full journal is replaced by a snapshot through a temporary file and a rename. The end is the first
record that does not check; a good record behind a bad one, or fewer than the snapshot held, means that a power
cut tore it, and then the headers of the segments are read instead.
"""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from lmcache_backends.gds.folder import Fd, Folder
from lmcache_backends.gds.killpoint import killpoint
from lmcache_core import _native
from lmcache_core.types import PAGE, ChunkKey, round_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "journal"
_TEMPORARY = "journal.tmp"
_MAGIC = b"LMCJNL\r\n"
_VERSION = 1
_HEADER = struct.Struct("<8sQQQ")
_RECORD = struct.Struct("<32sQIIQ8x")
_KIND_SHIFT = 56
_BYTES_MASK = (1 << _KIND_SHIFT) - 1
_BODY = 56
_CHECKED = 1 << 16
"""Records checked at once."""


class Kind(enum.IntEnum):
    """What a record says about its key."""

    PUT = 1
    DELETE = 2
    TOUCH = 3


Record = tuple[ChunkKey, int, int, int, int]
"""Key, generation, segment, slot, and object bytes with the kind in the top byte. Plain: there may be a million."""


def record(kind: Kind, key: ChunkKey, generation: int, segment: int, slot: int, nbytes: int) -> Record:
    """One journal entry."""
    return key, generation, segment, slot, nbytes | kind << _KIND_SHIFT


def kind_and_bytes(word: int) -> tuple[int, int]:
    """The kind, which may be none of ours, and the object bytes in the last field of a record."""
    return word >> _KIND_SHIFT, word & _BYTES_MASK


class Journal:
    """Appends records; not thread-safe, the store's commit lock guards it."""

    def __init__(self, folder: Folder, least: int, most: int) -> None:
        """Room for `least` records or twice what a snapshot holds, never for more than `most`.

        The file is taken over by `load` or made by the first `rewrite`.
        """
        self._folder = folder
        self._least = least
        self.most = most
        self._fd: Fd | None = None
        self._generation = 0
        self._count = 0
        self._room = 0
        self.broken = True
        """Whether the file no longer tells the truth and must be rewritten before any slot is reused."""
        self.excess = 0
        """Bytes by which the file found, perhaps of a larger capacity, is larger than the next one."""

    @property
    def allocated(self) -> int:
        """Bytes on the medium."""
        return self._fd.allocated if self._fd else 0

    def load(self) -> Iterator[Record] | None:
        """The records on the medium in order, or None when the file is missing, torn or not a journal of ours.

        A file of at most the planned size is appended to from now on; a larger one has to be rewritten.
        """
        try:
            fd = self._folder.open(NAME, os.O_RDWR)
            with os.fdopen(os.dup(fd.number), "rb") as file:
                head, body = file.read(PAGE), file.read()
        except OSError:
            return None
        self.excess = max(0, fd.allocated - file_bytes(self.most))
        if len(head) < PAGE or head[_HEADER.size : _HEADER.size + 8] != _xxh3(head[: _HEADER.size]):
            return None
        magic, version, generation, snapshot = _HEADER.unpack_from(head)
        if magic != _MAGIC or version != _VERSION:
            return None
        body = body[: len(body) // _RECORD.size * _RECORD.size]
        count = _good_records(np.frombuffer(body, dtype="<u8").reshape(-1, 8), generation)
        if count is None or count < snapshot:
            return None
        if PAGE + len(body) <= file_bytes(self.most):
            self._take(fd, len(body), generation, count)
        return cast(Iterator[Record], _RECORD.iter_unpack(memoryview(body)[: count * _RECORD.size]))

    def fits(self, count: int) -> bool:
        """Whether that many records can be appended before a rewrite."""
        return self._count + count <= self._room

    def append(self, records: Sequence[Record]) -> None:
        """Append a batch that `fits` with one write. Raise `OSError`, after which the journal is broken."""
        assert self._fd is not None and self.fits(len(records))
        data = _pack(records, self._generation)
        self.broken = True
        _write(self._fd, data, PAGE + self._count * _RECORD.size)
        self._count += len(records)
        self.broken = False

    def rewrite(self, records: Sequence[Record], coming: int = 0) -> None:
        """Replace the journal by a snapshot, with room for the batch that is `coming`.

        Raise `OSError`; the old file then stays, broken or not as it was.
        """
        generation = secrets.randbits(64)
        room = min(self.most, max(self._least, 2 * len(records), len(records) + coming))
        try:
            self._folder.unlink(_TEMPORARY)
            fd = self._folder.open(_TEMPORARY, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.posix_fallocate(fd.number, 0, file_bytes(room))
            head = _HEADER.pack(_MAGIC, _VERSION, generation, len(records))
            _write(fd, head + _xxh3(head), 0)
            _write(fd, _pack(records, generation), PAGE)
            killpoint("compact.before_rename")
            at = self._folder.fd.number
            os.rename(_TEMPORARY, NAME, src_dir_fd=at, dst_dir_fd=at)
        except OSError:
            with contextlib.suppress(OSError):
                self._folder.unlink(_TEMPORARY)
            raise
        killpoint("compact.after_rename")
        self._take(fd, file_bytes(room) - PAGE, generation, len(records))

    def _take(self, fd: Fd, nbytes: int, generation: int, count: int) -> None:
        """Append to this file from now on; it has `nbytes` behind its header."""
        self._fd, self._room, self._generation, self._count = fd, nbytes // _RECORD.size, generation, count
        self.broken = False


def file_bytes(records: int) -> int:
    """Size of a journal with room for `records`."""
    return round_up(PAGE + records * _RECORD.size)


def _pack(records: Iterable[Record], generation: int) -> bytearray:
    pack = _RECORD.pack
    data = bytearray(b"".join([pack(*fields) for fields in records]))
    rows = np.frombuffer(data, dtype="<u8").reshape(-1, 8)
    rows[:, 7] = _row_hashes(rows) ^ np.uint64(generation)
    return data


def _good_records(rows: NDArray[np.uint64], generation: int) -> int | None:
    """How many rows carry the right check before the first that does not; None when a good one follows that."""
    count = None
    for first in range(0, len(rows), _CHECKED):
        some = rows[first : first + _CHECKED]
        if count is not None and not some.any():
            continue  # never written
        good = some[:, 7] == (_row_hashes(some) ^ np.uint64(generation))
        if count is None and good.all():
            continue
        if count is None:
            bad = int(good.argmin())
            count = first + bad
            good = good[bad:]
        if good.any():
            return None
    return len(rows) if count is None else count


def _row_hashes(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    addresses = _native.address_of(rows) + np.arange(len(rows), dtype=np.int64) * _RECORD.size
    return _native.xxh3_64_batch(addresses, np.full(len(rows), _BODY, dtype=np.int64))


def _xxh3(data: bytes) -> bytes:
    return _native.xxh3_64(data).to_bytes(8, "little")


def _write(fd: Fd, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd.number, view, offset)
        view, offset = view[done:], offset + done
