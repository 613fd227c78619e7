"""The planner: from where each key is, to one `Move` per tier and batch. Pure functions over plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Move:
    """Chunks to copy from one storage tier into slots: positions in the request's key list."""

    tier: int
    positions: list[int] = field(default_factory=list)


def locate(start: int, count: int, here: Sequence[bool], tiers: Sequence[Sequence[bool]]) -> tuple[int, list[Move]]:
    """Where to take the chunks `start..count-1` from, cut at the first that is nowhere.

    `here[i]` says that chunk `start + i` needs no move (in memory, or on its way); `tiers[t][i]` that storage
    tier `t` has it, nearest tier first. Return the length of the present prefix and the moves, nearest tier first.
    """
    moves: dict[int, Move] = {}
    first = start
    if tiers and not any(here):
        # The usual case, without a look at each chunk: the nearest tier has a run of them.
        present = tiers[0]
        first += present.index(False) if False in present else count - start
        if first > start:
            moves[0] = Move(0, list(range(start, first)))
    for position in range(first, count):
        i = position - start
        if here[i]:
            continue
        for t, present in enumerate(tiers):
            if present[i]:
                if t not in moves:
                    moves[t] = Move(t)
                moves[t].positions.append(position)
                break
        else:
            return position, _sorted(moves)
    return count, _sorted(moves)


def _sorted(moves: dict[int, Move]) -> list[Move]:
    return [moves[t] for t in sorted(moves)]


def split(move: Move, parts: int, most: int) -> list[Move]:
    """Cut a move into batches for `parts` threads, at most `most` chunks each, in prefix order.

    Early chunks go first, so that a load that runs out of time has a prefix to show for it.
    """
    size = max(1, min(most, -(-len(move.positions) // parts)))
    return [Move(move.tier, move.positions[i : i + size]) for i in range(0, len(move.positions), size)]
