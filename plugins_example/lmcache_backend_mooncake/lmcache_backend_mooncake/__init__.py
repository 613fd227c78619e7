"""`mooncake`: sealed objects in Mooncake Store, the distributed memory of a cluster, over TCP or RDMA."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from lmcache_backend_mooncake.backend import STAGING_BUFFERS, MooncakeBackend
from lmcache_backend_mooncake.client import Membership, host_and_port
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import BackendConfig, BuildContext
from lmcache_core.types import round_up
from lmcache_core.units import ByteSize


def _master(value: str) -> str:
    if host_and_port(value) is None and not re.match(r"[a-z0-9]+://\S", value):
        raise ValueError("write the master's address as `host:port`, or as `etcd://...` where the masters are several")
    return value


class MooncakeConfig(BackendConfig):
    """A Mooncake Store cluster: one master, and the memory that its nodes contribute.

    Mooncake evicts by itself; a `capacity` of the tier has no effect.
    """

    type: Literal["mooncake"] = "mooncake"
    master: Annotated[str, AfterValidator(_master)]
    """Address of `mooncake_master`, `host:port`, or what Mooncake takes where masters are elected (`etcd://...`)."""
    metadata_server: str = "P2PHANDSHAKE"
    """Where clients find each other: `P2PHANDSHAKE` needs no server, else a URL such as `http://host:8080/metadata`."""
    local_hostname: str = ""
    """Name or address at which the nodes reach this host; by default that from which it reaches the master."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """How objects travel."""
    device_name: str = ""
    """RDMA devices, separated by commas; by default those that Mooncake finds."""
    global_segment_size: ByteSize = 0
    """Memory this process contributes to the store, beside the tiers' own; it is lost to the store with the process."""
    replicas: Annotated[int, Field(ge=1, le=16)] = 1
    """Copies of each object, on as many nodes where there are so many."""
    soft_pin: bool = False
    """Let Mooncake evict these objects after those that are not pinned so."""
    prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:@-]*$", max_length=64)] = "lmcache"
    """Begins the names of this tier's objects in the store; `clear` removes all of it and nothing else."""

    def memory_bytes(self, context: BuildContext) -> int:
        return 0 if self.protocol == "tcp" else STAGING_BUFFERS * round_up(context.object_bytes)

    def build(self, context: BuildContext) -> MooncakeBackend:
        """Join the cluster. Raise `BackendUnavailable` when the master does not answer or Mooncake is not installed."""
        member = Membership(
            self.master,
            self.metadata_server,
            self.local_hostname,
            self.protocol,
            self.device_name,
            self.global_segment_size,
        )
        return MooncakeBackend(member, context, prefix=self.prefix, replicas=self.replicas, soft_pin=self.soft_pin)


@hookimpl
def lmcache_backends() -> list[type[BackendConfig]]:
    return [MooncakeConfig]
