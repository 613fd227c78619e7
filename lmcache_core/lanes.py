"""Lanes: the threads and bounded queues of one tier, and the breaker that pauses a failing one.

The engine never waits for a lane: a full queue refuses at once, and whoever waits for a result has a deadline
of its own. A thread stuck in a hung medium takes one lane's thread with it and nothing else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from random import Random
from time import monotonic

from lmcache_core.types import MissReason

Job = Callable[[], None]
"""Work for a lane's thread. Handles its own errors; `cancel` callbacks are run when it is never started."""


class Lane:
    """`threads` daemon threads over one FIFO, bounded in jobs and in bytes."""

    def __init__(self, name: str, threads: int, max_jobs: int, max_bytes: int) -> None:
        self.name = name
        self.max_jobs = max_jobs
        self.max_bytes = max_bytes
        lock = threading.Lock()
        self._ready = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._queue: deque[tuple[Job, Job, int, float]] = deque()
        self._bytes = 0
        self._running = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"lmcache-{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, cancel: Job, nbytes: int, *, admitted: bool = False) -> bool:
        """Queue `job`. False, at once, when the lane is full or closed: the caller drops the work and counts it.

        `cancel` runs instead of the job if the lane closes before its turn. A job larger than the byte bound
        runs alone rather than never. `admitted`: the job is a further part of work that was queued before.
        """
        with self._ready:
            busy = self._running or self._queue
            full = len(self._queue) >= self.max_jobs or (busy and self._bytes + nbytes > self.max_bytes)
            if self._closed or (full and not admitted):
                return False
            self._queue.append((job, cancel, nbytes, monotonic()))
            self._bytes += nbytes
            self._ready.notify()
        return True

    @property
    def inflight_bytes(self) -> int:
        """Bytes of queued and running jobs."""
        return self._bytes

    def _work(self) -> None:
        while True:
            with self._ready:
                while not self._queue:
                    if self._closed:
                        return
                    self._ready.wait()
                job, _, nbytes, _ = self._queue.popleft()
                self._running += 1
            try:
                job()
            finally:
                # Drop the reference before reporting idle: the job holds views of slots.
                del job
                with self._ready:
                    self._running -= 1
                    self._bytes -= nbytes
                    if not self._running and not self._queue:
                        self._idle.notify_all()

    def expire(self, age: float) -> int:
        """Cancel jobs that have waited longer than `age` seconds (their threads are stuck); return how many."""
        if not self._queue:
            return 0
        before = monotonic() - age
        stale: list[Job] = []
        with self._ready:
            while self._queue and self._queue[0][3] < before:
                _, cancel, nbytes, _ = self._queue.popleft()
                self._bytes -= nbytes
                stale.append(cancel)
        for cancel in stale:
            cancel()
        return len(stale)

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is queued or running; False when that took longer than `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._running and not self._queue, timeout)

    def close(self, timeout: float) -> bool:
        """Cancel what is queued, let running jobs end within `timeout` seconds; True when all threads ended."""
        with self._ready:
            self._closed = True
            cancelled = list(self._queue)
            self._queue.clear()
            self._bytes -= sum(nbytes for _, _, nbytes, _ in cancelled)
            self._ready.notify_all()
            self._idle.notify_all()
        for _, cancel, _, _ in cancelled:
            cancel()
        end = monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


class Breaker:
    """Pauses one operation of one tier: closed -> open -> one probe -> closed, with doubling pauses.

    Opens after 5 errors in a row, 20 % errors of at least 20 calls in 10 s, or 3 missed deadlines in a row. The
    pause starts at 1 s, doubles to 60 s, and carries up to 20 % jitter so that many engines do not probe at once.
    """

    ERRORS_IN_A_ROW = 5
    DEADLINES_IN_A_ROW = 3
    WINDOW_S = 10.0
    RATE = 0.2
    RATE_CALLS = 20
    PAUSE_S = (1.0, 60.0)

    def __init__(self, clock: Callable[[], float] = monotonic, seed: int | None = None) -> None:
        self._clock = clock
        self._random = Random(seed)
        self._lock = threading.Lock()
        self._row = 0
        self._deadlines = 0
        self._recent: deque[tuple[float, bool]] = deque()
        self._pause = 0.0
        self._until = 0.0
        self._probing = False
        self.trips = 0

    @property
    def open(self) -> bool:
        """Whether calls are refused now."""
        return self._pause > 0

    @property
    def due(self) -> bool:
        """Whether the pause is over, so that the next call may be the probe."""
        return not self._probing and self._clock() >= self._until

    def allow(self) -> bool:
        """Whether a call may be made now. After the pause exactly one caller gets True, as the probe."""
        if not self._pause:
            return True
        with self._lock:
            if not self._pause:
                return True
            if self._probing or self._clock() < self._until:
                return False
            self._probing = True
            return True

    def record(self, outcome: MissReason | None) -> None:
        """Report a call: None for success, `DEADLINE`, or anything else for an error."""
        with self._lock:
            now = self._clock()
            failed = outcome is not None
            if self._probing:
                self._probing = False
                if failed:
                    self._trip(now)
                else:
                    self._row = self._deadlines = 0
                    self._recent.clear()
                    self._pause = 0.0
                return
            recent = self._recent
            recent.append((now, failed))
            while recent and recent[0][0] < now - self.WINDOW_S:
                recent.popleft()
            if not failed:
                self._row = self._deadlines = 0
                return
            self._row += 1
            self._deadlines = self._deadlines + 1 if outcome is MissReason.DEADLINE else 0
            errors = sum(bad for _, bad in recent)
            if not self._pause and (
                self._row >= self.ERRORS_IN_A_ROW
                or self._deadlines >= self.DEADLINES_IN_A_ROW
                or (len(recent) >= self.RATE_CALLS and errors >= self.RATE * len(recent))
            ):
                self._trip(now)

    def _trip(self, now: float) -> None:
        low, high = self.PAUSE_S
        self._pause = min(high, max(low, self._pause * 2))
        self._until = now + self._pause * (1 + 0.2 * self._random.random())
        self.trips += 1
