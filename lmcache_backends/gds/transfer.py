"""Whole batches of page-aligned reads and writes, one GIL-free call each."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmcache_core import _native
from lmcache_core.errors import NoSpace
from lmcache_core.types import PAGE, round_up

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Span(NamedTuple):
    """A file range, page aligned, and the memory it is copied from or to."""

    fd: int
    offset: int
    address: int
    nbytes: int


def span(fd: int, offset: int, buffer: memoryview, nbytes: int) -> Span:
    """The range for an object of `nbytes` in `buffer`, padded to whole pages.

    The padding reaches at most to the end of the buffer's last page, which is mapped because the buffer is page
    aligned. Raise `ValueError` for a buffer that is not.
    """
    address: int = np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0]
    if address % PAGE:
        raise ValueError(f"buffer at {address:#x} is not aligned to {PAGE} bytes")
    return Span(fd, offset, address, round_up(nbytes))


def read(spans: Sequence[Span]) -> list[int]:
    """Bytes read for each span (fewer at the end of the file), or a negative errno."""
    return [int(n) for n in _native.pread_batch(*_columns(spans))]


def write(spans: Sequence[Span]) -> list[int]:
    """Bytes written for each span, or a negative errno."""
    return [int(n) for n in _native.pwrite_batch(*_columns(spans))]


def failure(result: int, name: str) -> OSError | NoSpace:
    """The exception for a transfer that returned `result` instead of all its bytes."""
    if -result in _NO_ROOM:
        return NoSpace(f"{name}: {os.strerror(-result)}")
    if result < 0:
        return OSError(-result, os.strerror(-result), name)
    return OSError(errno.EIO, f"short transfer of {result} bytes", name)


def no_space(error: OSError, name: str) -> OSError | NoSpace:
    """`NoSpace` for the errors that evicting may cure, else the error itself."""
    return failure(-error.errno, name) if error.errno in _NO_ROOM else error


def _columns(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    fds, offsets, addresses, lengths = zip(*spans, strict=True)
    return (
        np.array(fds, dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(addresses, dtype=np.int64),
        np.array(lengths, dtype=np.int64),
    )
