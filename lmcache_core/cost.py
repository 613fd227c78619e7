"""The cost rule: never wait longer for stored KV than computing it again would take.

Two speeds are measured: how long a tier takes to read (`ReadSpeed`), and how long the engine takes to compute tokens
(`Recompute`). Both forget: what counts is how fast they are now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

_FORGET = 0.85
"""Weight that a measurement keeps when the next one comes: about the last seven count."""

_STALE = 0.1
"""Weight that all measurements keep when a probe comes: the next batches that are really read shall count."""

_PREFILL_FORGET = 0.8


@dataclass(frozen=True, slots=True)
class ReadEstimate:
    """What one batch costs: so many seconds for each batch, and so many for each byte of it."""

    fixed_s: float
    per_byte_s: float


class ReadSpeed:
    """How long one tier takes to read a batch: a fixed part and a part per byte, from the batches it really read.

    A weighted least-squares line through the recent batches (seconds over bytes), with falling weights. The batches are
    timed as they ran, beside each other on the lane's threads, so that the line holds for a lane at work. Thread-safe.
    """

    PROBE_S = 5.0
    """How often a tier that is too slow is measured again, in seconds."""

    def __init__(self, threads: int, clock: Callable[[], float] = monotonic) -> None:
        """`threads`: batches that are read at once."""
        self._threads = threads
        self._clock = clock
        self._lock = threading.Lock()
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._probe_at = 0.0
        self.samples = 0
        """Batches measured in all."""

    def note(self, nbytes: int, seconds: float, *, probe: bool = False) -> None:
        """A batch of `nbytes` was read in `seconds`. A `probe` is smaller than what is read otherwise: it tells by how
        much the tier became faster or slower, and the line keeps its shape."""
        before = self.estimate() if probe else None
        expected = 0.0 if before is None else before.fixed_s + before.per_byte_s * nbytes
        with self._lock:
            keep = _STALE if probe else _FORGET
            if expected > 0:
                self._y *= seconds / expected
                self._xy *= seconds / expected
            self._weight = self._weight * keep + 1.0
            self._x = self._x * keep + nbytes
            self._y = self._y * keep + seconds
            self._xx = self._xx * keep + float(nbytes) * nbytes
            self._xy = self._xy * keep + nbytes * seconds
            self._probe_at = self._clock() + self.PROBE_S
            self.samples += 1

    def estimate(self) -> ReadEstimate | None:
        """The line through what was measured; None before the first batch."""
        with self._lock:
            if not self.samples:
                return None
            mean_x, mean_y = self._x / self._weight, self._y / self._weight
            spread = self._xx / self._weight - mean_x * mean_x
            slope = mean_y / mean_x if mean_x else 0.0
            # Batches of nearly one size say nothing about the two parts: then all is taken to be per byte.
            if spread > 0.01 * mean_x * mean_x:
                fitted = (self._xy / self._weight - mean_x * mean_y) / spread
                slope = min(max(fitted, 0.0), slope)
            return ReadEstimate(max(0.0, mean_y - slope * mean_x), slope)

    def seconds(self, nbytes: int, batch_bytes: int, ahead: int = 0) -> float | None:
        """How long reading `nbytes` in batches would take, after the `ahead` bytes that the lane has to read before.

        None before the first measurement.
        """
        found = self.estimate()
        if found is None:
            return None
        each = max(1, min(batch_bytes, -(-nbytes // self._threads)))
        rounds = -(-(nbytes + ahead) // (each * self._threads))
        return rounds * (found.fixed_s + found.per_byte_s * each)

    def stats(self) -> dict[str, float | int | None]:
        """The estimate as plain data: milliseconds for each batch, and bytes per second beside that (None: unknown)."""
        found = self.estimate()
        rate = None if found is None or not found.per_byte_s else round(1 / found.per_byte_s)
        return {
            "batch_ms": None if found is None else round(1e3 * found.fixed_s, 3),
            "bytes_per_s_per_thread": rate,
            "batches": self.samples,
        }

    def take_probe(self) -> bool:
        """Whether it is time to measure a tier that nobody uses; then the next time is one period later."""
        with self._lock:
            now = self._clock()
            if now < self._probe_at:
                return False
            self._probe_at = now + self.PROBE_S
            return True


class Recompute:
    """How long the engine takes to compute one token of a prompt, told or measured; and how much of it to spend."""

    def __init__(self, factor: float = 0.5, seconds_per_token: float | None = None, *, measure: bool = False) -> None:
        """`factor`: share of the time for computing that may be spent on reading instead. Without `seconds_per_token`
        and `measure` the rule is off; with `measure` it is on after the first `note`."""
        self.factor = factor
        self.measure = measure
        self.seconds_per_token = seconds_per_token
        """None while unknown: then the rule is off."""

    def note(self, tokens: int, seconds: float) -> None:
        """An engine computed `tokens` of a prompt in `seconds`. Ignored unless the speed is to be measured."""
        if not self.measure or tokens < 1 or seconds <= 0:
            return
        now, before = seconds / tokens, self.seconds_per_token
        self.seconds_per_token = now if before is None else before * _PREFILL_FORGET + now * (1 - _PREFILL_FORGET)

    def limit(self, tokens: int) -> float | None:
        """Seconds that reading `tokens` may take; None while the rule is off."""
        return None if self.seconds_per_token is None else self.factor * tokens * self.seconds_per_token

    def stats(self) -> dict[str, float | None]:
        """The rule as plain data; `tokens_per_s` is None while it is off."""
        rate = None if self.seconds_per_token is None else round(1 / self.seconds_per_token, 1)
        return {"tokens_per_s": rate, "factor": self.factor}
