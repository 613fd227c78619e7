"""Stock vLLM on a real model: greedy answers are equal with the cache off, cold, warm and after a restart.

Compared at equal computation: the control is a run whose own prefix cache holds the same tokens. Needs a model: the
directory in `LMCACHE_TEST_MODEL`, or the one that `make install` or `lmcachectl demo` has fetched.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from test_vllm_engine import lifetimes, loaded, same

from lmcache_core.cli.model import NAME, default_directory

CHECKOUT = Path(__file__).parents[2] / ".models" / NAME  # where `make install` puts it
MODEL = Path(os.environ.get("LMCACHE_TEST_MODEL") or (CHECKOUT if CHECKOUT.is_dir() else default_directory() / NAME))
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model in {MODEL}: set LMCACHE_TEST_MODEL"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return lifetimes(tmp_path_factory.mktemp("vllm"), str(MODEL))


def test_answers_do_not_depend_on_the_cache(found: dict[str, Any]) -> None:
    for name in ("cold", "warm", "restart", "restart_async"):
        same(found[name], found["baseline"][: len(found[name])])


def test_loads_are_bit_equal_to_the_engines_own_cache(found: dict[str, Any]) -> None:
    for name in ("warm", "restart", "restart_async"):
        for answer, control in zip(found[name], found["control"], strict=True):
            assert answer["tokens"] == control["tokens"]
            assert answer["logprobs"] == control["logprobs"]


def test_everything_was_loaded(found: dict[str, Any]) -> None:
    prefix = found["prefix"]
    for name in ("warm", "restart", "restart_async"):
        assert loaded(found[name]) == [prefix] * 3
    assert found["restart_books"]["hits"]["disk"] == prefix // 256
    assert found["restart_async_books"]["hits"]["disk"] == prefix // 256
