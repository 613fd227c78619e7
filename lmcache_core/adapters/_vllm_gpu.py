"""The worker's half of the vLLM connector where pages are in GPU memory: all copies are queued, none awaited.

Loads and saves have a stream each, the engine computes on its own. What must come before what is said by events:

    before the step's computing -> its loads -> the layers that read them     (the whole step, or layer by layer)
    the step's computing -> its saves -> the computing that writes these blocks anew, be it many steps later

so the engine's thread never waits, and no block need be held back when its request ends, is aborted or preempted: where
a block is given to somebody else while a save still reads it, the next writer waits on the device. A step is reported,
and with that its slots published or let go, when its events have fired.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from lmcache_core import _cuda
from lmcache_core.adapters._vllm_worker import Group, Worker
from lmcache_core.gpu import CudaError, Event, GpuPagedKV, How, Stream

if TYPE_CHECKING:
    from lmcache_core.adapters._vllm_parts import Rank
    from lmcache_core.adapters._vllm_wire import Attach, Copies, StepPlan, StepReport
    from lmcache_core.adapters._vllm_worker import _Copier

CTAS = 16
"""Thread blocks of a copy: what the link needs, as far as known without a measurement; the rest is the engine's."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A step whose copies may be under way."""

    report: StepReport
    blocks: list[int]
    """That its loads fill, until they have."""
    received: list[str]
    """Requests to tell when they are filled."""
    loaded: Event | None = None
    saved: Event | None = None


class GpuWorker(Worker):
    """Copies for one rank between the pages on its GPU and the arena, pinned. For the engine's worker thread only.

    In every step: `begin` before the engine computes, `load`, `wait_layer` and `save_layer` per layer, `save`, then
    `received`, `failed` and `report` until that has no more. An error of CUDA fails the blocks and drops the chunks of
    its step, and is reported; none is raised.
    """

    def __init__(
        self,
        rank: Rank,
        groups: Sequence[Group],
        *,
        device: int,
        compute: Callable[[], int],
        by_layer: bool = False,
    ) -> None:
        """`groups` bind `GpuPagedKV`; `compute()` is the stream the engine computes on now. Raise `CudaError`."""
        super().__init__(rank, groups)
        self._by_layer = by_layer
        self._device = device
        self._compute = compute
        self._loads, self._saves = Stream(device), Stream(device)
        self._before = Event(device)
        self._how = How(self._loads.handle, device, ctas=CTAS)
        self._flight: _Flight | None = None
        self._flights: deque[_Flight] = deque()
        self._filling: dict[str, Event] = {}
        self._saved: set[str] = set()
        self._told: deque[StepReport] = deque()

    def begin(self, plan: StepPlan) -> None:
        """The engine is about to compute: nothing of this step has been queued yet."""
        try:
            for flight in self._flights:
                if flight.report.step == plan.after and flight.saved is not None:
                    flight.saved.hold(self._compute())
            if plan.loads is not None:
                self._before.record(self._compute())
        except CudaError as error:
            for flight in self._flights:
                self._fail(flight, error)

    def load(self, plan: StepPlan) -> None:
        """Queue the loads of this step; what reads them waits for them."""
        flight = self._flight = _Flight(self._attached(plan), [], plan.received)
        self._failed.update(plan.failed_blocks)
        loads = plan.loads
        if loads is None:
            return
        flight.blocks = loads.block_ids[loads.block_ids >= 0].tolist()
        if self._region is None:
            self._failed.update(flight.blocks)
            return
        try:
            self._before.hold(self._loads.handle)
            if self._by_layer and plan.needed:
                for name, copier in self._layers.items():
                    self._scatter(copier, loads)
                    self._filling[name] = self._mark(self._loads)
                flight.loaded = self._mark(self._loads)
            else:
                for copier in self._whole:
                    self._scatter(copier, loads)
                flight.loaded = self._mark(self._loads)
                if plan.needed:
                    flight.loaded.hold(self._compute())
        except (CudaError, ValueError) as error:
            self._fail(flight, error)

    def wait_layer(self, name: str) -> None:
        """What the engine computes from now on finds the blocks of this layer filled."""
        event = self._filling.pop(name, None)
        if event is not None and self._flight is not None:
            try:
                event.hold(self._compute())
                event.close()
            except CudaError as error:
                self._fail(self._flight, error)

    def save_layer(self, plan: StepPlan, name: str) -> None:
        """The engine has queued the computing of this layer: queue its copy."""
        copier = self._layers.get(name)
        if plan.saves is None or self._flight is None or copier is None or name in self._saved:
            return
        try:
            self._saves_follow()
            self._gather(copier, plan.saves)
            self._saved.add(name)
        except (CudaError, ValueError) as error:
            self._fail(self._flight, error)

    def save(self, plan: StepPlan) -> None:
        """The engine has queued the computing of this step: queue the copies that are left."""
        flight, self._flight = self._flight, None
        if flight is None:
            raise AssertionError("a step is saved that was not loaded")
        done, self._saved = self._saved, set()
        try:
            if self._filling:
                self._not_announced(flight)
            if plan.saves is not None and self._region is not None:
                self._saves_follow()
                left = [copier for name, copier in self._layers.items() if name not in done]
                for copier in left if done else self._whole:
                    self._gather(copier, plan.saves)
                flight.saved = self._mark(self._saves)
        except (CudaError, ValueError) as error:
            self._fail(flight, error)
        self._flights.append(flight)

    def received(self) -> set[str]:
        """Requests whose asynchronous load ended; each is told once."""
        for flight in self._flights:
            if self._fired(flight, flight.loaded):
                self._received.update(flight.received)
                self._close(flight.loaded)
                flight.blocks, flight.received, flight.loaded = [], [], None
        while (
            self._flights and self._flights[0].loaded is None and self._fired(flight := self._flights[0], flight.saved)
        ):
            self._told.append(self._flights.popleft().report)
            self._close(flight.loaded, flight.saved)
        return super().received()

    def report(self) -> StepReport | None:
        """The next step that is done with, None when there is none; each is told once."""
        return self._told.popleft() if self._told else None

    def close(self) -> None:
        """Wait for what is under way, and unmap the arena."""
        for flight in self._flights:
            for event in (flight.loaded, flight.saved):
                try:
                    if event is not None:
                        event.synchronize()
                except CudaError:
                    break  # nothing runs any more on a device that is lost
            self._close(flight.loaded, flight.saved)
        self._flights.clear()
        self._close(self._before, *self._filling.values(), self._loads, self._saves)
        if self._region is not None:
            _cuda.unpin(self._region.address)
        super().close()

    # -- inside ----------------------------------------------------------------------------------------------
    def _map(self, attach: Attach) -> str:
        try:
            error = super()._map(attach)
            if self._region is not None:
                _cuda.pin(self._region.address, self._region.nbytes)
        except CudaError as failure:
            self._region = None
            self._whole, self._layers = [], {}
            return (
                f"worker {self._rank} cannot copy between GPU {self._device} and host memory: {failure}; where pinning "
                "failed, give the memory tier a smaller capacity or raise the limit of locked memory"
            )
        return error

    def _scatter(self, copier: _Copier, copies: Copies) -> None:
        pages = cast(GpuPagedKV, copier.pages)
        pages.scatter(copies.block_ids[copier.group], self._addresses(copier, copies), self._how)

    def _gather(self, copier: _Copier, copies: Copies) -> None:
        if copier.saves:
            pages, how = cast(GpuPagedKV, copier.pages), replace(self._how, stream=self._saves.handle)
            pages.gather(copies.block_ids[copier.group], self._addresses(copier, copies), how)

    def _mark(self, stream: Stream) -> Event:
        """Fires when what is queued on the stream so far is done."""
        event = Event(self._device)
        event.record(stream.handle)
        return event

    def _saves_follow(self) -> None:
        """Saves queued from now on start after what the engine has queued so far."""
        event = Event(self._device)
        event.record(self._compute())
        event.hold(self._saves.handle)
        event.close()

    def _not_announced(self, flight: _Flight) -> None:
        """The engine computed without announcing layers: it may have read them before they were filled."""
        self._by_layer, self._layers = False, {}
        filling, self._filling = self._filling, {}
        self._close(*filling.values())
        self._failed.update(flight.blocks)
        flight.report.copied = False
        if flight.loaded is not None:
            flight.loaded.hold(self._compute())

    def _fired(self, flight: _Flight, event: Event | None) -> bool:
        try:
            return event is None or event.fired()
        except CudaError as error:
            self._fail(flight, error)
            return True

    def _fail(self, flight: _Flight, error: CudaError | ValueError) -> None:
        """Copies of this step failed: its blocks hold nothing, its slots neither."""
        self._failed.update(flight.blocks)
        flight.blocks = []
        flight.report.copied = False
        flight.report.error = flight.report.error or f"a copy on GPU {self._device} failed: {error}"
        try:
            # Some of them may be queued: they end before the blocks are computed anew and the slots used again.
            if flight.loaded is None:
                flight.loaded = self._mark(self._loads)
                flight.loaded.hold(self._compute())
            if flight.saved is None:
                flight.saved = self._mark(self._saves)
        except CudaError:
            flight.loaded = flight.saved = None  # nothing runs any more on a device that is lost

    def _close(self, *things: Event | Stream | None) -> None:
        for thing in things:
            try:
                if thing is not None:
                    thing.close()
            except CudaError:
                return  # as above
