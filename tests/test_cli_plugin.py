"""`lmcachectl plugin new` and `plugin test`: what they write works as it is, and what they say is clear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from textwrap import dedent

import pytest
from dists import BACKEND, Distributions

from lmcache_core.cli import main
from lmcache_core.cli.plugin_new import KINDS, write
from lmcache_core.errors import ConfigError
from lmcache_core.plugins import BACKENDS, EVICTIONS, PLUGINS, RIGS, SERDES

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]
LONGEST = "a_name_of_24_letters_abc"
RUFF = ["check", "--line-length=120", "--select=E,F,W,I,UP,B,C4,SIM,RUF,PT,PIE,RET"], ["format", "--line-length=120"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    words = [str(word) for word in command]
    env = {**os.environ, **env}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{words} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def record(capsys: Capture) -> dict[str, object]:
    last: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return last


# -- plugin new ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package of each kind, as written."""
    place = tmp_path_factory.mktemp("packages")
    return {kind: write(f"my_{kind}", kind, place)[0] for kind in KINDS}


@pytest.fixture(scope="module")
def python(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with what is installed here, and the packages, installed as their authors would."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", "-e", packages["backend"], cwd=place)
    for kind in KINDS.keys() - {"backend"}:  # the same project file with other words
        project = tomllib.loads((packages[kind] / "pyproject.toml").read_text())["project"]
        (site / f"{project['name']}.pth").write_text(f"{packages[kind]}\n")
        Distributions(site).add(project["name"], project["entry-points"], {})
    return python


def test_new_plugins_pass_their_tests(packages: dict[str, Path], python: Path) -> None:
    others = [packages[kind] / "tests" for kind in KINDS if kind != "backend"]
    pytest_ = (python, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    out = run(*pytest_, "tests", *others, cwd=packages["backend"])
    assert " passed" in out and "skipped" not in out


def test_new_plugins_keep_the_contract_and_work_in_a_configuration(
    packages: dict[str, Path], python: Path, tmp_path: Path
) -> None:
    config = f"""
    chunk_tokens: 16
    plugins: [my_wrapper]
    tiers:
      - {{name: dram, capacity: 4MiB, backend: {{type: cpu}}}}
      - name: mine
        capacity: 16MiB
        serde: {{type: my_serde, level: 2}}
        eviction: {{type: my_eviction}}
        backend: {{type: my_backend, path: {tmp_path}/kv}}
    """
    (tmp_path / "lmcache.yaml").write_text(dedent(config))
    program = """
import sys
from lmcache_core.cli import main
for kind in sys.argv[1:]:
    assert main(["plugin", "test", f"my_{kind}", "--json"]) == 0
for command in ("check", "plugins", "schema", "explain"):
    assert main([command, "lmcache.yaml", "--json"]) == 0
"""
    lines = [json.loads(line) for line in run(python, "-c", program, *KINDS, cwd=tmp_path).splitlines()]
    for kind, result in zip(KINDS, lines, strict=False):
        assert (result["ok"], result["kind"], result["failed"]) == (True, kind, 0)
        assert result["passed"] >= 6
    checked, listed, schema, explained = lines[len(KINDS) :]
    assert checked["ok"]
    active = {(p["group"], p["name"]) for p in listed["plugins"] if p["active"]}
    assert active >= {(what.group, f"my_{kind}") for kind, what in KINDS.items()}
    assert (RIGS, "my_backend") not in active
    assert schema["$defs"]["MyBackendConfig"]["properties"]["path"]["description"]
    assert {"MySerdeConfig", "MyEvictionConfig"} <= set(schema["$defs"])
    assert "tiers[1].serde.level" in json.dumps(explained)


def test_new_plugins_are_typed(packages: dict[str, Path], tmp_path: Path) -> None:
    sources = [root / root.name for root in packages.values()]
    # With the project's own options and cache, what is imported is not checked again.
    options = ("--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}")
    out = run(sys.executable, "-m", "mypy", *options, *sources, cwd=tmp_path, MYPYPATH=str(ROOT))
    assert "no issues found in 5 source files" in out


@pytest.mark.parametrize("name", ["x", LONGEST])
def test_new_plugins_are_clean_and_short(name: str, tmp_path: Path) -> None:
    for kind in KINDS:
        root, files = write(name, kind, tmp_path)
        for words in RUFF:
            check = ["--check"] if words[0] == "format" else []
            run(sys.executable, "-m", "ruff", *words, *check, "--isolated", "--no-cache", ".", cwd=root)
        assert len((root / root.name / "__init__.py").read_text().splitlines()) < 100
        assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == files
        assert not [file for file in files if "$" in (root / file).read_text()]


def test_new_tells_what_to_do_next(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", "s3x"]) == 0
    out = capsys.readouterr().out
    for words in ("wrote lmcache_backend_s3x", "tests/test_s3x.py", "pip install -e", "lmcachectl plugin test s3x"):
        assert words in out
    assert main(["plugin", "new", "s4", "--kind", "serde", "--dir", "deep/er", "--json"]) == 0
    result = record(capsys)
    assert (result["kind"], result["directory"]) == ("serde", "deep/er/lmcache_serde_s4")
    assert (tmp_path / "deep/er/lmcache_serde_s4/pyproject.toml").is_file()


def test_new_never_overwrites(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "lmcache_backend_s3x").mkdir()
    assert main(["plugin", "new", "s3x", "--dir", str(tmp_path)]) == 1
    assert "lmcache_backend_s3x exists, and nothing is overwritten" in capsys.readouterr().err
    assert list((tmp_path / "lmcache_backend_s3x").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    assert main(["plugin", "new", "s3x", "--dir", str(tmp_path / "file")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name, says",
    [
        ("", "`` is no plugin name"),
        ("S3x", "for instance `s3x`"),
        ("my-store", "for instance `my_store`"),
        ("3s", "for instance `s`"),
        ("a__b", "for instance `a_b`"),
        ("../up", "for instance `up`"),
        ("x" * 25, "at most 24 characters"),
        ("ünï", "is no plugin name"),
        ("class", "is a word of Python"),
        ("gds", "`gds` is a backend of lmcache-core already"),
    ],
)
def test_wrong_names_are_refused_with_a_better_one(name: str, says: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["plugin", "new", name, "--dir", str(tmp_path), "--json"]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert json.loads(captured.out)["ok"] is False
    assert list(tmp_path.iterdir()) == []


def test_a_name_may_be_taken_in_another_kind(tmp_path: Path) -> None:
    assert write("gds", "serde", tmp_path)[0].is_dir()
    with pytest.raises(ConfigError, match="`zstd` is a serde of lmcache-core already"):
        write("zstd", "serde", tmp_path)


# -- plugin test -----------------------------------------------------------------------------------------------------
BROKEN = BACKEND.replace("self.objects.update((key, bytes(buffer))", "self.objects.update((key, bytes(buffer)[:-1])")
RIG = """
from contextlib import contextmanager
from lmcache_core.testing.rig import Medium, Rig
from plug_s9 import Config

class S9Rig(Rig):
    @contextmanager
    def start(self, directory):
        yield Medium(Config(url="s9://rig"))
"""
SERDE = """
from typing import Literal
from lmcache_core.hookspecs import hookimpl
from lmcache_core.protocols import SerdeConfig
from lmcache_serde.raw import Raw

class Clipped(Raw):
    def bound(self): return super().bound() - 1

class Config(SerdeConfig):
    type: Literal["s9"] = "s9"
    honest: bool = False
    def build(self, context): return Raw(context) if self.honest else Clipped(context)

@hookimpl
def lmcache_serdes(): return [Config]
"""
WRAPPER = """
from lmcache_core.hookspecs import hookimpl
from lmcache_core.testing.wrappers import Forwarding

class Forgets(Forwarding):
    def delete(self, keys): pass

@hookimpl(wrapper=True)
def lmcache_build_backend(config, context):
    return Forgets((yield))
"""


def test_broken_contracts_are_named(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    entries = {BACKENDS: {"s9": "plug_s9"}, RIGS: {"s9": "plug_s9_rig:S9Rig"}}
    dists.add("acme", entries, {"plug_s9": BROKEN.replace("{name}", "s9"), "plug_s9_rig": RIG})
    assert main(["plugin", "test", "s9", "--json", "--path", str(tmp_path / "place")]) == 1
    result = record(capsys)
    assert result["ok"] is False
    assert result["passed"] + result["failed"] == len(result["outcomes"])  # type: ignore[operator, arg-type]
    outcomes = {outcome["name"]: outcome for outcome in result["outcomes"]}  # type: ignore[attr-defined]
    assert outcomes["what_was_put_is_got"]["contract"] == "exact sizes"
    assert outcomes["empty_batches"]["passed"]
    assert list((tmp_path / "place").iterdir()) == []
    assert main(["plugin", "test", "s9", "--path", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "  ok      empty batches\n" in out
    assert "  FAILED  what was put is got\n          contract `exact sizes`: " in out
    assert out.splitlines()[-1].startswith("backend s9: ")


def test_options_take_the_place_of_a_rig(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    dists.backend("s9")
    place = ["--path", str(tmp_path)]
    assert main(["plugin", "test", "s9", *place]) == 2
    err = capsys.readouterr().err
    assert "s9.url" in err and "has no rig" in err and "give it: --option url=..." in err
    # It keeps its objects in the backend, so that nothing survives a reopen: the contracts that say so fail.
    assert main(["plugin", "test", "s9", *place, "--option", "url=s9://x", "--option", "region=there", "--json"]) == 1
    result = record(capsys)
    assert {o["contract"] for o in result["outcomes"] if not o["passed"]} == {"reopen"}  # type: ignore[attr-defined]


def test_options_change_what_a_rig_sets(tmp_path: Path, capsys: Capture) -> None:
    words = ["plugin", "test", "gds", "--path", str(tmp_path), "--json"]
    assert main([*words, "--option", "mode=files", "--option", "inodes=5000"]) == 0
    assert record(capsys)["failed"] == 0
    assert main([*words, "--option", "inodes=5000"]) == 2
    assert "inodes has no meaning in mode `segments`" in capsys.readouterr().err


def test_serdes_and_wrappers_are_tested_too(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    entries = {SERDES: {"s9": "plug_serde"}, PLUGINS: {"w9": "plug_wrapper"}}
    dists.add("acme", entries, {"plug_serde": SERDE, "plug_wrapper": WRAPPER})
    place = ["--json", "--path", str(tmp_path)]
    assert main(["plugin", "test", "s9", *place]) == 1
    result = record(capsys)
    assert result["kind"] == "serde"
    assert any(o["contract"] for o in result["outcomes"])  # type: ignore[attr-defined]
    assert main(["plugin", "test", "s9", "--option", "honest=true", *place]) == 0
    assert main(["plugin", "test", "w9", *place]) == 1
    result = record(capsys)
    assert result["kind"] == "wrapper"
    assert "delete" in {o["contract"] for o in result["outcomes"]}  # type: ignore[attr-defined]
    assert main(["plugin", "test", "w9", "--option", "a=b", *place]) == 2


def test_the_built_in_policy_keeps_its_contract(tmp_path: Path, capsys: Capture) -> None:
    assert main(["plugin", "test", "lru", "--path", str(tmp_path)]) == 0
    assert "eviction lru: 8 passed, 0 failed" in capsys.readouterr().out


def test_a_name_of_two_kinds_needs_the_kind(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    dists.add("acme", {EVICTIONS: {"gds": "plug_policy"}}, {})
    assert main(["plugin", "test", "gds", "--path", str(tmp_path)]) == 2
    assert "`gds` is a backend and a eviction: say which with --kind backend" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, says",
    [("zstdd", "did you mean `zstd`?"), ("nothing_like_it", "backend: "), ("nothing_like_it", "`pip install -e .`")],
)
def test_unknown_plugins_say_what_is_there(name: str, says: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["plugin", "test", name, "--path", str(tmp_path), "--json"]) == 2
    captured = capsys.readouterr()
    assert f"no plugin `{name}` is installed" in captured.err and says in captured.err
    assert json.loads(captured.out)["ok"] is False
