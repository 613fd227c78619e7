"""`gpu`: memory of an NVIDIA GPU, for a tier of copies above the one in host memory. Allocated once, never grown."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lmcache_core import _cuda
from lmcache_core.errors import BackendUnavailable
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext, MemoryBackend, Region
from lmcache_core.units import ByteSize, format_bytes


class GpuMemory(MemoryBackend):
    """Allocations of one device, apart from those of PyTorch."""

    def __init__(self, device: int, spare: int) -> None:
        self.device: int = device
        self._spare = spare
        self._open: list[int] = []

    def allocate(self, nbytes: int) -> Region:
        try:
            free, total = _cuda.memory(self.device)
            if nbytes + self._spare > free:
                raise BackendUnavailable(
                    f"GPU {self.device} has {format_bytes(free)} of {format_bytes(total)} free: the tier's "
                    f"{format_bytes(nbytes)}, and {format_bytes(self._spare)} to `spare`, do not fit; lower the tier's "
                    "capacity, or let the engine take less"
                )
            address = _cuda.allocate(nbytes, self.device)
        except _cuda.CudaError as error:
            raise BackendUnavailable(f"cannot allocate {nbytes} bytes of GPU {self.device}: {error}") from error
        self._open.append(address)
        return Region(address, nbytes, memoryview(b""), pinned=True)

    def close(self) -> None:
        while self._open:
            _cuda.free(self._open.pop(), self.device)


class GpuConfig(BackendConfig):
    """Memory of an NVIDIA GPU: copies of what host memory holds, for adapters whose KV is on that GPU."""

    in_memory: ClassVar[bool] = True
    on_device: ClassVar[bool] = True

    type: Literal["gpu"] = "gpu"
    device: int = Field(default=0, ge=0)
    """Number of the GPU, as CUDA counts those visible to this process."""
    spare: ByteSize = Field(default=1 << 30, ge=0)
    """Bytes of the GPU's memory that must be left free at start-up for whoever else allocates there."""

    def build(self, context: BuildContext) -> GpuMemory:
        if context.shared:
            raise BackendUnavailable(f"tier `{context.tier}`: other processes cannot map memory of a GPU")
        if reason := _cuda.why_not():
            raise BackendUnavailable(f"tier `{context.tier}` needs an NVIDIA GPU: {reason}; or remove the tier")
        count = _cuda.call("device_count")
        if self.device >= count:
            raise BackendUnavailable(
                f"tier `{context.tier}`: there is no GPU {self.device}, there are {count}; count from 0, among those "
                "that CUDA_VISIBLE_DEVICES lets this process see"
            )
        return GpuMemory(self.device, self.spare)


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [GpuConfig]
