"""Reading YAML and TOML: plain data, exact places."""

from __future__ import annotations

import json
import re
import string
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core.config import text

CORE_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
"""YAML 1.2.2, 10.3.2. PyYAML follows YAML 1.1, where `1e6` is a word, and so writes it without quotes."""
WORDS = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=8)


def plain(words: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers(-(10**18), 10**18) | words | st.floats(-1e6, 1e6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=12,
    )


PLAIN = plain(WORDS)
SAME_IN_BOTH_YAMLS = plain(WORDS.filter(lambda word: not CORE_NUMBER.fullmatch(word)))


@given(st.dictionaries(st.text(alphabet=string.ascii_letters, min_size=1, max_size=6), PLAIN, max_size=4))
def test_json_is_yaml_with_places(data: dict[str, Any]) -> None:
    doc = text.parse_yaml("x", json.dumps(data, ensure_ascii=False))
    assert doc.data == data
    assert doc.problems == []
    assert set(doc.places) == {(), *locs(data)}
    lines = text.parse_yaml("x", json.dumps(data, indent=1, ensure_ascii=False)).places
    assert len({place for loc, place in lines.items() if loc}) == len(lines) - 1, "every setting has its own place"


@given(st.dictionaries(st.text(alphabet=string.ascii_letters, min_size=1, max_size=6), SAME_IN_BOTH_YAMLS, max_size=4))
def test_what_pyyaml_writes_reads_back(data: dict[str, Any]) -> None:
    assert text.parse_yaml("x", yaml.safe_dump(data)).data == data


@pytest.mark.parametrize("written, value", [("1e6", 1e6), ("0E0", 0.0), ("0o17", 15), ("'1e6'", "1e6")])
def test_numbers_are_those_of_yaml_1_2(written: str, value: object) -> None:
    data = text.parse_yaml("x", f"a: {written}\n").data
    assert data == {"a": value}
    assert type(data["a"]) is type(value)


def locs(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*loc, key)
        yield from locs(item, (*loc, key))


@pytest.mark.parametrize(
    "written, value",
    [
        ("on", "on"),
        ("yes", "yes"),
        ("True", True),
        ("~", None),
        ("", None),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("+5", 5),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("'5'", "5"),
        ('"\\u00e9"', "é"),
        ("9" * 5000, "9" * 5000),
        ("| \n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_scalars_follow_the_core_schema(written: str, value: Any) -> None:
    assert text.parse_yaml("x", f"key: {written}").data == {"key": value}


TRICKY_TOML = [
    'a = 1\nb.c = "x # not a comment"\n"d e".f = 2 # comment\n',
    "[t]\nx = [1, 2, # one\n  [3], {y = 4, z = [5]}]\n[t.u]\nv = '''\nw = 1\n[no]\n'''\n",
    '[[a]]\nb = 1\n[[a]]\n[a.c]\nd = 2\n[[a.e]]\nf = 3\n[[a.e]]\nf = 4\n[z]\ny = """\\"""" \n',
    "x = []\ny = {}\nz = [[], {}, [[]]]\n'q.r' = 1979-05-27T07:32:00Z\ns = -inf\n",
    'k = """a""quoted""" \nl = """"tight""""\nm = ""\nn = \'\'\n',
    "[ a . b ]\r\nc=1\r\n",
    "a = { b.c = 1, b.d = [ { e = 2 } ] }\n",
]


@pytest.mark.parametrize("content", TRICKY_TOML)
def test_toml_places_cover_every_setting(content: str) -> None:
    data = tomllib.loads(content)
    doc = text.parse_toml("x", content)
    assert doc.data == data
    assert set(doc.places) == {(), *locs(data)}


TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(toml, value)) + "]"
    return json.dumps(value)


@given(st.dictionaries(st.text(max_size=4), TOML_VALUES, max_size=4))
def test_toml_places_of_any_document(data: dict[str, Any]) -> None:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped, and surrogates, which it has none of.
    content = "\n".join(f"{json.dumps(key)} = {toml(item)}" for key, item in data.items()).replace("\x7f", "\\u007f")
    try:
        expected = tomllib.loads(content)
    except tomllib.TOMLDecodeError:
        return
    doc = text.parse_toml("x", content)
    assert doc.data == expected
    assert set(doc.places) == {(), *locs(expected)}


def test_toml_places_are_exact() -> None:
    doc = text.parse_toml("x", '[[a]]\nb = 1\n  c = {d = 1, "e" = [1,\n 2]}\n[a.f]\ng.h = 1\n')
    assert doc.places["a", 0] == (1, 3)
    assert doc.places["a", 0, "c", "d"] == (3, 8)
    assert doc.places["a", 0, "c", "e"] == (3, 15)
    assert doc.places["a", 0, "c", "e", 1] == (4, 2)
    assert doc.places["a", 0, "f", "g", "h"] == (6, 1)
