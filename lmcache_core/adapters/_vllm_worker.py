"""The worker's half of the vLLM connector: it maps the scheduler's arena and copies between it and the engine's pages.

Each direction of each step is one call that holds no interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache_core.adapters._vllm_wire import Attach, Copies, StepPlan, StepReport
from lmcache_core.errors import BackendUnavailable
from lmcache_core.layout import KVLayout
from lmcache_core.slots import map_shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lmcache_core.copies import PagedKV
    from lmcache_core.protocols import Region


class Worker:
    """Copies for one rank. Called by the engine's worker thread only."""

    def __init__(self, layout: KVLayout, bind: Callable[[KVLayout], PagedKV]) -> None:
        """`layout` describes one block; `bind` makes the copier for chunks of a layout."""
        self._layout = layout
        self._bind = bind
        self._region: Region | None = None
        self._pages: PagedKV | None = None
        self._chunk_bytes = layout.chunk_bytes
        self._report: StepReport | None = None
        self._received: set[str] = set()
        self._failed: set[int] = set()

    def load(self, plan: StepPlan) -> None:
        """Fill the blocks this step reads."""
        report = StepReport(plan.step)
        if plan.attach is not None and self._region is None:
            report.error = self._map(plan.attach)
        if plan.attach is not None:
            report.attached = self._region is not None
        report.copied = self._region is not None
        if plan.loads is not None:
            if self._pages is not None and self._region is not None:
                self._pages.scatter(plan.loads.block_ids, self._addresses(plan.loads, self._region))
            else:
                self._failed.update(plan.loads.block_ids[plan.loads.block_ids >= 0].tolist())
        self._received.update(plan.received)
        self._failed.update(plan.failed_blocks)
        self._report = None if plan.empty else report

    def save(self, plan: StepPlan) -> None:
        """Copy the blocks this step completed."""
        if plan.saves is not None and self._pages is not None and self._region is not None:
            self._pages.gather(plan.saves.block_ids, self._addresses(plan.saves, self._region))

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
        self._region = None
        self._pages = None

    def _addresses(self, copies: Copies, region: Region) -> NDArray[np.int64]:
        offsets = copies.offsets
        if offsets.min() < 0 or offsets.max() + self._chunk_bytes > region.nbytes:
            raise AssertionError(
                f"slot offsets {offsets.min()}..{offsets.max()} are outside the arena of {region.nbytes}"
            )
        return offsets + region.address

    def _map(self, attach: Attach) -> str:
        """Map the arena; why not, or an empty string."""
        if replace(attach.layout, chunk_tokens=self._layout.chunk_tokens) != self._layout:
            return f"scheduler and worker disagree about the KV layout: {attach.layout} and {self._layout}"
        try:
            self._pages = self._bind(attach.layout)
            self._chunk_bytes = attach.layout.chunk_bytes
            self._region = map_shared(attach.share)
        except (BackendUnavailable, ValueError) as error:
            self._pages = None
            return str(error)
        return ""
