"""The worker's half of the vLLM connector: it maps the scheduler's arena and copies between it and the engine's pages.

Each direction of each step is one call that holds no interpreter lock; or, layer by layer, one such call for each layer
on a thread of its own, while the engine computes the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lmcache_core.adapters._vllm_parts import Part, Rank
from lmcache_core.adapters._vllm_wire import Attach, Copies, StepPlan, StepReport
from lmcache_core.errors import BackendUnavailable
from lmcache_core.layout import KVLayout
from lmcache_core.slots import map_shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lmcache_core.copies import PagedKV
    from lmcache_core.protocols import Region


@dataclass(frozen=True, slots=True)
class Group:
    """The pages of one KV group: `layout` describes one block, `layers` names the layers in its order."""

    layout: KVLayout
    layers: tuple[str, ...]
    bind: Callable[[KVLayout, int, int], PagedKV]
    """Makes the copier of layers `start...stop` for chunks of a layout, which is theirs alone."""


@dataclass(frozen=True, slots=True)
class _Copier:
    """Copies one group's pages, or one layer of them."""

    group: int
    pages: PagedKV
    offset: int
    nbytes: int
    saves: bool


class Worker:
    """Copies for one rank, whose pages are in host memory. Called by the engine's worker thread only."""

    def __init__(self, rank: Rank, groups: Sequence[Group], *, by_layer: bool = False) -> None:
        """`by_layer` overlaps the copies of a layer with the computing of others; the engine must then announce every
        layer with `wait_layer` before it reads it."""
        self._rank = rank
        self._groups = groups
        self._region: Region | None = None
        self._whole: list[_Copier] = []
        self._layers: dict[str, _Copier] = {}
        self._by_layer = by_layer
        self._pool = ThreadPoolExecutor(1, "lmcache-layers") if by_layer else None
        self._loading: dict[str, Future[None]] = {}
        self._saving: dict[str, Future[None]] = {}
        self._report: StepReport | None = None
        self._unsaved: StepReport | None = None
        """Of the step under way. vLLM may take it before the saves are made, and on some ranks never comes to them."""
        self._received: set[str] = set()
        self._failed: set[int] = set()

    def load(self, plan: StepPlan) -> None:
        """Fill the blocks this step reads."""
        report = self._attached(plan)
        loads = plan.loads
        if loads is not None and self._region is None:
            self._failed.update(loads.block_ids[loads.block_ids >= 0].tolist())
        elif loads is not None and self._pool is not None and plan.needed:
            for name, copier in self._layers.items():
                self._loading[name] = self._pool.submit(self._scatter, copier, loads)
        elif loads is not None:
            for copier in self._whole:
                self._scatter(copier, loads)
        self._received.update(plan.received)
        self._failed.update(plan.failed_blocks)
        self._report = None if plan.empty else report
        self._unsaved = report
        report.copied = report.copied and plan.saves is None

    def wait_layer(self, name: str) -> None:
        """The engine is about to read this layer: its blocks are filled on return."""
        job = self._loading.pop(name, None)
        if job is not None:
            job.result()

    def save_layer(self, plan: StepPlan, name: str) -> None:
        """The engine has written this layer: start to copy it."""
        copier = self._layers.get(name)
        if plan.saves is not None and self._pool is not None and copier is not None and name not in self._saving:
            self._saving[name] = self._pool.submit(self._gather, copier, plan.saves)

    def save(self, plan: StepPlan) -> None:
        """Copy the blocks this step completed; nothing is under way on return."""
        report, self._unsaved = self._unsaved, None
        if self._loading and plan.loads is not None:
            # The engine computed without announcing these layers: it may have read them before they were filled.
            while self._loading:
                self._loading.popitem()[1].result()
            self._failed.update(plan.loads.block_ids[plan.loads.block_ids >= 0].tolist())
            self._layers, self._by_layer = {}, False
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = None
            if report is not None:
                report.copied = False
            report = None
        saving, self._saving = self._saving, {}
        for job in saving.values():
            job.result()
        if plan.saves is None or self._region is None:
            return
        if not saving:
            for copier in self._whole:
                self._gather(copier, plan.saves)
        else:
            for name in self._layers.keys() - saving.keys():
                self._gather(self._layers[name], plan.saves)
        if report is not None:
            report.copied = True

    def received(self) -> set[str]:
        """Requests whose asynchronous load ended; each is told once."""
        received, self._received = self._received, set()
        return received

    def failed(self) -> set[int]:
        """Blocks that were promised and hold nothing; each is told once."""
        failed, self._failed = self._failed, set()
        return failed

    def report(self) -> StepReport | None:
        """What was done in this step, None when there was nothing to do; told once."""
        report, self._report = self._report, None
        return report

    def close(self) -> None:
        """Unmap the arena."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._region = None
        self._whole, self._layers = [], {}

    def _scatter(self, copier: _Copier, copies: Copies) -> None:
        copier.pages.scatter(copies.block_ids[copier.group], self._addresses(copier, copies))

    def _gather(self, copier: _Copier, copies: Copies) -> None:
        if copier.saves:
            copier.pages.gather(copies.block_ids[copier.group], self._addresses(copier, copies))

    def _addresses(self, copier: _Copier, copies: Copies) -> NDArray[np.int64]:
        region = self._region
        if region is None:
            raise AssertionError("copying without an arena")
        offsets = copies.offsets + copier.offset
        if offsets.min() < 0 or offsets.max() + copier.nbytes > region.nbytes:
            raise AssertionError(
                f"slot offsets {offsets.min()}..{offsets.max()} are outside the arena of {region.nbytes}"
            )
        return offsets + region.address

    def _attached(self, plan: StepPlan) -> StepReport:
        """Map the arena if that is asked for and was not done yet; the report of this step so far."""
        report = StepReport(plan.step)
        if plan.attach is not None and self._region is None:
            report.error = self._map(plan.attach)
        if plan.attach is not None:
            report.attached = self._region is not None
        report.copied = self._region is not None
        return report

    def _map(self, attach: Attach) -> str:
        """Map the arena; why not, or an empty string."""
        parts = attach.parts.get(self._rank, [])
        own = [group.layout for group in self._groups]
        told = [replace(part.layout, chunk_tokens=part.layout.block_tokens) for part in parts]
        if told != own:
            return f"scheduler and worker {self._rank} disagree about the KV layout: {told} and {own}"
        try:
            self._whole = [self._copier(i, part, 0, part.layout.num_layers) for i, part in enumerate(parts)]
            if self._by_layer:
                for i, part in enumerate(parts):
                    for at, name in enumerate(self._groups[i].layers):
                        self._layers[name] = self._copier(i, part, at, at + 1)
            self._region = map_shared(attach.share)
        except (BackendUnavailable, ValueError) as error:
            self._whole, self._layers = [], {}
            return str(error)
        return ""

    def _copier(self, group: int, part: Part, start: int, stop: int) -> _Copier:
        layout = replace(part.layout, num_layers=stop - start)
        offset = part.offset + start * layout.blocks * layout.block_bytes
        return _Copier(group, self._groups[group].bind(layout, start, stop), offset, layout.chunk_bytes, part.saves)
