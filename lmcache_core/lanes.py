"""Lanes: the threads and bounded queues of one tier, and the breaker that pauses a failing one.

The engine never waits for a lane: a full queue refuses at once, and whoever waits for a result has a deadline
of its own. A thread stuck in a hung medium takes one lane's thread with it and nothing else: `sweep`, which every
engine call makes, cancels what waits behind it and tells those who wait for it.

Jobs may belong to somebody, a tenant: then owners take turns, and none may hold more than three times what it leaves
free, so that whoever comes next finds room (Choudhury and Hahne, "Dynamic queue length thresholds", IEEE/ACM
Transactions on Networking 6(2), 1998).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from time import monotonic

from lmcache_core.types import MissReason

Job = Callable[[], MissReason | None]
"""Work for a lane's thread. Handles its own errors; returns what the breaker shall hear, None for success."""

GiveUp = Callable[[MissReason], None]
"""Told instead of running a job (`cancel`), or about one that runs past its deadline (`late`)."""


def _nothing(_: MissReason) -> None:
    pass


@dataclass(slots=True, eq=False)
class _Item:
    """One job, queued or running."""

    job: Job
    cancel: GiveUp
    late: GiveUp
    nbytes: int
    breaker: Breaker
    owner: str | None
    deadline: float
    patience: float
    overdue_at: float
    reported: bool = False

    def begin(self, now: float) -> None:
        """A medium is not blamed for time spent in the queue: it gets half the time even when started late."""
        self.overdue_at = max(self.deadline, now + self.patience)


class Lane:
    """`threads` daemon threads over one queue, bounded in jobs and in bytes, behind a breaker."""

    def __init__(
        self, name: str, threads: int, max_jobs: int, max_bytes: int, deadline: float, breaker: Breaker
    ) -> None:
        """`deadline`: seconds a job may take, waiting included."""
        self.name = name
        self.max_jobs = max_jobs
        self.max_bytes = max_bytes
        self.deadline = deadline
        self.breaker = breaker
        self.defects = 0
        """Jobs that raised. They must not; the thread survives, and `check()` fails."""
        lock = threading.Lock()
        self._ready = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._queue: deque[_Item] = deque()
        self._running: set[_Item] = set()
        self._bytes = 0
        self._turns: dict[str | None, int] = {}
        """Of owners with jobs in the queue: who had how early a turn."""
        self._turn = 0
        self._earliest = 0.0
        """No queued job has an earlier deadline, unless the queue is empty."""
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"lmcache-{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        job: Job,
        cancel: GiveUp,
        nbytes: int,
        *,
        late: GiveUp = _nothing,
        deadline: float | None = None,
        breaker: Breaker | None = None,
        urgent: bool = False,
        admitted: bool = False,
        owner: str | None = None,
    ) -> MissReason | None:
        """Queue `job`. None when it was taken, else why not, at once: the caller drops the work and counts it.

        `cancel` is called instead of the job if the lane closes or the deadline passes before its turn, `late` once
        if it runs past its deadline; both with no lock held. `deadline` is a `monotonic()` time; `breaker` is another
        than the lane's own. An `urgent` job goes first. An `admitted` one is a further part of work that was taken
        before, and is taken whatever the bounds say. A job larger than the byte bound runs alone rather than never.
        Jobs of an `owner` wait for that owner's turn, and may take that owner's part of the bounds only.
        """
        breaker = breaker or self.breaker
        paused = breaker.open
        if not breaker.allow():
            return MissReason.BREAKER
        now = monotonic()
        end = now + self.deadline if deadline is None else deadline
        item = _Item(job, cancel, late, nbytes, breaker, owner, end, (end - now) / 2, end)
        with self._ready:
            queue = self._queue
            busy = self._running or queue
            full = len(queue) >= self.max_jobs or (busy and nbytes and self._bytes + nbytes > self.max_bytes)
            full = full or (owner is not None and self._is_greedy(owner, nbytes))
            if self._closed:
                refusal = MissReason.CLOSED
            elif full and not admitted:
                refusal = MissReason.BUSY
            else:
                self._earliest = min(self._earliest, item.deadline) if queue else item.deadline
                if urgent:
                    queue.appendleft(item)
                else:
                    queue.append(item)
                self._bytes += nbytes
                self._ready.notify()
                return None
            stuck = self._is_stuck()
        if paused:
            breaker.forgo()
        elif stuck:
            breaker.record(MissReason.DEADLINE)
        return refusal

    @property
    def inflight_bytes(self) -> int:
        """Bytes of queued and running jobs."""
        return self._bytes

    @property
    def room(self) -> int:
        """Bytes that `submit` would take now; when it is stuck, all it ever takes, so that its refusals are heard."""
        with self._ready:
            return self.max_bytes if self._is_stuck() else max(0, self.max_bytes - self._bytes)

    def _is_stuck(self) -> bool:
        """Whether every running job is overdue: then what waits, waits for the medium and not for its turn."""
        return bool(self._running) and all(item.reported for item in self._running)

    def _is_greedy(self, owner: str, nbytes: int) -> bool:
        """Whether another job would be more than the owner's part of the bounds. A first one never is."""
        held = [item.nbytes for item in (*self._queue, *self._running) if item.owner == owner]
        left = self.max_bytes - self._bytes - nbytes
        room = self.max_jobs - len(self._queue) - 1
        return bool(held) and (sum(held) + nbytes > 3 * left or len(held) + 1 > 3 * room)

    def _next(self) -> _Item:
        """The next job: the first in the queue, but owners take turns."""
        queue = self._queue
        if queue[0].owner is None:
            return queue.popleft()
        first: dict[str | None, int] = {}
        for at, item in enumerate(queue):
            first.setdefault(item.owner, at)
        # Who comes anew has waited as long as whoever waits longest, and no longer: else those who come and go would
        # always be before those who stay.
        earliest = min((self._turns[owner] for owner in first if owner in self._turns), default=self._turn)
        turns = {owner: self._turns.get(owner, earliest) for owner in first}
        owner = min(first, key=turns.__getitem__)
        self._turn += 1
        self._turns = turns | {owner: self._turn}
        item = queue[first[owner]]
        del queue[first[owner]]
        return item

    def _work(self) -> None:
        while True:
            with self._ready:
                while not self._queue:
                    if self._closed:
                        return
                    self._ready.wait()
                item = self._next()
                now = monotonic()
                item.begin(now)
                self._running.add(item)
            try:
                if now >= item.deadline:
                    item.cancel(MissReason.DEADLINE)
                else:
                    self._run(item)
            except (Exception, SystemExit):
                with self._ready:
                    self.defects += 1
            finally:
                with self._ready:
                    self._running.remove(item)
                    self._bytes -= item.nbytes
                    # Drop the reference before reporting idle: the job may keep views of slots alive.
                    del item
                    if not self._running and not self._queue:
                        self._idle.notify_all()

    def _run(self, item: _Item) -> None:
        outcome: MissReason | None = MissReason.ERROR
        try:
            outcome = item.job()
        finally:
            with self._ready:
                reported, item.reported = item.reported, True
            if not reported:
                item.breaker.record(MissReason.DEADLINE if monotonic() >= item.overdue_at else outcome)

    def sweep(self) -> None:
        """Give up on what is overdue: cancel queued jobs, tell about running ones. Never waits for the medium.

        Jobs that waited too long count against the medium only when the lane is stuck: a queue that is merely long says
        nothing about it.
        """
        if not self._queue and not self._running:
            return
        now = monotonic()
        stale: list[_Item] = []
        with self._ready:
            overdue = [item for item in self._running if not item.reported and now >= item.overdue_at]
            for item in overdue:
                item.reported = True
            if self._queue and now >= self._earliest:
                stale = [item for item in self._queue if now >= item.deadline]
                self._queue = deque(item for item in self._queue if now < item.deadline)
                self._earliest = min((item.deadline for item in self._queue), default=0.0)
                self._bytes -= sum(item.nbytes for item in stale)
                if not self._running and not self._queue:
                    self._idle.notify_all()
            stuck = self._is_stuck()
        for item in overdue:
            item.breaker.record(MissReason.DEADLINE)
            item.late(MissReason.DEADLINE)
        for item in stale:
            if stuck:
                item.breaker.record(MissReason.DEADLINE)
            item.cancel(MissReason.DEADLINE)

    def drain(self, timeout: float) -> bool:
        """Wait until nothing is queued or running; False when that took longer than `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._running and not self._queue, timeout)

    def stop(self) -> None:
        """Take no more work and cancel what is queued. Does not wait."""
        with self._ready:
            self._closed = True
            cancelled = list(self._queue)
            self._queue.clear()
            self._bytes -= sum(item.nbytes for item in cancelled)
            self._ready.notify_all()
            if not self._running:
                self._idle.notify_all()
        for item in cancelled:
            item.cancel(MissReason.CLOSED)

    def join(self, timeout: float) -> bool:
        """After `stop`, wait for the running jobs; True when all threads ended within `timeout` seconds."""
        end = monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def finish_within(timeout: float, works: Sequence[Callable[[], object]], name: str) -> None:
    """Run each of `works`, which handle their own errors, on a thread of its own; wait at most `timeout` seconds."""
    end = monotonic() + timeout
    threads = [threading.Thread(target=work, name=f"lmcache-{name}", daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - monotonic()))


class Breaker:
    """Pauses one operation of one tier: closed -> open -> one probe -> closed, with doubling pauses.

    Opens after 5 errors in a row, 20 % errors of at least 20 calls in 10 s, or 3 missed deadlines in a row. The
    pause starts at 1 s, doubles to 60 s, and carries up to 20 % jitter so that many engines do not probe at once.
    A probe that nobody reports on counts as failed after `patience` seconds.
    """

    ERRORS_IN_A_ROW = 5
    DEADLINES_IN_A_ROW = 3
    WINDOW_S = 10.0
    RATE = 0.2
    RATE_CALLS = 20
    REMEMBERED_CALLS = 1000
    PAUSE_S = (1.0, 60.0)

    def __init__(self, patience: float = 10.0, clock: Callable[[], float] = monotonic, seed: int | None = None) -> None:
        self._patience = patience
        self._clock = clock
        self._random = Random(seed)
        self._lock = threading.Lock()
        self._row = 0
        self._deadlines = 0
        self._recent: deque[tuple[float, bool]] = deque()
        self._bad = 0
        """Errors among the recent calls."""
        self._pause = 0.0
        self._until = 0.0
        self._probing: float | None = None
        """When the probe under way counts as lost."""
        self._since = 0.0
        """When it last opened or closed, by the clock."""
        self.trips = 0

    @property
    def open(self) -> bool:
        """Whether the operation is paused, or being probed."""
        return self._pause > 0

    @property
    def refuses(self) -> bool:
        """Whether `allow` would say no now. Takes nothing: the next `allow` may still be the probe."""
        if not self._pause:
            return False
        with self._lock:
            return self._refuses(self._clock())

    def allow(self) -> bool:
        """Whether a call may be made now. After the pause exactly one caller gets True, as the probe."""
        if not self._pause:
            return True
        with self._lock:
            now = self._clock()
            if self._refuses(now):
                return False
            if self._pause:
                self._probing = now + self._patience
            return True

    def _refuses(self, now: float) -> bool:
        if self._probing is not None and now >= self._probing:
            self._trip(now)
        return self._pause > 0 and (self._probing is not None or now < self._until)

    def forgo(self) -> None:
        """The call that was allowed as the probe could not be made."""
        with self._lock:
            if self._probing is not None:
                self._trip(self._clock())

    def record(self, outcome: MissReason | None) -> None:
        """Report a call: None for success, `DEADLINE`, or anything else for an error."""
        with self._lock:
            now = self._clock()
            failed = outcome is not None
            if self._probing is not None:
                if failed:
                    self._trip(now)
                else:
                    self._row = self._deadlines = self._bad = 0
                    self._recent.clear()
                    self._pause = 0.0
                    self._probing = None
                    self._since = now
                return
            recent = self._recent
            recent.append((now, failed))
            self._bad += failed
            while recent[0][0] < now - self.WINDOW_S or len(recent) > self.REMEMBERED_CALLS:
                self._bad -= recent.popleft()[1]
            if not failed:
                self._row = self._deadlines = 0
                return
            self._row += 1
            self._deadlines = self._deadlines + 1 if outcome is MissReason.DEADLINE else 0
            if not self._pause and (
                self._row >= self.ERRORS_IN_A_ROW
                or self._deadlines >= self.DEADLINES_IN_A_ROW
                or (len(recent) >= self.RATE_CALLS and self._bad >= self.RATE * len(recent))
            ):
                self._trip(now)

    def _trip(self, now: float) -> None:
        low, high = self.PAUSE_S
        if not self._pause:
            self._since = now
        self._pause = min(high, max(low, self._pause * 2))
        self._until = now + self._pause * (1 + 0.2 * self._random.random())
        self._probing = None
        self.trips += 1

    def stats(self) -> dict[str, str | int | float | None]:
        """The state now: `closed`, `open` or `probing`; how often it opened, and for how many seconds it is as it is
        (None when it never opened)."""
        with self._lock:
            now = self._clock()
            state = "closed" if not self._pause else "open" if self._probing is None else "probing"
            since = round(now - self._since, 3) if self.trips else None
            return {"state": state, "trips": self.trips, "for_s": since}
