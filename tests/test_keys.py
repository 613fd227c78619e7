"""Keys: the documented SHA-256 chain, equal in every process, blind to how tokens arrive, and silent about them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.identity import Identity
from lmcache_core.keys import TokenChain, as_int32, chunk_keys
from lmcache_core.layout import KVLayout
from lmcache_core.types import ChunkKey

ROOT = Path(__file__).parent.parent
LAYOUT = KVLayout("lknhd", "bfloat16", 2, 2, 1, 8, chunk_tokens=4, block_tokens=4)
IDENTITY = Identity(model="org/model", weights="00ff", layout=LAYOUT)
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 2**31 - 1, 0, 9, 10]

tokens_ = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def documented(identity: Identity, tokens: list[int], extras: dict[int, bytes] | None = None) -> list[bytes]:
    """Keys as the module's documentation defines them, written a second time."""
    size = identity.layout.chunk_tokens
    state = hashlib.sha256(identity.digest).digest()
    keys = []
    for i in range(len(tokens) // size):
        extra = (extras or {}).get(i, b"")
        framed = b"x" + hashlib.sha256(extra).digest() if extra else b""
        body = b"".join(token.to_bytes(4, "little") for token in tokens[i * size : (i + 1) * size])
        state = hashlib.sha256(state + framed + body).digest()
        keys.append(identity.digest[:16] + state[:16])
    return keys


def test_known_answers() -> None:
    """A change here makes every stored object unreachable."""
    assert [key.hex() for key in chunk_keys(IDENTITY, TOKENS)] == [
        "0f4bc46a6da06caf1f6f70d54a7f978cf36e32b016995aa857534b985cc04aa5",
        "0f4bc46a6da06caf1f6f70d54a7f978c0937676c24d13b2b582815109680ec9c",
        "0f4bc46a6da06caf1f6f70d54a7f978ca34a690fc519a2e2ca17c69c5b5b05a7",
    ]


@given(tokens_)
def test_keys_are_the_documented_chain(tokens: list[int]) -> None:
    assert chunk_keys(IDENTITY, tokens) == documented(IDENTITY, tokens)


@given(tokens_, st.lists(st.integers(0, 40)))
def test_incremental_is_one_shot(tokens: list[int], cuts: list[int]) -> None:
    """However a sequence grows; tokens of a partial chunk are passed again."""
    chain = TokenChain(IDENTITY)
    new: list[ChunkKey] = []
    for stop in [*sorted(cuts), len(tokens)]:
        new += chain.extend(tokens[len(chain.keys) * 4 : stop])
    assert chain.keys == new == chunk_keys(IDENTITY, tokens)


@given(tokens_, tokens_)
def test_keys_agree_exactly_on_the_common_prefix(a: list[int], b: list[int]) -> None:
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    keys_a, keys_b = chunk_keys(IDENTITY, a), chunk_keys(IDENTITY, b)
    same = [x == y for x, y in zip(keys_a, keys_b, strict=False)]
    assert same == [i < common // 4 for i in range(len(same))]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=12, max_size=12), st.integers(0, 2), st.binary(max_size=40))
def test_extras_are_part_of_the_key(tokens: list[int], at: int, extra: bytes) -> None:
    chain = TokenChain(IDENTITY)
    for i in range(3):
        piece = tokens[4 * i : 4 * i + 4]
        if i == at:
            chain.extend_with(piece, extra)
        else:
            chain.extend(piece)
    assert chain.keys == documented(IDENTITY, tokens, {at: extra})
    plain = chunk_keys(IDENTITY, tokens)
    assert [x == y for x, y in zip(chain.keys, plain, strict=True)] == [not extra or i < at for i in range(3)]


def test_extras_are_framed() -> None:
    """Neither where an extra ends nor whether it is one can be confused."""
    variants = [b"", b"a", b"ab", b"a\0", b"x" + hashlib.sha256(b"a").digest(), bytes(32), b"x" * 33]
    keys = set()
    for first in variants:
        for second in variants:
            chain = TokenChain(IDENTITY)
            chain.extend_with(TOKENS[:4], first)
            keys.add(chain.extend_with(TOKENS[4:8], second))
    assert len(keys) == len(variants) ** 2


@pytest.mark.parametrize("count", [0, 3, 5, 8])
def test_an_extra_belongs_to_exactly_one_chunk(count: int) -> None:
    with pytest.raises(ValueError, match=f"one chunk is 4 tokens, got {count}"):
        TokenChain(IDENTITY).extend_with(list(range(count)), b"image")


def test_keys_tell_nothing_about_the_prompt() -> None:
    """32 bytes: who, and a digest. Two prompts of one identity share only the identity's half."""
    prompts = [TOKENS, TOKENS[::-1], [7] * 12, list(range(100, 112))]
    keys = [key for prompt in prompts for key in chunk_keys(IDENTITY, prompt)]
    assert all(len(key) == 32 and key[:16] == IDENTITY.prefix for key in keys)
    assert len({key[16:] for key in keys}) == len(keys)
    for prompt in prompts:
        raw = np.array(prompt, np.int32).tobytes()
        pieces = {raw[i : i + 4] for i in range(len(raw) - 3)}
        assert not any(piece in key[16:] for key in keys for piece in pieces if piece.strip(b"\0"))


def test_chunk_size_and_identity_separate_keys() -> None:
    wide = replace(IDENTITY, layout=replace(LAYOUT, chunk_tokens=8))
    salted = replace(IDENTITY, salt="tenant")
    keys = [*chunk_keys(IDENTITY, TOKENS), *chunk_keys(wide, TOKENS), *chunk_keys(salted, TOKENS)]
    assert len({key[:16] for key in keys}) == 3
    assert len({key[16:] for key in keys}) == len(keys) == 3 + 1 + 3


SAME: list[Callable[[], Any]] = [
    lambda: tuple(TOKENS),
    lambda: [np.int64(token) for token in TOKENS],
    lambda: np.array(TOKENS, np.int32),
    lambda: np.array(TOKENS, np.int64),
    lambda: np.array(TOKENS, np.uint32),
    lambda: np.array(TOKENS, np.uint64),
    lambda: np.array(TOKENS, ">i4"),
    lambda: np.repeat(np.array(TOKENS, np.int32), 2)[::2],
    lambda: np.array(TOKENS[::-1], np.int64)[::-1],
    lambda: array("i", TOKENS),
    lambda: array("q", TOKENS),
    lambda: memoryview(array("i", TOKENS)),
    lambda: memoryview(np.array(TOKENS, np.int64)),
]


@pytest.mark.parametrize("make", SAME)
def test_the_container_does_not_count(make: Callable[[], Any]) -> None:
    assert chunk_keys(IDENTITY, make()) == chunk_keys(IDENTITY, TOKENS)
    assert as_int32(make()).dtype == np.int32


def test_tensors_and_ranges() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.int32, torch.int64):
        assert chunk_keys(IDENTITY, torch.tensor(TOKENS, dtype=dtype)) == chunk_keys(IDENTITY, TOKENS)
    assert chunk_keys(IDENTITY, torch.tensor(TOKENS * 2)[::2]) == chunk_keys(IDENTITY, (TOKENS * 2)[::2])
    assert chunk_keys(IDENTITY, range(12)) == chunk_keys(IDENTITY, list(range(12)))
    with pytest.raises(ValueError, match="integers"):
        as_int32(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="one-dimensional"):
        as_int32(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("empty", [[], (), np.array([], np.int64), np.array([]), array("q"), range(0)])
def test_nothing_has_no_keys(empty: Any) -> None:
    assert chunk_keys(IDENTITY, empty) == []
    assert chunk_keys(IDENTITY, [1, 2, 3]) == []


WRONG: list[Any] = [
    [-1], [2**31], [2**32 + 5], [2**70], (1, -1), [1.0], [1.5], ["1"], [None], [b"1"], [[1]],
    np.array([-1]), np.array([2**31]), np.array([2**32 + 5]), np.array([2**63], np.uint64), np.array([-1], np.int32),
    np.array([1.0]), np.array([[1]]), np.array(["1"]), np.array([True]), np.array(5),
    array("q", [2**32 + 5]), array("q", [-(2**32) + 5]), array("I", [2**31]), array("d", [1.0]), array("i", [-7]),
    memoryview(array("q", [2**32 + 5])),
]  # fmt: skip


@pytest.mark.parametrize("tokens", WRONG, ids=repr)
def test_what_is_no_token_id_is_refused(tokens: Any) -> None:
    """A wrapped or rounded id would name another prompt."""
    with pytest.raises(ValueError, match="token ids must be"):
        as_int32(tokens)


PROGRAM = """
from dataclasses import replace
from lmcache_core import _native
from lmcache_core.identity import Identity
from lmcache_core.keys import chunk_keys
from lmcache_core.layout import KVLayout
layout = KVLayout("lknhd", "bfloat16", 2, 2, 1, 8, chunk_tokens=4, block_tokens=4)
for salt in (None, "", "tenant"):
    identity = Identity(model="org/model", weights="00ff", layout=layout, lora="l", salt=salt)
    print(*(key.hex() for key in chunk_keys(identity, range(64))))
"""


def test_equal_in_every_process() -> None:
    """Whatever PYTHONHASHSEED says, and with or without the native library."""
    seen = set()
    for seed, native in (("0", "1"), ("1", "0"), ("4294967295", "1"), ("random", "0")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LMCACHE_NATIVE": native}
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert len(result.stdout.split()) == 48
        seen.add(result.stdout)
    assert len(seen) == 1
    identity = replace(IDENTITY, lora="l", salt="tenant")
    assert seen.pop().split()[-16:] == [key.hex() for key in documented(identity, list(range(64)))]
