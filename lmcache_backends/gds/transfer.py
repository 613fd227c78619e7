"""Whole batches of page-aligned reads and writes, one GIL-free call each."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from lmcache_backends.gds.folder import NO_ROOM
from lmcache_core import _native
from lmcache_core.errors import NoSpace
from lmcache_core.types import PAGE, round_up


class Span(NamedTuple):
    """A file range, page aligned, and the memory it is copied from or to."""

    fd: int
    offset: int
    address: int
    nbytes: int


def span(fd: int, offset: int, buffer: memoryview, nbytes: int, *, pad: bool = True) -> Span:
    """The range for an object of `nbytes` in `buffer`, padded to whole pages unless told otherwise.

    The padding reaches at most to the end of the buffer's last page, which is mapped because the buffer is page
    aligned. Raise `ValueError` for a buffer that is not.
    """
    address = _native.address_of(buffer)
    if address % PAGE:
        raise ValueError(f"buffer at {address:#x} is not aligned to {PAGE} bytes")
    return Span(fd, offset, address, round_up(nbytes) if pad else nbytes)


def read(spans: Sequence[Span]) -> list[int]:
    """Bytes read for each span (fewer at the end of the file), or a negative errno."""
    results: list[int] = _native.pread_batch(*zip(*spans, strict=True)).tolist()
    return results


def write(spans: Sequence[Span]) -> list[int]:
    """Bytes written for each span, or a negative errno."""
    results: list[int] = _native.pwrite_batch(*zip(*spans, strict=True)).tolist()
    return results


def failure(result: int, name: str) -> OSError | NoSpace:
    """The exception for a transfer that returned `result` instead of all its bytes."""
    if -result in NO_ROOM:
        return NoSpace(f"{name}: {os.strerror(-result)}")
    if result < 0:
        return OSError(-result, os.strerror(-result), name)
    return OSError(errno.EIO, f"short transfer of {result} bytes", name)


def no_space(error: OSError, name: str) -> OSError | NoSpace:
    """`NoSpace` for the errors that evicting may cure, else the error itself."""
    return failure(-error.errno, name) if error.errno in NO_ROOM else error
