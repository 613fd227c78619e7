"""Hit rates of eviction policies on a trace of requests.

    python -m lmcache_eviction_adaptive.simulate conversation_trace.jsonl.gz

A trace is JSON lines (perhaps gzipped) with `hash_ids`: the ids of a request's blocks, each standing for its whole
prefix, as in the traces that Mooncake published (FAST 2025). A request hits its longest stored prefix; the rest is
stored. As in a tier, a request never evicts its own blocks. Sizes are shares of all different blocks of the trace.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from time import perf_counter

from lmcache_core.plugins import Plugins
from lmcache_core.protocols import EvictionPolicy
from lmcache_core.types import KEY_BYTES, ChunkKey

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


def read_trace(path: Path) -> list[list[ChunkKey]]:
    """The requests of a trace as keys."""
    keys: dict[int, ChunkKey] = {}

    def key_of(number: int) -> ChunkKey:
        if number not in keys:
            keys[number] = ChunkKey(blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES).digest())
        return keys[number]

    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as lines:
        return [[key_of(number) for number in json.loads(line)["hash_ids"]] for line in lines]


def replay(requests: Sequence[Sequence[ChunkKey]], policy: EvictionPolicy, capacity: int) -> float:
    """Share of blocks that are hit with room for `capacity` of them."""
    stored: set[ChunkKey] = set()
    hits = 0
    for chain in requests:
        hit = next((at for at, key in enumerate(chain) if key not in stored), len(chain))
        hits += hit
        policy.touch(chain[:hit])
        new = [key for key in dict.fromkeys(chain) if key not in stored]
        over = len(stored) + len(new) - capacity
        victims: list[ChunkKey] = []
        if over > 0:
            own = set(chain)
            for key in policy.coldest():
                if key not in own:
                    victims.append(key)
                    if len(victims) == over:
                        break
        if len(victims) < over:
            continue  # longer than the cache
        stored.difference_update(victims)
        policy.remove_all(victims)
        policy.add(new)
        stored.update(new)
        policy.touch(chain)
    return hits / sum(map(len, requests))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of hit rates in per cent, with the time per block in microseconds."""
    parser = argparse.ArgumentParser(prog="python -m lmcache_eviction_adaptive.simulate", description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--policies", default="lru,adaptive", help="eviction policies, by type")
    args = parser.parse_args(argv)
    requests, plugins = read_trace(args.trace), Plugins()
    blocks = sum(map(len, requests))
    different = len({key for chain in requests for key in chain})
    print(f"{len(requests)} requests, {blocks} blocks, {different} different")
    print("policy      " + "".join(f"{size:>9.0%}" for size in SIZES) + "   us/block")
    for name in args.policies.split(","):
        began = perf_counter()
        rates = [replay(requests, plugins.eviction(name)(type=name).build(), int(different * size)) for size in SIZES]
        each = (perf_counter() - began) / blocks / len(SIZES) * 1e6
        print(f"{name:<12}" + "".join(f"{rate:>9.1%}" for rate in rates) + f"{each:>11.1f}")


if __name__ == "__main__":
    main()
