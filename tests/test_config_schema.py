"""`lmcachectl schema` with plugins of third parties: only those asked for, and what they say reaches editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from config_mutants import FAR, FAR_MODEL
from dists import Distributions

from lmcache_core.cli import main
from lmcache_core.config import load
from lmcache_core.errors import ConfigError

Capture = pytest.CaptureFixture[str]


def far(dists: Distributions) -> str:
    """Install backend `far`, with a model inside its settings; return its module."""
    module = dists.backend("far")
    file = dists.path / f"{module}.py"
    source = file.read_text().replace("class Config(BackendConfig):", FAR_MODEL + "\nclass Config(BackendConfig):")
    file.write_text(source.replace('    region: str = "here"', '    region: str = "here"\n    retry: Retry = Retry()'))
    return module


def printed(capsys: Capture, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    assert main(["schema", *options]) == code
    out, err = capsys.readouterr()
    made = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(made)
    return made, err


def types(made: dict[str, Any]) -> set[str]:
    cases = made["$defs"]["BackendConfig"]["oneOf"]
    return {case["allOf"][1]["properties"]["type"]["const"] for case in cases if "allOf" in case}


def test_installed_plugins_are_described_only_when_asked_for(dists: Distributions, capsys: Capture) -> None:
    module = far(dists)
    made, _ = printed(capsys)
    assert {"cpu", "gds"} <= types(made)
    assert "far" not in types(made)
    assert not dists.imported(module)
    made, err = printed(capsys, "--installed")
    assert {"cpu", "gds", "far"} <= types(made)
    assert dists.imported(module)
    assert "Where it is." in json.dumps(made), "descriptions reach editors"
    assert err == ""


def test_plugins_that_a_file_names_are_described(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    far(dists)
    other = dists.backend("near")
    file = tmp_path / "far.yaml"
    file.write_text(FAR)
    made, _ = printed(capsys, str(file), "--json")
    assert "far" in types(made)
    assert not dists.imported(other), "installed is not active"
    validator = jsonschema.Draft202012Validator(made)
    memory = {"name": "dram", "capacity": "1GiB", "backend": {"type": "cpu"}}
    cold: dict[str, Any] = {"name": "cold", "backend": {"type": "far", "url": "u", "retry": {"attempts": 2}}}
    assert validator.is_valid({"tiers": [memory, cold]})
    cold["backend"]["retry"] = {"atempts": 2}
    assert not validator.is_valid({"tiers": [memory, cold]})


def test_a_plugin_that_cannot_be_imported_is_left_out_and_named(dists: Distributions, capsys: Capture) -> None:
    far(dists)
    dists.add("lmcache-backend-torn", {"lmcache.backends": {"torn": "plug_torn"}}, {"plug_torn": "1 / 0"})
    made, err = printed(capsys, "--installed", code=1)
    assert "far" in types(made)
    assert "left out: backend `torn` of lmcache-backend-torn 1.2.3 (plug_torn) cannot be imported" in err


def test_settings_without_a_schema_are_left_out_and_named(dists: Distributions, capsys: Capture) -> None:
    module = dists.backend("odd")
    file = dists.path / f"{module}.py"
    file.write_text(file.read_text().replace('region: str = "here"', "region: __import__('typing').Callable = print"))
    made, err = printed(capsys, "--installed", code=1)
    assert "odd" not in types(made)
    assert "its settings have no JSON Schema" in err


@pytest.mark.parametrize(
    "old, new, line, path, says",
    [
        ("url: far://host/bucket", "ulr: far://host/bucket", 8, "tiers[1].backend.ulr", "did you mean `url`?"),
        ("attempts: 3", "atempts: 3", 11, "tiers[1].backend.retry.atempts", "did you mean `attempts`?"),
        ("attempts: 3", "attempts: many", 11, "tiers[1].backend.retry.attempts", "How often"),
        ("mode: steady", "mode: stedy", 11, "tiers[1].backend.retry.mode", "did you mean `steady`?"),
        ("pause: 100ms", "pause: 100 mss", 11, "tiers[1].backend.retry.pause", "did you mean `ms`?"),
    ],
)
def test_mistakes_inside_a_plugins_own_settings(
    dists: Distributions, tmp_path: Path, old: str, new: str, line: int, path: str, says: str
) -> None:
    far(dists)
    file = tmp_path / "far.yaml"
    assert FAR.count(old) == 1
    file.write_text(FAR.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load(file, env={})
    [problem] = error.value.problems
    assert problem.where.startswith(f"{file}:{line}:")
    assert problem.path == path
    assert says in f"{problem.what} {problem.fix}"


def test_explain_shows_a_plugins_own_settings(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    far(dists)
    file = tmp_path / "far.yaml"
    file.write_text(FAR)
    assert main(["explain", str(file), "--json"]) == 0
    settings = {s["path"]: (s["value"], s["origin"]) for s in json.loads(capsys.readouterr().out)["settings"]}
    assert settings["tiers[1].backend.retry.pause"] == (0.1, f"{file}:11")
    assert settings["tiers[1].backend.region"] == ("north", f"{file}:9")
    assert settings["tiers[1].backend.access_key"] == ("***", f"{file}:10")
