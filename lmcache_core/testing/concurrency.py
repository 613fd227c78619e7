"""Making threads meet: what the kits share."""

from __future__ import annotations

import sys
import threading
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from time import perf_counter, sleep

HELD_S = 0.01
"""How long a call may keep every other Python thread waiting: twice what Python itself lets a thread keep the GIL."""

CHANCES = 6
"""How often a call is watched before it is said to hold others up."""


@contextmanager
def switching_often() -> Iterator[None]:
    """Let Python switch threads every 0.1 ms instead of every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def together(work: Callable[[int], None], threads: int) -> None:
    """Run `work(0)` to `work(threads - 1)` at once, switching often; raise the first failure."""
    failures: list[BaseException] = []
    start = threading.Barrier(threads)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    with switching_often():
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    if failures:
        raise failures[0]


def for_a_while(most: int, seconds: float) -> Iterator[int]:
    """Turns for a thread: `most`, or fewer on a slow medium."""
    until = perf_counter() + seconds
    for turn in range(most):
        if turn and perf_counter() > until:
            return
        yield turn


def held_beside(call: Callable[[], object], seconds: float = 0.1) -> float:
    """How long `call` keeps another thread from its turn, in seconds; 0 if no longer than is allowed.

    `call` is made again and again for `seconds`, beside a thread that sleeps and notes the time. What counts is the
    longest time within a call without a note, and of these the shortest: a busy machine stops a thread in one call or
    another, a held GIL in every one. Allowed is `HELD_S`, a fifth of a long call, or twice what Python that only counts
    does: a machine so busy takes a thread off its processor with the GIL in its hands.
    """
    held, lasted = _longest_wait(call, seconds)
    if held <= max(HELD_S, lasted / 5):
        return 0.0
    busy, _ = _longest_wait(partial(_count, lasted), seconds)
    return held if held > 2 * busy else 0.0


def _count(seconds: float) -> None:
    until = perf_counter() + seconds
    while perf_counter() < until:
        pass


def _longest_wait(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Of the call that kept another thread waiting least: for how long at once, and how long it lasted, in seconds."""
    notes: list[float] = []
    spans: list[tuple[float, float]] = []
    ended = threading.Event()
    until = perf_counter() + 60  # a call that hangs does not leave a thread behind for ever

    def tick() -> None:
        while not ended.is_set() and perf_counter() < until:
            sleep(0.0005)
            notes.append(perf_counter())

    ticker = threading.Thread(target=tick)
    with switching_often():
        ticker.start()
        try:
            start = perf_counter()
            while not spans or spans[-1][1] - start < seconds:
                began = perf_counter()
                call()
                spans.append((began, perf_counter()))
        finally:
            ended.set()
            ticker.join()

    def waited(began: float, end: float) -> float:
        turns = [began, *notes[bisect(notes, began) : bisect(notes, end)], end]
        return max(after - before for before, after in pairwise(turns))

    return min((waited(began, end), end - began) for began, end in spans)
