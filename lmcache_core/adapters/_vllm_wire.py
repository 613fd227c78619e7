"""What the two halves of the vLLM connector tell each other, once a step. Plain data: offsets and block ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_core.adapters._vllm_parts import Part, Rank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Attach:
    """How the workers map the scheduler's arena, and what each has in a chunk."""

    share: dict[str, int]
    parts: dict[Rank, list[Part]]


@dataclass(frozen=True, slots=True)
class Copies:
    """Chunks to copy between engine blocks and slots."""

    block_ids: NDArray[np.int64]
    """`[KV groups, chunks, blocks of a chunk]`; -1 leaves a block out."""
    offsets: NDArray[np.int64]
    """`[chunks]` payload offsets in the arena, in bytes."""


@dataclass(slots=True)
class StepPlan:
    """Scheduler -> worker: what to do in this step."""

    step: int
    attach: Attach | None = None
    """Present until the workers have said whether they could map the arena."""
    loads: Copies | None = None
    """Slots -> blocks, before the forward pass of this step (after it when no scheduled request needs them)."""
    needed: bool = False
    """Whether the forward pass of this step reads any of `loads`."""
    saves: Copies | None = None
    """Blocks -> slots, after the forward pass of this step."""
    received: list[str] = field(default_factory=list)
    """Requests whose asynchronous load ends with this step's `loads`."""
    failed_blocks: list[int] = field(default_factory=list)
    """Blocks that were promised and cannot be filled; the engine computes them itself."""
    after: int = 0
    """This step writes blocks that the saves of this earlier step, or of one before it, may still be reading."""

    @property
    def empty(self) -> bool:
        """Whether the worker has nothing to do."""
        return not (self.attach or self.loads or self.saves or self.received or self.failed_blocks or self.after)


@dataclass(slots=True)
class StepReport:
    """Worker -> scheduler: what was done in a step. Workers on a GPU tell it some steps later; each tells its steps in
    their order."""

    step: int
    attached: bool | None = None
    """Outcome of `StepPlan.attach`; None when it was not asked for."""
    error: str = ""
    """Why `attached` is False, or why copies failed that should not."""
    copied: bool = True
    """Whether the copies of the plan were made."""
    workers: int = field(default=1, compare=False)
    """How many workers say so."""

    def merge(self, other: StepReport) -> StepReport:
        """The report of two ranks about the same step: done only where both have done it."""
        if other.step != self.step:
            raise AssertionError(f"ranks report about steps {self.step} and {other.step} at once")
        attached = self.attached
        if attached is None or other.attached is False:
            attached = other.attached
        copied, workers = self.copied and other.copied, self.workers + other.workers
        return StepReport(self.step, attached, self.error or other.error, copied, workers)
