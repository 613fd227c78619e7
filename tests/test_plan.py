"""The planner against a brute-force reading of its contract."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.plan import Move, locate, split


def source(position: int, start: int, here: list[bool], tiers: list[list[bool]]) -> int | None:
    """Where one chunk is: -1 in memory, else the nearest tier, None nowhere."""
    if here[position - start]:
        return -1
    return next((t for t, present in enumerate(tiers) if present[position - start]), None)


@st.composite
def prefixes(draw: st.DrawFn) -> tuple[int, int, list[bool], list[list[bool]]]:
    start = draw(st.integers(0, 5))
    count = start + draw(st.integers(0, 8))
    flags = st.lists(st.booleans(), min_size=count - start, max_size=count - start)
    return start, count, draw(flags), draw(st.lists(flags, max_size=3))


@given(prefixes())
def test_every_chunk_comes_from_the_nearest_tier_up_to_the_first_gap(
    case: tuple[int, int, list[bool], list[list[bool]]],
) -> None:
    start, count, here, tiers = case
    end, moves = locate(start, count, here, tiers)
    sources = [source(position, start, here, tiers) for position in range(start, count)]
    assert end == start + (sources.index(None) if None in sources else len(sources))
    planned = {position: move.tier for move in moves for position in move.positions}
    assert planned == {p: s for p, s in zip(range(start, end), sources, strict=False) if s is not None and s >= 0}
    assert [move.tier for move in moves] == sorted({move.tier for move in moves})
    assert all(move.positions == sorted(move.positions) for move in moves)


@given(st.lists(st.integers(0, 999), unique=True, max_size=60), st.integers(1, 8), st.integers(1, 20))
def test_batches_keep_every_chunk_in_prefix_order(positions: list[int], parts: int, most: int) -> None:
    move = Move(3, sorted(positions))
    batches = split(move, parts, most)
    assert [p for batch in batches for p in batch.positions] == move.positions
    assert all(batch.tier == 3 and 0 < len(batch.positions) <= most for batch in batches)
    # Enough for every thread when there is enough work, and no more batches than the bounds ask for.
    assert len(batches) <= max(parts, -(-len(positions) // most))
    assert len(batches) >= min(len(positions), parts) // 2
