"""CUDA without a GPU: the C ABI of csrc/include/lmcache_cuda.h in Python, over host memory that plays the device's.

Work on a stream is put off until somebody waits for it, as late as CUDA may do it: whoever reads, or gives back, what
a stream has not written yet finds the old bytes. Stream 0 is the engine's and runs at once, after what it waits for.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from lmcache_core import _cuda, _native

CUDA_ERROR = -1000
INVALID, NO_MEMORY, LOST = CUDA_ERROR - 1, CUDA_ERROR - 2, CUDA_ERROR - 719


class FakeCuda:
    """What `_cuda._library` is in a test. `lmc_cuda_*` are its functions."""

    def __init__(self, *, total: int = 64 << 20, taken: int = 0, node: str = "0000:3b:00.0") -> None:
        self.total, self.taken, self.node = total, taken, node
        self.devices = 2
        self.fail: dict[str, int] = {}
        """Results of calls that shall fail, by name."""
        self.gate = threading.Event()
        """While it is not set, no event fires for those who wait."""
        self.gate.set()
        self.failed = False
        """Whether a call did; then an event or two may be left behind."""
        self.calls: list[str] = []
        self.memory: dict[int, mmap.mmap] = {}
        self.pinned: dict[int, int] = {}
        self.copied = 0
        """Copies of `copy_batch` that were carried out."""
        self._number = itertools.count(1)
        self._lock = threading.RLock()
        self._streams: dict[int, deque[Callable[[], bool]]] = {0: deque()}
        self._events: dict[int, tuple[int, int]] = {}
        """Event -> the stream it was recorded on and how much of its work comes before; (0, 0) where never."""
        self._done: dict[int, int] = {0: 0}
        self._queued: dict[int, int] = {0: 0}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("lmc_cuda_"):
            raise AttributeError(name)
        name = name.removeprefix("lmc_cuda_")
        work = getattr(self, "_" + name)

        def function(*arguments: Any) -> Any:
            if name == "synchronize":
                self.gate.wait(30)
            with self._lock:
                self.calls.append(name)
                if name in self.fail:
                    self.failed = True
                    return self.fail[name]
                return work(*arguments)

        return function

    def _error(self, result: int) -> bytes:
        return {NO_MEMORY: b"out of memory", LOST: b"unspecified launch failure"}.get(result, b"invalid argument")

    # -- devices and memory ------------------------------------------------------------------------------------
    def _device_count(self) -> int:
        return self.devices

    def _bus_id(self, device: int, out: Any, room: int) -> int:
        out.value = self.node.upper().encode()
        return 0

    def _memory(self, device: int, free: Any, total: Any) -> int:
        free._obj.value = self.total - self.taken - sum(map(len, self.memory.values()))
        total._obj.value = self.total
        return 0

    def _allocate(self, device: int, nbytes: int, out: Any) -> int:
        if nbytes > self.total - self.taken - sum(map(len, self.memory.values())):
            return NO_MEMORY
        memory = mmap.mmap(-1, nbytes)
        out._obj.value = address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self.memory[address] = memory
        return 0

    def _free(self, device: int, address: int) -> int:
        for stream in list(self._streams):
            self._run(stream)  # as cudaFree does
        return 0 if self.memory.pop(address, None) else INVALID

    def _pin(self, address: int, nbytes: int) -> int:
        self.pinned[address] = nbytes
        return 0

    def _unpin(self, address: int) -> int:
        return 0 if self.pinned.pop(address, None) else INVALID

    def _unreachable(self, device: int, addresses: int, count: int) -> int:
        return 0

    # -- streams -----------------------------------------------------------------------------------------------
    def _stream_create(self, device: int, out: Any) -> int:
        out._obj.value = stream = next(self._number)
        self._streams[stream], self._done[stream], self._queued[stream] = deque(), 0, 0
        return 0

    def _stream_destroy(self, stream: int) -> int:
        self._run(stream)
        del self._streams[stream]
        return 0

    def _event_create(self, device: int, out: Any) -> int:
        out._obj.value = event = next(self._number)
        self._events[event] = (0, 0)
        return 0

    def _event_destroy(self, event: int) -> int:
        del self._events[event]
        return 0

    def _record(self, event: int, stream: int) -> int:
        self._events[event] = (stream, self._queued[stream])
        return 0

    def _query(self, event: int) -> int:
        stream, point = self._events[event]
        return int(self._done[stream] >= point)

    def _synchronize(self, event: int) -> int:
        self._run(*self._events[event])
        return 0

    def _wait(self, stream: int, event: int) -> int:
        other, point = self._events[event]
        self._put(stream, lambda: self._run(other, point))
        return 0

    def _put(self, stream: int, work: Callable[[], object]) -> None:
        self._streams[stream].append(work)  # type: ignore[arg-type]
        self._queued[stream] += 1
        if not stream:
            self._run(0)

    def _run(self, stream: int, point: int | None = None) -> None:
        """Do the work of a stream, up to a point."""
        queue = self._streams.get(stream)  # one that was destroyed is done
        while queue and (point is None or self._done[stream] < point):
            queue.popleft()()
            self._done[stream] += 1

    # -- copies ------------------------------------------------------------------------------------------------
    def _copy_batch(self, device: int, to: int, source: int, lengths: int, count: int, stream: int) -> int:
        columns = [
            np.frombuffer(_native.view_at(at, 8 * count), np.int64).tolist() if count else []
            for at in (to, source, lengths)
        ]

        def copy() -> None:
            for target, start, nbytes in zip(*columns, strict=True):
                ctypes.memmove(target, start, nbytes)
                self.copied += 1

        self._put(stream, copy)
        return 0

    def _copy_pages(self, *arguments: Any) -> int:
        parts, _, layers, num_blocks, ids, chunks, blocks, slots, to_slots, skip, how = arguments
        arrays = [
            np.frombuffer(_native.view_at(at, 8 * n), np.int64).copy() if n else np.zeros(0, np.int64)
            for at, n in ((ids, chunks * blocks), (slots, chunks))
        ]
        wrong = (arrays[0] < (-1 if skip else 0)) | (arrays[0] >= num_blocks)
        if wrong.any():
            return int(wrong.argmax()) + 1
        if how._obj.path not in (0, 1, 2):
            return -errno.EINVAL
        own, kept = type(parts).from_buffer_copy(parts), []
        for part in own:  # the caller's may go when the call returns
            kept.append(np.frombuffer(_native.view_at(part.bases, 8 * layers), np.int64).copy())
            part.bases = _native.address_of(kept[-1])

        def copy(_: object = kept) -> None:
            _native.copy_pages(
                own, layers, num_blocks, arrays[0].reshape(chunks, blocks), arrays[1], to_slots=bool(to_slots),
                skip_negative=bool(skip), threads=1,
            )  # fmt: skip

        self._put(how._obj.stream, copy)
        return 0


@contextmanager
def installed(**options: Any) -> Iterator[FakeCuda]:
    """A fake in place of the library; in the end nothing may be left allocated or pinned."""
    fake = FakeCuda(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "_library", fake)
        yield fake
    assert not fake.memory, "device memory was not given back"
    assert not fake.pinned, "host memory stays pinned"
    assert list(fake._streams) == [0] and (fake.failed or not fake._events), "streams or events were not destroyed"
