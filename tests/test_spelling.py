"""The nearest valid word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.spelling import closest, distance

WORDS = st.text(alphabet="abcd", max_size=6)


@pytest.mark.parametrize(
    "a, b, edits",
    [
        ("", "", 0),
        ("abc", "", 3),
        ("capcity", "capacity", 1),
        ("captacity", "capacity", 1),
        ("naem", "name", 1),
        ("ca", "abc", 3),
    ],
)
def test_distance(a: str, b: str, edits: int) -> None:
    assert distance(a, b) == edits


@given(WORDS, WORDS)
def test_distance_is_symmetric_bounded_and_zero_only_for_equals(a: str, b: str) -> None:
    edits = distance(a, b)
    assert edits == distance(b, a)
    assert abs(len(a) - len(b)) <= edits <= max(len(a), len(b))
    assert (edits == 0) == (a == b)


def test_closest() -> None:
    words = ["name", "capacity", "lane", "inflight", "chunk_tokens"]
    assert closest("capcity", words) == "capacity"
    assert closest("Chunk-Tokens", words) == "chunk_tokens"
    assert closest("nane", words) == "name", "earlier candidates win ties"
    assert closest("inflight_bytes", words) == "inflight"
    assert closest("tokens", words) == "chunk_tokens"
    assert closest("zzz", words) is None
    assert closest("xx", ["lru"]) is None
    assert closest("anything", []) is None
    assert closest("x" * 10**6, words) is None, "and it does not take long to see"
