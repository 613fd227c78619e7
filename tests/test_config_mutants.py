"""Hundreds of broken configurations: every one is refused at its line, with its value and a fix."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_mutants import FAR_MODEL, Mutant, bases, between, mutants
from dists import Distributions

from lmcache_core import plugins
from lmcache_core.config import load
from lmcache_core.errors import ConfigError, Problem


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with what the mutants trip over, and the third party's plugin."""
    monkeypatch.setattr(plugins, "installed", functools.cache(plugins.installed))  # else most of the time
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    module = site / f"{Distributions(site).backend('far')}.py"
    source = module.read_text().replace("class Config(BackendConfig):", FAR_MODEL + "\nclass Config(BackendConfig):")
    module.write_text(
        source.replace('    region: str = "here"', '    region: str = "here"\n    retry: Retry = Retry()')
    )
    yield tmp_path
    for name in [n for n, m in sys.modules.items() if str(site) in str(getattr(m, "__file__", None))]:
        del sys.modules[name]


def problems(directory: Path, base: str, text: str) -> tuple[Problem, ...]:
    """What is wrong with a text; nothing when it loads."""
    file = directory / f"config{Path(base).suffix}"
    file.write_text(text.replace("DIR", str(directory)))
    try:
        load(file, env={})
    except ConfigError as error:
        return error.problems
    return ()


def fault(directory: Path, mutant: Mutant, found: tuple[Problem, ...]) -> str:
    """What the loader did wrong with a mutant; empty when nothing."""
    if not found:
        return "is accepted"
    file = directory / f"config{Path(mutant.base).suffix}"
    lines = tuple(f"{file}:{line}:" for line in (mutant.line, *mutant.also))
    here = [problem for problem in found if problem.where.startswith(lines)]
    if not here:
        return f"is refused at {[problem.where.rpartition('/')[2] for problem in found]}"
    value = mutant.value.replace("DIR", str(directory))
    value = "..." if value.startswith(("[", "{")) else value.strip("'\"")
    if value == "canary-key":
        value = "***"
    if not any(value[:60] in str(problem) for problem in here):  # long ones are shown cut
        return "does not show the value:\n" + "\n".join(map(str, here))
    if not all(problem.fix and problem.code for problem in found):
        return "has no fix:\n" + "\n".join(map(str, found))
    return ""


def test_the_bases_are_good(place: Path) -> None:
    for name, text in bases().items():
        assert problems(place, name, text) == (), name


def test_every_mutant_is_refused_at_its_line_with_value_and_fix(place: Path) -> None:
    corpus = [*mutants(), *between()]
    assert len({(mutant.base, mutant.text) for mutant in corpus}) == len(corpus) >= 300
    faults: list[str] = []
    unhelpful: list[str] = []
    for mutant in corpus:
        found = problems(place, mutant.base, mutant.text)
        if wrong := fault(place, mutant, found):
            faults.append(f"{mutant}: {wrong}")
        said = " ".join(f"{problem.what} {problem.fix}" for problem in found)
        if mutant.meant and f"did you mean `{mutant.meant}`?" not in said:
            unhelpful.append(f"{mutant}: {said}")
    misspelt = sum(bool(mutant.meant) for mutant in corpus)
    right = misspelt - len(unhelpful)
    print(f"\n{len(corpus)} mutants of {len(bases())} files: {len(corpus) - len(faults)} refused at their line")
    print(f"{misspelt} typing mistakes: {right} right suggestions ({100 * right / misspelt:.1f} %)")
    print(", ".join(f"{kind} {count}" for kind, count in Counter(m.kind for m in corpus).most_common()))
    assert not faults, f"{len(faults)} of {len(corpus)}:\n" + "\n".join(faults)
    assert misspelt >= 300
    assert right >= 0.95 * misspelt, "\n".join(unhelpful)


def test_the_corpus_is_the_same_every_time() -> None:
    assert [mutant.text for mutant in mutants()] == [mutant.text for mutant in mutants()]
