"""Lanes: bounded, never waiting for the medium, honest about what hangs. Breakers: to the letter, by our own clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import monotonic

import pytest

from lmcache_core.lanes import Breaker, Lane, finish_within
from lmcache_core.types import MissReason

pytestmark = pytest.mark.timeout(60)

DEADLINE, ERROR, BUSY = MissReason.DEADLINE, MissReason.ERROR, MissReason.BUSY


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Jobs that wait for a gate, and a record of what happened to them."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.log: list[tuple[str, object]] = []

    def job(self, name: object, outcome: MissReason | None = None) -> Callable[[], MissReason | None]:
        def run() -> MissReason | None:
            self.begun.release()
            assert self.gate.wait(30)
            self.log.append(("ran", name))
            return outcome

        return run

    def note(self, what: str, name: object) -> Callable[[MissReason], None]:
        return lambda reason: self.log.append((f"{what} {reason}", name))

    def submit(self, lane: Lane, name: object, nbytes: int = 1, **options: object) -> MissReason | None:
        return lane.submit(
            self.job(name), self.note("cancelled", name), nbytes, late=self.note("late", name), **options
        )  # type: ignore[arg-type]


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.gate.set()


@pytest.fixture
def lane(work: Work) -> Iterator[Lane]:
    lane = Lane("test", 1, max_jobs=2, max_bytes=100, deadline=30.0, breaker=Breaker())
    yield lane
    work.gate.set()
    lane.stop()
    assert lane.join(10)
    assert not lane.defects


def occupied(lane: Lane, work: Work, **options: object) -> None:
    """Let a job hang on the lane's one thread."""
    assert work.submit(lane, "running", **options) is None
    assert work.begun.acquire(timeout=30)


# -- lanes -------------------------------------------------------------------------------------------------------
def test_jobs_run_in_order(lane: Lane, work: Work) -> None:
    work.gate.set()
    done: list[int] = []
    for i in range(50):
        while lane.submit(lambda i=i: done.append(i), work.note("cancelled", i), 1) is not None:  # type: ignore[misc]
            assert lane.drain(10)
    assert lane.drain(10)
    assert done == list(range(50)) and lane.inflight_bytes == 0 and lane.room == 100


def test_a_lane_is_bounded_in_jobs(lane: Lane, work: Work) -> None:
    occupied(lane, work)
    assert [work.submit(lane, i) for i in range(4)] == [None, None, BUSY, BUSY]
    work.gate.set()
    assert lane.drain(10)
    assert work.log == [("ran", "running"), ("ran", 0), ("ran", 1)]


def test_a_lane_is_bounded_in_bytes(lane: Lane, work: Work) -> None:
    occupied(lane, work, nbytes=60)
    assert work.submit(lane, "too much", 41) is BUSY
    assert work.submit(lane, "fits", 40) is None
    assert lane.inflight_bytes == 100 and lane.room == 0
    assert work.submit(lane, "a question has no bytes", 0) is None
    work.gate.set()
    assert lane.drain(10) and lane.inflight_bytes == 0


def test_a_job_larger_than_the_lane_runs_alone(lane: Lane, work: Work) -> None:
    occupied(lane, work, nbytes=1000)
    assert work.submit(lane, "other", 1) is BUSY
    work.gate.set()
    assert lane.drain(10)
    assert work.log == [("ran", "running")]


def test_admitted_parts_are_taken_beyond_the_bounds(lane: Lane, work: Work) -> None:
    occupied(lane, work, nbytes=90)
    assert work.submit(lane, "first", 10) is None
    assert [work.submit(lane, i, 50, admitted=True) for i in range(5)] == [None] * 5
    assert work.submit(lane, "other", 1) is BUSY
    work.gate.set()
    assert lane.drain(10)
    assert [name for _, name in work.log] == ["running", "first", 0, 1, 2, 3, 4]


def test_urgent_jobs_go_first(lane: Lane, work: Work) -> None:
    occupied(lane, work)
    work.submit(lane, "bulk")
    work.submit(lane, "question", urgent=True)
    work.gate.set()
    assert lane.drain(10)
    assert [name for _, name in work.log] == ["running", "question", "bulk"]


def test_stop_cancels_what_waits_and_refuses_what_comes(lane: Lane, work: Work) -> None:
    occupied(lane, work)
    work.submit(lane, "waiting")
    lane.stop()
    assert work.log == [(f"cancelled {MissReason.CLOSED}", "waiting")]
    assert work.submit(lane, "late comer") is MissReason.CLOSED
    assert not lane.join(0.01), "a thread is still inside its job"
    work.gate.set()
    assert lane.join(10) and lane.drain(1) and lane.inflight_bytes == 0


def test_a_job_that_raises_is_a_defect_the_lane_survives(work: Work) -> None:
    lane = Lane("test", 1, 9, 100, 30.0, Breaker())
    for error in (RuntimeError("bug"), SystemExit(3)):

        def fail(error: BaseException = error) -> MissReason | None:
            raise error

        assert lane.submit(fail, work.note("cancelled", 0), 7) is None
    work.gate.set()
    assert work.submit(lane, "next") is None
    assert lane.drain(10)
    assert lane.defects == 2 and work.log == [("ran", "next")] and lane.inflight_bytes == 0
    lane.stop()
    assert lane.join(10)


def test_drain_gives_up(lane: Lane, work: Work) -> None:
    occupied(lane, work)
    assert not lane.drain(0.01)


def test_sweep_reports_what_hangs_once_and_cancels_what_waits_behind(work: Work) -> None:
    breaker = Breaker()
    lane = Lane("test", 1, 9, 100, 0.05, breaker)
    occupied(lane, work)
    work.submit(lane, "waiting", deadline=monotonic() + 0.05)
    work.submit(lane, "patient", deadline=monotonic() + 60)
    lane.sweep()
    assert not work.log, "nothing is overdue yet"
    threading.Event().wait(0.1)
    lane.sweep()
    lane.sweep()
    assert work.log == [("late deadline", "running"), ("cancelled deadline", "waiting")]
    # Both count against a medium that holds its thread; the end of the late job counts no more.
    assert breaker._deadlines == 2
    work.gate.set()
    assert lane.drain(10)
    assert breaker._deadlines == 0, "the patient job succeeded"
    lane.stop()
    assert lane.join(10)


def test_a_long_queue_says_nothing_about_the_medium(work: Work) -> None:
    """What waited too long behind others that went well is cancelled; the breaker hears nothing of it."""
    breaker = Breaker()
    lane = Lane("test", 1, 9, 100, 30.0, breaker)
    occupied(lane, work)
    for i in range(5):
        work.submit(lane, i, deadline=monotonic() + 0.01)
    threading.Event().wait(0.05)
    lane.sweep()
    assert [entry for entry in work.log if entry[0] == "cancelled deadline"] == work.log and len(work.log) == 5
    assert lane.inflight_bytes == 1 and not breaker._recent
    work.gate.set()
    assert lane.drain(10)
    lane.stop()


def test_a_job_whose_time_passed_in_the_queue_is_not_begun(work: Work) -> None:
    lane = Lane("test", 1, 9, 100, 30.0, Breaker())
    occupied(lane, work)
    work.submit(lane, "stale", deadline=monotonic() + 0.01)
    threading.Event().wait(0.05)
    work.gate.set()
    assert lane.drain(10)
    assert work.log == [("ran", "running"), ("cancelled deadline", "stale")]
    lane.stop()


def test_a_success_after_the_deadline_is_a_missed_deadline(work: Work) -> None:
    breaker = Breaker()
    lane = Lane("test", 1, 9, 100, 0.02, breaker)
    for _ in range(3):
        occupied(lane, work)
        threading.Event().wait(0.06)
        work.gate.set()
        assert lane.drain(10)
        work.gate.clear()
    assert breaker.open and breaker.trips == 1
    assert work.submit(lane, "next") is MissReason.BREAKER
    lane.stop()


def test_a_probe_that_finds_the_lane_full_does_not_hang_the_breaker(work: Work) -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, seed=1)
    lane = Lane("test", 1, 1, 100, 30.0, Breaker())
    occupied(lane, work)
    work.submit(lane, "waiting")
    for _ in range(5):
        breaker.record(ERROR)
    clock.now += 1.3
    assert work.submit(lane, "probe", breaker=breaker) is BUSY
    assert breaker.trips == 2 and work.submit(lane, "next", breaker=breaker) is MissReason.BREAKER
    clock.now += 2.5
    work.gate.set()
    assert lane.drain(10)
    assert work.submit(lane, "probe", breaker=breaker) is None
    assert lane.drain(10)
    assert not breaker.open
    lane.stop()


def test_threads_work_at_once_and_one_that_hangs_does_not_stop_the_other(work: Work) -> None:
    lane = Lane("test", 2, 9, 100, 30.0, Breaker())
    occupied(lane, work)
    done = threading.Event()
    assert lane.submit(lambda: done.set(), work.note("cancelled", 0), 1) is None  # type: ignore[func-returns-value]
    assert done.wait(10)
    work.gate.set()
    lane.stop()
    assert lane.join(10)


def test_finish_within_waits_no_longer() -> None:
    gate = threading.Event()
    done: list[int] = []
    begin = monotonic()
    finish_within(0.05, [lambda: gate.wait(30), lambda: done.append(1), lambda: gate.wait(30)], "test")
    assert done == [1] and monotonic() - begin < 5
    gate.set()


# -- owners ------------------------------------------------------------------------------------------------------
def test_owners_take_turns(work: Work) -> None:
    lane = Lane("test", 1, max_jobs=64, max_bytes=1000, deadline=30.0, breaker=Breaker())
    occupied(lane, work)
    for name in ("a0", "a1", "a2", "a3", "b0", "b1", "c0"):
        assert work.submit(lane, name, owner=name[0]) is None
    work.gate.set()
    assert lane.drain(10)
    assert [name for _, name in work.log] == ["running", "a0", "b0", "c0", "a1", "b1", "a2", "a3"]
    lane.stop()
    assert lane.join(10) and not lane.defects


@pytest.mark.parametrize("jobs, nbytes", [(16, 1000), (1000, 16)])
def test_one_owner_s_flood_leaves_room_for_the_others(work: Work, jobs: int, nbytes: int) -> None:
    lane = Lane("test", 1, max_jobs=jobs, max_bytes=nbytes, deadline=30.0, breaker=Breaker())
    occupied(lane, work, nbytes=0)

    def flood(owner: str) -> int:
        taken = [work.submit(lane, owner, owner=owner) for _ in range(50)]
        assert set(taken) == {None, BUSY}
        return taken.count(None)

    assert [flood(owner) for owner in "abc"] == [12, 3, 1], "three times what is left free"
    assert work.submit(lane, "owned by nobody") is BUSY
    work.gate.set()
    assert lane.drain(10)
    assert [name for _, name in work.log][1:4] == ["a", "b", "c"]
    lane.stop()
    assert lane.join(10) and not lane.defects


# -- breakers ----------------------------------------------------------------------------------------------------
@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(patience=10.0, clock=clock, seed=7)


def trip(breaker: Breaker) -> None:
    for _ in range(5):
        assert breaker.allow()
        breaker.record(ERROR)
    assert breaker.open and not breaker.allow()


def test_five_errors_in_a_row_open_it_four_do_not(breaker: Breaker) -> None:
    for _ in range(3):
        for _ in range(4):
            breaker.record(ERROR)
        breaker.record(None)
    assert not breaker.open
    for _ in range(4):
        breaker.record(ERROR)
    assert not breaker.open
    breaker.record(ERROR)
    assert breaker.open and breaker.trips == 1


def test_three_missed_deadlines_in_a_row_open_it(breaker: Breaker) -> None:
    for outcome in (DEADLINE, DEADLINE, ERROR, DEADLINE, None, DEADLINE, DEADLINE):
        breaker.record(outcome)
    assert not breaker.open
    breaker.record(DEADLINE)
    assert breaker.open


def test_a_fifth_of_twenty_calls_in_ten_seconds_opens_it(breaker: Breaker, clock: Clock) -> None:
    outcomes = [None, None, ERROR, None, None, None, ERROR, None, None, None, ERROR, None, None, None, None, None]
    for outcome in (*outcomes, None, None, None):
        breaker.record(outcome)
    assert not breaker.open, "three of 19"
    breaker.record(ERROR)
    assert breaker.open, "four of 20"


def test_fewer_than_a_fifth_or_spread_over_more_time_do_not(breaker: Breaker, clock: Clock) -> None:
    for i in range(2000):
        clock.now += 0.01
        breaker.record(ERROR if i % 6 == 5 else None)
    assert not breaker.open, "a sixth"
    clock.now += 11
    for i in range(200):
        clock.now += 1.0
        breaker.record(ERROR if i % 2 == 0 else None)
    assert not breaker.open, "half, but never twenty calls in ten seconds"


def test_the_breaker_remembers_a_bounded_number_of_calls(breaker: Breaker) -> None:
    for _ in range(5000):
        breaker.record(None)
    assert len(breaker._recent) <= Breaker.REMEMBERED_CALLS
    assert breaker._bad == 0


def test_pauses_double_to_a_minute_with_jitter(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    pauses = []
    for base in (1, 2, 4, 8, 16, 32, 60, 60):
        begin = clock.now
        clock.now = begin + base - 0.001
        assert not breaker.allow(), "never before the pause"
        clock.now = begin + base * 1.2
        assert not breaker.refuses, "never more than a fifth later"
        pauses.append((breaker._until - begin) / base)
        assert breaker.allow()
        breaker.record(ERROR)
    assert all(1 <= pause <= 1.2 for pause in pauses) and len({round(p, 6) for p in pauses}) == len(pauses)
    assert breaker.trips == 9


def test_breakers_do_not_probe_in_step(clock: Clock) -> None:
    breakers = [Breaker(clock=clock) for _ in range(20)]
    for breaker in breakers:
        trip(breaker)
    assert len({breaker._until for breaker in breakers}) > 10


def test_one_probe_closes_it(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    clock.now += 1.2
    assert [breaker.allow() for _ in range(5)] == [True, False, False, False, False]
    assert breaker.open and breaker.refuses
    breaker.record(None)
    assert not breaker.open and all(breaker.allow() for _ in range(5))
    # It starts afresh: four errors do not open it, and the next pause is the shortest again.
    for _ in range(4):
        breaker.record(ERROR)
    assert not breaker.open
    breaker.record(ERROR)
    assert 1 <= breaker._until - clock.now <= 1.2


def test_only_one_of_many_threads_probes(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    for pause in (1.2, 2.4, 4.8):
        clock.now += pause
        barrier = threading.Barrier(16)
        allowed: list[bool] = []

        def ask(barrier: threading.Barrier = barrier, allowed: list[bool] = allowed) -> None:
            barrier.wait()
            allowed.append(breaker.allow())

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(allowed) == [False] * 15 + [True]
        breaker.record(ERROR)


def test_a_probe_without_an_answer_is_lost_not_waited_for(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    clock.now += 1.2
    assert breaker.allow()
    clock.now += 9.9
    assert not breaker.allow() and breaker.trips == 1
    clock.now += 0.2
    assert breaker.refuses and breaker.trips == 2, "counted as failed; the next pause runs"
    clock.now += 2.4
    assert breaker.allow()
    breaker.record(None)
    assert not breaker.open


def test_calls_that_end_while_it_is_open_change_nothing(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    until = breaker._until
    for outcome in (None, ERROR, DEADLINE, None):
        breaker.record(outcome)
    assert breaker.open and breaker._until == until and breaker.trips == 1


def test_asking_whether_it_refuses_takes_no_probe(breaker: Breaker, clock: Clock) -> None:
    assert not breaker.refuses
    trip(breaker)
    assert breaker.refuses
    clock.now += 1.2
    assert not breaker.refuses and not breaker.refuses
    assert breaker.allow() and breaker.refuses
    breaker.forgo()
    assert breaker.trips == 2
    breaker.forgo()
    assert breaker.trips == 2, "there was no probe to forgo"


def test_owners_who_come_and_go_do_not_starve_one_who_stays() -> None:
    lane = Lane("test", 1, max_jobs=64, max_bytes=1000, deadline=30.0, breaker=Breaker())
    gate, log, left = threading.Event(), [], [60]

    def refuse(_: MissReason) -> None:
        raise AssertionError

    def steady() -> None:
        log.append("b")

    def fleeting(me: str, other: str) -> Callable[[], None]:
        def run() -> None:
            log.append(me)
            left[0] -= 1
            if left[0] > 0:
                assert lane.submit(fleeting(other, me), refuse, 1, owner=other) is None

        return run

    lane.submit(lambda: gate.wait(30) and None, refuse, 0)
    for _ in range(20):
        assert lane.submit(steady, refuse, 1, owner="b") is None
    assert lane.submit(fleeting("a", "c"), refuse, 1, owner="a") is None
    assert lane.submit(lambda: log.append("c"), refuse, 1, owner="c") is None
    gate.set()
    assert lane.drain(10)
    lane.stop()
    first = "".join(log[:40])
    assert first.count("b") >= 10, first
