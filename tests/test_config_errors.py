"""Broken configurations: every one is refused, with its place, its value and the mend. All problems at once."""

from __future__ import annotations

import functools
import os
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken_configs import ENVIRONMENT, GOOD, TOML, TOML_GOOD, YAML, Says, change

from lmcache_core import plugins
from lmcache_core.config import TierConfig, load
from lmcache_core.config.findings import Code
from lmcache_core.errors import ConfigError, Problem

INSTALLED = functools.cache(plugins.installed)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for plugins once: nothing here installs any, and looking is most of the time."""
    monkeypatch.setattr(plugins, "installed", INSTALLED)


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], str]:
    """Put the test's directory into a text."""
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    return lambda text: text.replace("DIR", str(tmp_path))


def refused(file: Path, env: dict[str, str] | None = None) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as error:
        load(file, env=env or {})
    for problem in error.value.problems:
        assert str(problem) in str(error.value)
        assert problem.what
        assert problem.code in list(Code)
    return error.value.problems


def expect(problems: tuple[Problem, ...], prefix: str, says: Says, place: Callable[[str], str]) -> None:
    where, path, value, words = says
    for problem in problems:
        message = f"{problem.what} {problem.fix}"
        if problem.where.startswith(prefix + where) and problem.path == path and place(words) in message:
            assert problem.value == place(value)
            if where and not where.endswith(":"):
                assert problem.where == prefix + where
            return
    pytest.fail(f"no problem {says} among:\n" + "\n".join(map(str, problems)))


def check_text(tmp_path: Path, suffix: str, text: str, says: list[Says], place: Callable[[str], str]) -> None:
    file = tmp_path / f"config{suffix}"
    file.write_text(place(text))
    problems = refused(file)
    for one in says:
        expect(problems, f"{file}:" if one[0] else "", one, place)
    if len(says) == 1:
        assert len(problems) == 1, "one mistake is one problem:\n" + "\n".join(map(str, problems))


def test_the_unbroken_ones_load(tmp_path: Path, place: Callable[[str], str]) -> None:
    for suffix, text in ((".yaml", GOOD), (".toml", TOML_GOOD)):
        file = tmp_path / f"config{suffix}"
        file.write_text(place(text))
        assert [tier.name for tier in load(file, env={}).config.tiers] == ["dram", "nvme"]


@pytest.mark.parametrize("name", YAML)
def test_yaml(tmp_path: Path, place: Callable[[str], str], name: str) -> None:
    check_text(tmp_path, ".yaml", *YAML[name], place)


@pytest.mark.parametrize("name", TOML)
def test_toml(tmp_path: Path, place: Callable[[str], str], name: str) -> None:
    check_text(tmp_path, ".toml", *TOML[name], place)


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_environment(tmp_path: Path, place: Callable[[str], str], name: str) -> None:
    env, says = ENVIRONMENT[name]
    file = tmp_path / "config.yaml"
    file.write_text(place(GOOD))
    problems = refused(file, env)
    expect(problems, f"environment variable {next(iter(env))}", says, place)
    assert len(problems) == 1


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no such file or directory"),
        (b"x" * (1 << 16 | 1), "is larger than 64 KiB"),
        (b"tiers: \xff\xfe", "is not UTF-8 text (byte 7)"),
    ],
    ids=["absent", "huge", "binary"],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "lmcache.yaml"
    if content is not None:
        file.write_bytes(content)
    [problem] = refused(file)
    assert (problem.where, problem.code) == (str(file), Code.READ)
    assert says in problem.what


def test_files_that_are_not_files(tmp_path: Path) -> None:
    [problem] = refused(tmp_path)
    assert "is not a regular file" in problem.what
    os.mkfifo(tmp_path / "fifo.yaml")
    [problem] = refused(tmp_path / "fifo.yaml")
    assert "is not a regular file" in problem.what


def test_an_absent_file_with_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "lmcache.yaml").write_text(GOOD)
    [problem] = refused(tmp_path / "lmcahe.yaml")
    assert problem.fix == f"did you mean `{tmp_path / 'lmcache.yaml'}`?"


def test_all_problems_come_at_once_in_the_order_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "chunk_tokens: abc\n"
        "verfy: serve\n"
        "tiers:\n"
        "  - {name: dram, capcity: 4GiB, backend: {type: cpu, pn: true}}\n"
        "  - {name: dram, capacity: 5GX, write: bakc, backend: {type: gdss, path: /kv}}\n"
        "  - {name: x, name: y, capacity: 1MiB, backend: {type: cpu}}\n"
        "plugins: [watch]\n"
    )
    problems = refused(file, {"LMCACHE__TIERS__DRAN__WRITE": "back"})
    found = [(problem.where.removeprefix(f"{file}:").partition(":")[0], problem.path) for problem in problems]
    assert found == [
        ("1", "chunk_tokens"),
        ("2", "verfy"),
        ("4", "tiers[0].capcity"),
        ("4", "tiers[0].backend.pn"),
        ("5", "tiers[1].name"),
        ("5", "tiers[1].capacity"),
        ("5", "tiers[1].write"),
        ("5", "tiers[1].backend.type"),
        ("6", "tiers[2].name"),
        ("6", "tiers[2].backend"),
        ("7", "plugins[0]"),
        ("environment variable LMCACHE__TIERS__DRAN__WRITE", "tiers.dran"),
    ]
    assert str(ConfigError(problems)).startswith("12 configuration errors\n")


def test_the_message_has_place_value_mark_consequence_and_mend(tmp_path: Path, place: Callable[[str], str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(place(change("capacity: 1GiB", "max_sise: 200GB")))
    [problem] = [p for p in refused(file) if p.code == Code.UNKNOWN]
    assert str(problem).splitlines() == [
        f"LMC-1104  {file}:7:5",
        "   tiers[1].max_sise: 200GB",
        "            ^^^^^^^^ unknown key",
        "   why it stops: an ignored key would leave its default in force without a word",
        "   fix: remove it; keys here: " + ", ".join(f"`{key}`" for key in TierConfig.model_fields),
    ]


# -- 300 typos -----------------------------------------------------------------------------------------------


def full(directory: Path) -> dict[str, Any]:
    """Every key there is, each with a valid value."""
    lane = {"threads": 2, "queue": 64, "inflight": "1MiB", "deadline": "5s"}
    return {
        "chunk_tokens": 256,
        "verify": "load",
        "plugins": [],
        "tiers": [
            {
                "name": "dram",
                "capacity": "1MiB",
                "eviction": {"type": "lru"},
                "backend": {"type": "cpu", "pin": True, "shared": False},
            },
            {
                "name": "nvme",
                "capacity": "1GiB",
                "write": "back",
                "promote": False,
                "lane": lane,
                "eviction": {"type": "lru"},
                "backend": {
                    "type": "gds",
                    "path": str(directory / "kv"),
                    "mode": "segments",
                    "io": "auto",
                    "free_floor": "1%",
                    "segment_bytes": "16MiB",
                },
            },
        ],
    }


def sparse(data: dict[str, Any], keep: tuple[str | int, ...]) -> dict[str, Any]:
    """Only what is required, and what is on the way to `keep`."""
    needed = {"tiers", "name", "capacity", "backend", "type", "path"}

    def cut(node: Any, rest: tuple[str | int, ...] | None) -> Any:
        if isinstance(node, dict):
            kept = [key for key in node if key in needed or (rest and key == rest[0])]
            return {key: cut(node[key], rest[1:] if rest and key == rest[0] else None) for key in kept}
        if isinstance(node, list):
            return [cut(item, rest[1:] if rest and i == rest[0] else None) for i, item in enumerate(node)]
        return node

    result = cut(data, keep)
    assert isinstance(result, dict)
    return result


def places(node: Any, loc: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if isinstance(node, dict):
        return [found for key in node for found in [(*loc, key), *places(node[key], (*loc, key))]]
    if isinstance(node, list):
        return [found for i, item in enumerate(node) for found in places(item, (*loc, i))]
    return []


def typo(word: str, edits: int, rng: random.Random) -> str:
    letters = list(word)
    for _ in range(edits):
        at = rng.randrange(len(letters))
        kind = rng.choice(["drop", "double", "swap", "replace", "insert"])
        if kind == "drop" and len(letters) > 2:
            del letters[at]
        elif kind == "double":
            letters.insert(at, letters[at])
        elif kind == "swap" and at + 1 < len(letters):
            letters[at], letters[at + 1] = letters[at + 1], letters[at]
        elif kind == "replace":
            letters[at] = rng.choice(string.ascii_lowercase)
        else:
            letters.insert(at, rng.choice(string.ascii_lowercase))
    return "".join(letters)


@pytest.mark.parametrize("style", ["full", "sparse"])
def test_typos_in_every_key(tmp_path: Path, style: str) -> None:
    rng = random.Random(20)
    data = full(tmp_path)
    spots = places(data)
    words = {str(spot[-1]) for spot in spots} | {"serde", "inodes"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    load(file, env={})
    tried = right = 0
    wrong: list[str] = []
    while tried < 150:
        spot = spots[tried % len(spots)]
        key = str(spot[-1])
        # Two random letters of a word of four leave nothing to recognise.
        bad = typo(key, 2 if len(key) > 4 and rng.random() < 0.5 else 1, rng)
        if bad in words:
            continue
        tried += 1
        broken = data if style == "full" else sparse(data, spot)
        broken = yaml.safe_load(yaml.safe_dump(broken))
        node: Any = broken
        for part in spot[:-1]:
            node = node[part]
        node[bad] = node.pop(key)
        file.write_text(yaml.safe_dump(broken))
        problems = refused(file)
        assert any(p.path.endswith(bad) and p.code == Code.UNKNOWN for p in problems), f"{bad} for {key} was not found"
        if any(p.path.endswith(bad) and f"did you mean `{key}`?" in p.what for p in problems):
            right += 1
        else:
            wrong.append(f"{bad} for {key}")
    assert right >= 0.95 * tried, f"{right} of {tried}; wrong: {wrong}"
