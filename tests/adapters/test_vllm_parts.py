"""How a chunk of several workers and KV groups is put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lmcache_core.adapters._vllm_parts import assemble
from lmcache_core.errors import Unsupported
from lmcache_core.layout import KVLayout

BLOCK = KVLayout("pages", "bfloat16", 4, 2, 8, 64, 32, 32, packing="p")
MLA = KVLayout("pages", "bfloat16", 4, 1, 1, 576, 32, 32, packing="p")


def test_one_worker_keeps_its_layout() -> None:
    whole, parts = assemble({(0, 0): [BLOCK]}, 128)
    assert whole == replace(BLOCK, chunk_tokens=128)
    assert [(part.offset, part.saves, part.layout) for part in parts[0, 0]] == [(0, True, whole)]


def test_parts_fill_the_chunk_without_holes() -> None:
    """Two groups; two pipeline ranks with different numbers of layers; two tensor ranks."""
    workers = {(pp, tp): [replace(BLOCK, num_layers=5 - pp), BLOCK] for pp in (0, 1) for tp in (0, 1)}
    whole, parts = assemble(workers, 128)
    assert whole.num_layers == 2 * (5 + 4) + 4 * 4
    at = 0
    for part in sorted((part for own in parts.values() for part in own), key=lambda part: part.offset):
        assert part.offset == at and part.saves
        at += part.layout.chunk_bytes
    assert at == whole.chunk_bytes
    assert [len(own) for own in parts.values()] == [2] * 4


def test_mla_latents_are_stored_once() -> None:
    whole, parts = assemble({(pp, tp): [MLA] for pp in (0, 1) for tp in (0, 1, 2)}, 64)
    assert whole.num_layers == 8 and whole.chunk_bytes == 2 * replace(MLA, chunk_tokens=64).chunk_bytes
    for pp in (0, 1):
        assert len({part.offset for tp in (0, 1, 2) for part in parts[pp, tp]}) == 1
        assert [parts[pp, tp][0].saves for tp in (0, 1, 2)] == [True, False, False]


def test_other_arrangements_are_other_layouts() -> None:
    arrangements: list[Any] = [
        {(0, 0): [BLOCK]},
        {(0, 0): [replace(BLOCK, num_layers=2), replace(BLOCK, num_layers=2)]},
        {(0, rank): [replace(BLOCK, num_layers=2)] for rank in (0, 1)},
        {(rank, 0): [replace(BLOCK, num_layers=2)] for rank in (0, 1)},
        {(rank, 0): [replace(BLOCK, num_layers=1 + 2 * rank)] for rank in (0, 1)},
    ]
    wholes = [assemble(workers, 64)[0] for workers in arrangements]
    assert {whole.num_layers for whole in wholes} == {4}
    assert len({whole.id for whole in wholes}) == len(wholes)


@pytest.mark.parametrize(
    "workers, why",
    [
        ({(0, 0): [BLOCK], (0, 1): [replace(BLOCK, head_dim=32)]}, "differ between workers"),
        ({(0, 0): [BLOCK, replace(BLOCK, packing="q")]}, "differ between workers"),
        ({(0, 0): [BLOCK], (0, 1): [BLOCK, BLOCK]}, "different numbers"),
        ({(0, 0): [MLA], (0, 1): [replace(MLA, num_layers=3)]}, "different layers"),
    ],
)
def test_what_does_not_fit_together(workers: Any, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        assemble(workers, 64)
