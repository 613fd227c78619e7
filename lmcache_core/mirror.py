"""The GPU tier: copies of host slots in device memory, and what moves between the two.

A *place* of the device holds a copy of one host slot, for as long as the slot holds its chunk. Keys, eviction of
chunks, quotas, clearing and everything on a medium know host slots only; what becomes free there is forgotten here. So
a copy can never outlive or differ from what it is a copy of, and losing one loses nothing.

Up: the copy engine moves whole chunks on a stream of its own, and the caller's stream waits for it. Down: a store fills
places at device speed, its pages are free when that is done, and the bytes follow to the host on another stream; the
chunks are published when they have arrived. Slots and places change hands when the caller's stream has passed them,
which one thread waits for. Copies are queued in the order in which places are given out.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcache_core.gpu import CudaError, Event, Stream, copy_batch
from lmcache_core.protocols import MemoryBackend, Region
from lmcache_core.slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALIGNMENT = 256
"""Of places, in bytes: what a GPU's memory transactions and 16-byte vectors want."""

_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Use:
    """Slots and places that work queued on a stream reads or writes."""

    stream: int
    places: list[int]
    """Of the first so many slots; -1 where the work uses the slot itself."""
    passed: Event
    """For the end of that work. Made before the work is: where none can be had, none may be queued."""


def place_bytes(chunk_bytes: int) -> int:
    """Bytes of device memory that the copy of one chunk takes; it has no header."""
    return -(-chunk_bytes // ALIGNMENT) * ALIGNMENT


class Mirror:
    """See the module. Thread-safe; nothing but `drain` and `close` waits for the device."""

    def __init__(self, name: str, memory: MemoryBackend, region: Region, slots: Slots) -> None:
        """`region` is device memory of `memory`, `slots` lie in host memory that is pinned. Raise `CudaError`."""
        if memory.device is None:
            raise ValueError(f"tier {name}: this is no device memory")
        self.name = name
        self.device = memory.device
        self.place_bytes = place_bytes(slots.chunk_bytes)
        self.count = region.nbytes // self.place_bytes
        self.counts: Counter[str] = Counter()
        self.last_error = ""
        self._memory, self._region, self._slots = memory, region, slots
        self._lock = threading.Lock()
        """Of the books; the innermost of all locks."""
        self._place_of: dict[int, int] = {}
        """Slot -> the place of its copy, least recently used first."""
        self._slot_of = [_NOWHERE] * self.count
        self._pins = [0] * self.count
        self._free = list(range(self.count - 1, -1, -1))
        self._order = threading.Lock()
        self._up, self._down = Stream(self.device), Stream(self.device)
        self._risen = Event(self.device)
        """Fires when all that was queued on the way up has arrived."""
        self._jobs: deque[tuple[Event, Callable[[CudaError | None], None]]] = deque()
        self._state = threading.Condition()
        self._working = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-device", daemon=True)
        self._thread.start()
        slots.freed = self.forget

    # -- for the caller's stream -------------------------------------------------------------------------------
    def bring(self, slots: Sequence[int], stream: int) -> tuple[NDArray[np.int64], Use, list[bool]]:
        """Addresses from which work queued on `stream` from now on can read the chunks of pinned slots.

        What has no copy yet gets one, as far as there is room, and is read from its slot otherwise. Also: which had a
        copy. `after` ends the use.
        """
        passed = Event(self.device)
        with self._order:
            with self._lock:
                places = [self._pin(slot) for slot in slots]
                found = [place != _NOWHERE for place in places]
                absent = [i for i, here in enumerate(found) if not here]
                fresh = self._take(len(absent))
            rising = absent[: len(fresh)]
            try:
                if fresh:
                    self._copy(fresh, [slots[i] for i in rising], self._up, up=True)
                    self._risen.record(self._up.handle)
                self._risen.hold(stream)
            except BaseException:
                with self._lock:
                    self._unpin([*(place for place in places if place != _NOWHERE), *fresh])
                with suppress(CudaError):
                    passed.close()
                raise
            with self._lock:
                for i, place in zip(rising, fresh, strict=True):
                    places[i] = place
                    self._attach(slots[i], place)
                for slot in reversed(slots):  # deepest first: the beginning of a prefix is the warmest
                    if slot in self._place_of:
                        self._place_of[slot] = self._place_of.pop(slot)
                self.counts["hit"] += sum(found)
                self.counts["promoted"] += len(fresh)
                self.counts["beside"] += len(absent) - len(fresh)
        return self._addresses(slots, places), Use(stream, places, passed), found

    def room(self, slots: Sequence[int], stream: int) -> tuple[NDArray[np.int64], Use]:
        """Addresses to which work queued on `stream` from now on can write chunks for reserved slots: places, then the
        slots themselves where there are no more. `land` or `after` ends the use."""
        passed = Event(self.device)
        with self._order:
            with self._lock:
                taken = self._take(len(slots))
            places = taken + [_NOWHERE] * (len(slots) - len(taken))
            try:
                self._risen.hold(stream)  # an abandoned promotion may still be writing there
            except BaseException:
                with self._lock:
                    self._unpin(taken)
                with suppress(CudaError):
                    passed.close()
                raise
        return self._addresses(slots, places), Use(stream, places, passed)

    def land(self, use: Use, slots: Sequence[int], commit: Callable[[], object], abort: Callable[[], object]) -> None:
        """Copy down what the stream's work has left in places, then `commit`; `abort` if CUDA fails. Never waits."""
        held = [(slot, place) for slot, place in zip(slots, use.places, strict=False) if place != _NOWHERE]
        places = [place for _, place in held]
        uncopied: list[CudaError] = []

        def ended(error: CudaError | None) -> None:
            if error is None and not uncopied:
                with self._lock:
                    # Before anybody can see the slot: should it be given back, its copy is forgotten.
                    for slot, place in held:
                        self._attach(slot, place)
                    self.counts["demoted"] += len(held)
                commit()
            else:
                abort()
            with self._lock:
                self._unpin(places)

        with self._order:
            try:
                use.passed.record(use.stream)
                use.passed.hold(self._down.handle)
                try:
                    if held:
                        self._copy(places, [slot for slot, _ in held], self._down, up=False)
                except CudaError as error:
                    self._failed(error)
                    uncopied.append(error)  # some may be on their way: not before they have ended
                use.passed.record(self._down.handle)
            except CudaError as error:
                self._failed(error)
                abort()
                with self._lock:
                    self._unpin(places)
                return
            self._later(use.passed, ended)

    def after(self, use: Use, then: Callable[[], object]) -> None:
        """Call `then`, and let go of the places, when what was queued on the stream is done. Never waits."""

        def ended(_: CudaError | None) -> None:
            with self._lock:
                self._unpin([place for place in use.places if place != _NOWHERE])
            then()

        try:
            use.passed.record(use.stream)
        except CudaError as error:
            self._failed(error)
            ended(error)
            return
        self._later(use.passed, ended)

    # -- books -------------------------------------------------------------------------------------------------
    def forget(self, slots: Sequence[int]) -> None:
        """The slots' chunks are gone."""
        with self._lock:
            for slot in slots:
                place = self._place_of.pop(slot, None)
                if place is not None:
                    self._detach(place)

    def clear(self) -> None:
        """Forget every copy."""
        with self._lock:
            slots = list(self._place_of)
        self.forget(slots)

    def _pin(self, slot: int) -> int:
        place = self._place_of.get(slot, _NOWHERE)
        if place != _NOWHERE:
            self._pins[place] += 1
        return place

    def _take(self, want: int) -> list[int]:
        """Up to `want` places, pinned, out of free ones and of the copies used least recently. Lock held."""
        if len(self._free) < want:
            cold: list[int] = []
            for slot, place in self._place_of.items():
                if not self._pins[place]:
                    cold.append(slot)
                    if len(cold) == want - len(self._free):
                        break
            for slot in cold:
                self._detach(self._place_of.pop(slot))
            self.counts["evicted"] += len(cold)
        taken = self._free[::-1][:want]
        del self._free[len(self._free) - len(taken) :]
        for place in taken:
            self._pins[place] = 1
        return taken

    def _attach(self, slot: int, place: int) -> None:
        """A place holds a slot's chunk. A second copy stays nobody's, and is free with its last pin."""
        if slot not in self._place_of:
            self._place_of[slot] = place
            self._slot_of[place] = slot

    def _detach(self, place: int) -> None:
        self._slot_of[place] = _NOWHERE
        if not self._pins[place]:
            self._free.append(place)

    def _unpin(self, places: Sequence[int]) -> None:
        for place in places:
            self._pins[place] -= 1
            if not self._pins[place] and self._slot_of[place] == _NOWHERE:
                self._free.append(place)

    # -- the device --------------------------------------------------------------------------------------------
    def _addresses(self, slots: Sequence[int], places: Sequence[int]) -> NDArray[np.int64]:
        at = np.array(places, dtype=np.int64)
        here = self._slots.offsets(slots) + self._slots.region.address
        return np.where(at == _NOWHERE, here, at * self.place_bytes + self._region.address)

    def _copy(self, places: Sequence[int], slots: Sequence[int], stream: Stream, *, up: bool) -> None:
        there = np.array(places, dtype=np.int64) * self.place_bytes + self._region.address
        here = self._slots.offsets(slots) + self._slots.region.address
        lengths = np.full(len(slots), self._slots.chunk_bytes, dtype=np.int64)
        copy_batch(*((there, here) if up else (here, there)), lengths, stream.handle, self.device)

    def _later(self, event: Event, then: Callable[[CudaError | None], None]) -> None:
        with self._state:
            self._working += 1
            self._jobs.append((event, then))
            self._state.notify_all()

    def _run(self) -> None:
        while True:
            with self._state:
                while not self._jobs and not self._stopping:
                    self._state.wait()
                if not self._jobs:
                    return
                event, then = self._jobs.popleft()
            failure = None
            try:
                event.synchronize()
                event.close()
            except CudaError as error:
                failure = error
                self._failed(error)
            try:
                then(failure)
            except Exception as error:
                self._failed(error)  # a commit may meet a broken plugin; the next one must still be done
            finally:
                with self._state:
                    self._working -= 1
                    self._state.notify_all()

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.counts["errors"] += 1
            self.last_error = f"{type(error).__name__}: {error}"

    # -- life --------------------------------------------------------------------------------------------------
    def drain(self, timeout: float) -> bool:
        """Wait until nothing is on its way and nobody uses a place; False after `timeout` seconds."""
        end = monotonic() + timeout
        with self._state:
            while self._working:
                left = end - monotonic()
                if left <= 0:
                    return False
                self._state.wait(left)
        return True

    def close(self, timeout: float) -> bool:
        """Release the device memory. False, and it stays, when the device is not done within `timeout` seconds."""
        if not self.drain(timeout):
            return False
        with self._state:
            self._stopping = True
            self._state.notify_all()
        self._thread.join(timeout)
        try:
            for thing in (self._risen, self._up, self._down):
                thing.close()
            self._memory.close()
        except CudaError as error:
            self._failed(error)
        return True

    def stats(self) -> dict[str, Any]:
        """Counters since start-up in chunks, and what is held now. Plain data."""
        with self._lock:
            return {
                "device": self.device,
                "slots": self.count,
                "slot_bytes": self.place_bytes,
                "ready": len(self._place_of),
                "free": len(self._free),
                "pinned": sum(1 for pins in self._pins if pins),
                **{name: self.counts[name] for name in ("hit", "promoted", "demoted", "beside", "evicted", "errors")},
                "last_error": self.last_error,
            }

    def check(self, *, idle: bool = False) -> None:
        """Raise `AssertionError` when the books do not add up; with `idle`, also when anything is still held."""
        with self._lock:
            loose = sum(1 for p, pins in enumerate(self._pins) if pins and self._slot_of[p] == _NOWHERE)
            total = len(self._free) + len(self._place_of) + loose
            assert total == self.count, f"{self.name}: {self.count} places, {total} in the books"
            assert all(self._slot_of[place] == slot for slot, place in self._place_of.items()), "a copy of another slot"
            assert len(set(self._free)) == len(self._free), "a place is free twice"
            assert min(self._pins, default=0) >= 0 and not any(self._pins[place] for place in self._free)
            assert not idle or not any(self._pins), f"{self.name}: places are held"
