"""docs/plugins.md says what the code says. Its blocks are executed by `test_docs.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmcache_core.plugins import GROUPS
from lmcache_core.protocols import API_VERSION, MemoryBackend, StorageBackend
from lmcache_core.testing import contracts
from lmcache_core.testing.wrappers import Forwarding

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()


@pytest.mark.parametrize("name", ["storage", "serde", "eviction", "memory"])
def test_every_contract_of_the_kit_is_in_the_docs(name: str) -> None:
    match = re.search(f"<!-- contracts:{name} -->\n(.*?)<!-- /contracts:{name} -->", PAGE, re.DOTALL)
    assert match
    rows = [f"| {contract} | {words} |" for contract, words in getattr(contracts, name.upper()).items()]
    assert match.group(1).splitlines() == ["| contract | |", "|---|---|", *rows]


def test_every_method_of_a_backend_is_in_the_table() -> None:
    table = PAGE[PAGE.index("| method | must |") : PAGE.index("**Batches.**")]
    methods = {name for name, value in vars(StorageBackend).items() if callable(value) and not name.startswith("_")}
    assert set(re.findall(r"^\| `(\w+)\(", table, re.MULTILINE)) == methods
    for name in re.findall(r"^\| `(\w+)\([^|]*\| optional", table, re.MULTILINE):
        assert name not in StorageBackend.__abstractmethods__
    assert {"allocate", "close"} == MemoryBackend.__abstractmethods__, "`MemoryBackend` of two methods"


def test_groups_and_version_are_those_of_the_code() -> None:
    table = PAGE[PAGE.index("| group | the entry's name") : PAGE.index("**Rigs.**")]
    assert re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE) == list(GROUPS)
    assert f"is the version of this contract; it is {API_VERSION}." in PAGE
    assert f"LMCACHE_API = {API_VERSION}\n" in PAGE


def test_the_first_plugin_fits_one_screen() -> None:
    code = PAGE.split("```python first-plugin\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 60
    assert max(map(len, code.splitlines())) <= 100


def test_a_wrapper_passes_every_call_on() -> None:
    """`Forwarding`, which the docs and `plugin new` build wrappers on, leaves no method of a backend out."""
    methods = {name for name, value in vars(StorageBackend).items() if callable(value) and not name.startswith("_")}
    assert methods <= set(vars(Forwarding))
