"""How one chunk of an engine of several workers or several KV groups is put together: plain arithmetic, no vLLM.

A chunk holds the KV of its tokens of every KV group on every worker, one part after the other:

    [KV group][pipeline rank][tensor rank][layer][block][page]

so that one key, one object and one answer stand for all of them: a hit is the same on all ranks by construction, and a
chunk is published only when every rank has copied its part. Tensor ranks that hold the same MLA latent share a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lmcache_core import canonical
from lmcache_core.errors import Unsupported
from lmcache_core.layout import KVLayout

Rank = tuple[int, int]
"""Pipeline rank, tensor rank."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one worker holds of a chunk, for one KV group."""

    layout: KVLayout
    """Of the part alone."""
    offset: int
    """Of the part in the chunk, in bytes."""
    saves: bool
    """Whether this worker writes it: False where another holds the same bytes."""


def assemble(workers: Mapping[Rank, Sequence[KVLayout]], chunk_tokens: int) -> tuple[KVLayout, dict[Rank, list[Part]]]:
    """The layout of a whole chunk, and each worker's parts, in the order of its KV groups.

    `workers`: layouts of one block of each KV group. Raise `Unsupported` where their pages differ in more than the
    number of layers.
    """
    ranks = sorted(workers)
    first = workers[ranks[0]][0]
    parts: dict[Rank, list[Part]] = {rank: [] for rank in ranks}
    made: list[canonical.Canonical] = []
    offset = layers = 0
    for group in range(len(workers[ranks[0]])):
        for rank in ranks:
            if len(workers[rank]) != len(workers[ranks[0]]):
                raise Unsupported(f"workers {ranks[0]} and {rank} have different numbers of KV cache groups")
            block = workers[rank][group]
            if replace(block, num_layers=first.num_layers) != first:
                raise Unsupported(f"KV pages differ between workers or KV cache groups: {first} and {block}")
            mine = replace(block, chunk_tokens=chunk_tokens)
            if block.planes == 1 and rank[1] > 0:
                shared = parts[rank[0], 0][group]
                if shared.layout != mine:
                    raise Unsupported(f"tensor ranks hold MLA latents of different layers: {shared.layout} and {mine}")
                parts[rank].append(replace(shared, saves=False))
                continue
            parts[rank].append(Part(mine, offset, saves=True))
            made.append((group, *rank, block.num_layers))
            offset += mine.chunk_bytes
            layers += block.num_layers
    packing = first.packing
    if len(made) > 1:
        packing += f"/parts{len(made)}-{canonical.digest(tuple(made)).hex()[:8]}"
    return replace(first, num_layers=layers, chunk_tokens=chunk_tokens, packing=packing), parts
