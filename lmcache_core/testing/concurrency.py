"""Making threads meet: what the kits share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter, sleep

SELDOM = 0.2
"""Share of its turns below which a thread is held up."""

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


def progress_beside(call: Callable[[], object], seconds: float = 0.1) -> float:
    """How often another thread gets a turn beside `call`, relative to beside a sleep.

    Where that is seldom, relative to beside copies of memory, if this is more: on a busy machine a thread that computes
    is taken off its processor with the GIL in its hands, which is no fault of its own.
    """
    turns = 0
    ended = threading.Event()
    until = perf_counter() + 60  # a call that hangs does not leave a thread behind for ever

    def tick() -> None:
        nonlocal turns
        while not ended.is_set() and perf_counter() < until:
            sleep(0.0005)
            turns += 1

    def rate(work: Callable[[], object]) -> float:
        before, began, calls = turns, perf_counter(), 0
        while (spent := perf_counter() - began) < seconds:
            work()
            calls += 1
        # Between two calls there is always a turn or two; beside long calls these are told from turns within.
        between = 2 * calls if spent > 0.01 * calls else 0
        return max(turns - before - between, 0) / spent

    ticker = threading.Thread(target=tick)
    with switching_often():
        ticker.start()
        try:
            share = rate(call) / max(rate(partial(sleep, seconds)), 1.0)
            if share < SELDOM:
                block = bytearray(256 << 10)
                share = max(share, rate(call) / max(rate(partial(bytes, block)), 1.0))
            return share
        finally:
            ended.set()
            ticker.join()
