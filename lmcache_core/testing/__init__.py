"""What plugin authors and this project's own tests run: conformance kits, planted faults, an oracle engine.

    storage, memory_kit, serde, eviction    the kits: subclass, give one fixture, and pytest collects them
    stateful                                the storage kit with a hypothesis state machine
    contracts                               what the kits check, by name
    conformance                             the kits without pytest
    bench, rig                              how fast a backend is, and how its medium is brought up
    faults, wrappers                        errors, delays and wrappers for any backend, through the build hook
    invariants                              what must hold whenever a pipeline is at rest
    memory                                  a backend in a dict
    refengine, refconnector                 an engine whose every byte is known

Nothing here imports pytest. `stateful` imports hypothesis.
"""

from lmcache_core.testing.conformance import Outcome, run_kit, run_storage_tests
from lmcache_core.testing.contracts import CONTRACTS, ContractBroken
from lmcache_core.testing.eviction import EvictionTests
from lmcache_core.testing.memory_kit import MemoryBackendTests
from lmcache_core.testing.serde import SerdeTests
from lmcache_core.testing.storage import StorageBackendTests

__all__ = [
    "CONTRACTS",
    "ContractBroken",
    "EvictionTests",
    "MemoryBackendTests",
    "Outcome",
    "SerdeTests",
    "StorageBackendTests",
    "run_kit",
    "run_storage_tests",
]
