"""The nearest valid word for a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable


def distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`.

    The optimal string alignment distance (restricted Damerau-Levenshtein).
    """
    before: list[int] = []
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            best = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, before[j - 2] + 1)
            row.append(best)
        before, above = above, row
    return above[-1]


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate nearest to `word`, or None when nothing is near. Earlier candidates win ties.

    Near means at most two edits and a third of the longer word (never the whole word), or one being the
    beginning or end of the other.
    """
    folded = word.lower().replace("-", "_")
    best: tuple[float, str] | None = None
    for candidate in candidates:
        target = candidate.lower().replace("-", "_")
        short, long = sorted((len(folded), len(target)))
        edits = float(distance(folded, target) if long - short <= long // 3 + 2 else long)
        affix = short >= 3 and (
            target.startswith(folded) or target.endswith(folded) or folded.startswith(target) or folded.endswith(target)
        )
        if edits > max(2, long // 3) or edits >= short:
            if not affix:
                continue
            edits = 3.0
        if best is None or edits < best[0]:
            best = (edits, candidate)
    return best[1] if best else None
