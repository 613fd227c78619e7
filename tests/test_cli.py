"""`lmcachectl`: what it prints, where, and its exit codes."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dists import Distributions

from lmcache_backends.gds import GdsConfig
from lmcache_core import cli
from lmcache_core.build import build
from lmcache_core.cli import check, explain, layouts, main
from lmcache_core.cli.schema import schema
from lmcache_core.config import load
from lmcache_core.errors import LMCacheError
from lmcache_core.plugins import Plugins

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]

GOOD = """\
chunk_tokens: 16
tiers:
  - {name: dram, capacity: 4MiB, backend: {type: cpu}}
  - {name: disk, capacity: 64MiB, backend: {type: gds, path: DIR/kv}}
"""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LMCACHE_"):
            monkeypatch.delenv(name)


def write(directory: Path, content: str, name: str = "lmcache.yaml") -> str:
    file = directory / name
    file.write_text(content.replace("DIR", str(directory)))
    return str(file)


def record(capsys: Capture) -> dict[str, Any]:
    """The last line of stdout, which must be one JSON object."""
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(result, dict)
    return result


# -- check ---------------------------------------------------------------------------------------------------


def test_check_of_a_good_file(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path, GOOD)
    assert main(["check", file]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{file}: valid"
    assert lines[2].split()[:3] == ["dram", "cpu", "ok"]
    assert lines[3].split()[:3] == ["disk", "gds", "ok"]
    assert lines[3].endswith("4 chunks written, read, verified, deleted")
    assert lines[4].startswith("every tier works (32 KiB chunks, ")
    assert err == ""


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    assert main(["check", file]) == 0
    config = load(file).config
    pipeline = build(config, layouts.flat(8, config.chunk_tokens))
    try:
        assert pipeline.tiers[0].counts["recovered"] == 0
        assert pipeline.tiers[0].used == 0
    finally:
        pipeline.close()


@pytest.mark.parametrize("serde", ["raw", "zstd"])
def test_check_goes_through_the_serde(tmp_path: Path, capsys: Capture, serde: str) -> None:
    file = write(tmp_path, GOOD.replace("name: disk,", f"name: disk, serde: {{type: {serde}}},"))
    assert main(["check", file, "--json"]) == 0
    result = record(capsys)
    assert result["ok"] is True
    assert [(t["tier"], t["ok"]) for t in result["tiers"]] == [("dram", True), ("disk", True)]
    assert f"codec {serde}" in result["tiers"][1]["detail"]
    assert result["tiers"][1]["nbytes"] == 4 * result["chunk_bytes"]
    assert result["tiers"][1]["write_s"] > 0
    assert result["tiers"][1]["read_s"] > 0


def test_check_with_the_layout_of_a_model(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path, GOOD)
    assert main(["check", file, "--model", "smollm2-135m", "--json"]) == 0
    assert record(capsys)["chunk_bytes"] == 16 * 30 * 2 * 3 * 64 * 2
    assert main(["check", file, "--model", "llama-3.1-70b", "--json"]) == 1
    tiers = record(capsys)["tiers"]
    assert "hold 0 chunks" in tiers[0]["detail"]
    assert tiers[1]["detail"] == "not tried: tier `dram` failed"


def test_check_of_a_broken_file(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path, GOOD.replace("capacity: 64MiB", "capcity: 64MiB").replace("cpu", "gpuu"))
    assert main(["check", file]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("2 configuration errors\nLMC-1107  ")
    assert "fix: rename it to `capacity`" in err
    assert main(["check", file, "--json"]) == 2
    result = record(capsys)
    assert result["ok"] is False
    assert [p["code"] for p in result["problems"]] == ["LMC-1107", "LMC-1104"]
    assert result["problems"][1] == {
        "code": "LMC-1104",
        "where": f"{file}:4:18",
        "path": "tiers[1].capcity",
        "value": "64MiB",
        "what": "unknown key; did you mean `capacity`?",
        "why": "without its limit the tier could grow until the machine fails",
        "fix": "rename it to `capacity`",
    }


def test_check_names_each_tier_that_cannot_be_built(tmp_path: Path, capsys: Capture) -> None:
    more = (
        "  - {name: tiny, capacity: 1KiB, backend: {type: gds, path: DIR/tiny}}\n"
        "  - {name: lost, capacity: 64MiB, backend: {type: gds, path: /proc/1/nowhere}}\n"
        "  - {name: fine, capacity: 64MiB, backend: {type: gds, path: DIR/fine}}\n"
    )
    file = write(tmp_path, (GOOD + more).replace("/proc/1/nowhere", "DIR/full"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/lock").mkdir()  # where the backend wants a file
    assert main(["check", file, "--json"]) == 1
    rows = {row["tier"]: row for row in record(capsys)["tiers"]}
    assert [row["ok"] for row in rows.values()] == [True, True, False, False, True]
    assert "1024" in rows["tiny"]["detail"] or "1 KiB" in rows["tiny"]["detail"]
    assert str(tmp_path / "full") in rows["lost"]["detail"]


LIES = {
    "another object": ("found.append(None", "buffer[5000] ^= 1; found.append(None", "corrupt"),
    "short": ("else len(data))", "else len(data) - 1)", "corrupt"),
    "no bytes at all": ("buffer[:len(data)] = data", "pass", "corrupt"),
    "an error": ("found = []", "raise OSError(5, 'bad cable')", "bad cable"),
    "nothing": ("self.objects.update(", "list(", "read failed for 4 of 4 chunks"),
    "a wrong count": ("return [None] * len(keys)", "return [None]", "1 results for 4 keys"),
    "what was deleted": ("for key in keys: self.objects.pop(key, None)", "pass", "deleted objects are still there"),
}


@pytest.mark.parametrize("lie", LIES)
def test_check_finds_backends_that_lie(dists: Distributions, tmp_path: Path, capsys: Capture, lie: str) -> None:
    old, new, says = LIES[lie]
    module = dists.backend("far")
    source = (dists.path / f"{module}.py").read_text()
    assert source.count(old) == 1, old
    (dists.path / f"{module}.py").write_text(source.replace(old, new))
    file = write(tmp_path, GOOD + "  - {name: cold, backend: {type: far, url: u}}\n")
    assert main(["check", file]) == 1
    out = capsys.readouterr().out
    [row] = [line for line in out.splitlines() if line.split()[0] == "cold"]
    assert "FAILED" in row
    assert says in row
    assert "1 of 3 tiers failed" in out


def test_check_of_a_tier_that_is_only_read(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    dists.backend("far")
    file = write(tmp_path, GOOD + "  - {name: cold, write: never, backend: {type: far, url: u}}\n")
    assert main(["check", file, "--json"]) == 0
    assert record(capsys)["tiers"][2]["detail"] == "read only: it was asked, nothing was written"


def test_check_does_not_wait_for_a_medium_that_hangs(
    dists: Distributions, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(threading, "check_test_release", release, raising=False)
    module = dists.backend("far")
    path = dists.path / f"{module}.py"
    path.write_text(
        path.read_text().replace("found = []", "import threading; threading.check_test_release.wait(60); found = []")
    )
    monkeypatch.setattr(check, "_PATIENCE_S", 0.2)
    file = write(tmp_path, GOOD + "  - {name: cold, lane: {deadline: 10ms}, backend: {type: far, url: u}}\n")
    try:
        assert main(["check", file, "--json"]) == 1
        assert record(capsys)["tiers"][2]["detail"] == "no answer within 200 ms: the medium hangs"
    finally:
        release.set()


# -- explain -------------------------------------------------------------------------------------------------


def test_explain(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE__TIERS__DISK__LANE__DEADLINE", "500ms")
    file = write(tmp_path, GOOD)
    assert main(["explain", file, "--json"]) == 0
    result = record(capsys)
    settings = {s["path"]: (s["value"], s["origin"]) for s in result["settings"]}
    assert settings["chunk_tokens"] == (16, f"{file}:1")
    assert settings["tiers[1].lane.deadline"] == (0.5, "env:LMCACHE__TIERS__DISK__LANE__DEADLINE")
    assert settings["tiers[1].write"] == ("through", "default")
    budget = result["budget"]
    assert (budget["memory_bytes"], budget["threads"], budget["inflight_bytes"]) == (4 << 20, 18, {"disk": 1 << 30})
    assert budget["disks"][0]["path"] == str(tmp_path / "kv")
    assert [fit["model"] for fit in result["fits"]] == list(layouts.PRESETS)
    assert not (tmp_path / "kv").exists(), "explaining builds nothing"
    assert main(["explain", file]) == 0
    out = capsys.readouterr().out
    assert "tiers[1].lane.deadline" in out
    assert "500" not in out.splitlines()[0]
    assert "memory   4 MiB at start-up" in out
    assert f"64 MiB at most for `disk` in {tmp_path / 'kv'}" in out


@pytest.mark.parametrize("serde", ["", "serde: {type: raw}, ", "serde: {type: zstd}, "])
def test_what_explain_says_fits_is_what_build_cuts(tmp_path: Path, serde: str) -> None:
    loaded = load(write(tmp_path, GOOD.replace("name: disk,", f"name: disk, {serde}")))
    layout = layouts.flat(1000, 16)
    fits = explain.fits(loaded, "x", layout, Plugins())
    pipeline = build(loaded.config, layout)
    try:
        assert fits["chunks"]["dram"] == pipeline.slots.count
        assert fits["tokens"]["dram"] == 16 * pipeline.slots.count
        assert fits["slot_bytes"] == pipeline.slots.slot_bytes
    finally:
        pipeline.close()


def test_explain_shows_classic_notes(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path, "chunk_size: 64\nmax_local_cpu_size: 0.1\nsave_unfull_chunk: true\n")
    assert main(["explain", file]) == 0
    out = capsys.readouterr().out
    assert f"note: {file}:3: `save_unfull_chunk` is ignored" in out
    assert "chunk_tokens" in out


MODELS = {
    "plain": ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, ("bfloat16", 2, 2, 4, 16)),
    "grouped": (
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "dtype": "float16",
        },
        ("float16", 2, 2, 1, 32),
    ),
    "latent": (
        {"num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16"},
        ("bfloat16", 3, 1, 1, 576),
    ),
    "nested": (
        {"text_config": {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "dtype": "float32"}},
        ("float32", 2, 2, 4, 16),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layouts_of_model_directories(tmp_path: Path, name: str) -> None:
    config, expected = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = layouts.of_model(str(tmp_path), 16)
    assert (got.dtype, got.num_layers, got.planes, got.kv_heads, got.head_dim) == expected
    assert (got.order, got.chunk_tokens) == ("lknhd", 16)


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no directory with a config.json"),
        ("{", "cannot read"),
        ("[]", "does not hold a model configuration"),
        ('{"num_hidden_layers": "two"}', "`num_hidden_layers` must be a positive whole number, not 'two'"),
        ('{"num_hidden_layers": 2, "dtype": "int3"}', "dtype `int3` is not one of"),
        ('{"num_hidden_layers": 2}', "`num_attention_heads` must be"),
    ],
)
def test_layouts_of_what_is_no_model(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(LMCacheError, match=says):
        layouts.of_model(str(tmp_path), 16)


def test_a_misspelt_preset(capsys: Capture) -> None:
    assert main(["explain", "--model", "llama-3.1-8bb"]) == 1
    assert "did you mean `llama-3.1-8b`?" in capsys.readouterr().err


# -- plugins -------------------------------------------------------------------------------------------------


def test_plugins_lists_without_importing(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    module = dists.backend("far")
    file = write(
        tmp_path, GOOD + "  - {name: cold, backend: {type: far, url: u}}\n  - {name: x, backend: {type: no}}\n"
    )
    assert main(["plugins", file, "--json"]) == 0
    result = record(capsys)
    by_name = {(p["group"], p["name"]): p for p in result["plugins"]}
    assert by_name["lmcache.backends", "far"] == {
        "group": "lmcache.backends",
        "name": "far",
        "distribution": "lmcache-backend-far",
        "version": "1.2.3",
        "target": module,
        "file": str(dists.path),
        "active": True,
    }
    assert by_name["lmcache.serdes", "zstd"]["active"] is False
    assert by_name["lmcache.evictions", "lru"]["active"] is True
    assert result["missing"] == [{"group": "lmcache.backends", "name": "no"}]
    assert not dists.imported(module)
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "active means named by the configuration (default)" in out
    assert not dists.imported(module)


# -- schema --------------------------------------------------------------------------------------------------


def test_schema_is_one_valid_schema_that_accepts_what_loads(capsys: Capture) -> None:
    assert main(["schema", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    produced = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(produced)
    validator = jsonschema.Draft202012Validator(produced)
    examples = [
        yaml.safe_load(path.read_text()) for path in (ROOT / "examples").glob("*.yaml") if "classic" not in path.name
    ]
    assert len(examples) >= 3
    for data in [*examples, load(None, env={}).config.model_dump(mode="json")]:
        validator.validate(data)
    other = {"name": "cold", "backend": {"type": "third-party", "anything": [1]}}
    validator.validate({"tiers": [other]})


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "red"},
        {"chunk_tokens": 0},
        {"verify": "sometimes"},
        {"tiers": [{"name": "Bad Name", "capacity": "1GiB", "backend": {"type": "cpu"}}]},
        {"tiers": [{"name": "a", "capacity": "4G", "backend": {"type": "cpu"}}]},
        {"tiers": [{"name": "a", "capacity": 1, "backend": {"type": "cpu", "path": "/x"}}]},
        {"tiers": [{"name": "a", "capacity": 1, "backend": {"type": "gds"}}]},
        {"tiers": [{"name": "a", "capacity": 1, "backend": {}}]},
        {"tiers": [{"name": "a", "capacity": 1, "backend": {"type": "cpu"}, "lane": {"deadline": "soon"}}]},
        {"tiers": [{"name": "a", "capacity": 1, "backend": {"type": "cpu"}, "serde": {"type": "zstd", "levle": 1}}]},
    ],
)
def test_schema_refuses_what_does_not_load(change: dict[str, Any]) -> None:
    good = {"tiers": [{"name": "a", "capacity": 1, "backend": {"type": "cpu"}}]}
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(good)
    assert not validator.is_valid({**good, **change})


# -- engine-args ---------------------------------------------------------------------------------------------


def test_engine_args_for_vllm(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD, "it's mine.yaml")
    assert main(["engine-args", "vllm", "--config", "it's mine.yaml"]) == 0
    flag, value = shlex.split(capsys.readouterr().out)
    assert flag == "--kv-transfer-config"
    assert json.loads(value) == {
        "kv_connector": "LMCacheCoreConnector",
        "kv_connector_module_path": "lmcache_core.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": str(tmp_path / "it's mine.yaml")},
    }
    assert main(["engine-args", "vllm", "--json"]) == 0
    result = record(capsys)
    assert result["argv"] == ["--kv-transfer-config", json.dumps(result["kv_transfer_config"], separators=(",", ":"))]
    assert "kv_connector_extra_config" not in result["kv_transfer_config"]


@pytest.mark.parametrize("face", ["secondary-tier", "offloading-spec"])
def test_engine_args_within_vllms_own_offloading(tmp_path: Path, capsys: Capture, face: str) -> None:
    file = write(tmp_path, GOOD)
    assert main(["engine-args", "vllm", "--face", face, "--config", file, "--json"]) == 0
    transfer = record(capsys)["kv_transfer_config"]
    extra, module = transfer["kv_connector_extra_config"], "lmcache_core.adapters.vllm_offload"
    assert transfer["kv_connector"] == "OffloadingConnector"
    if face == "secondary-tier":
        assert extra["spec_name"] == "TieringOffloadingSpec"
        assert extra["secondary_tiers"] == [{"type": "LMCacheCoreTier", "module_path": module, "config": file}]
    else:
        assert extra == {"spec_name": "LMCacheCoreOffloadingSpec", "spec_module_path": module, "config": file}
    assert main(["engine-args", "sglang", "--face", face]) == 2
    assert "--face is for vllm" in capsys.readouterr().err


def test_engine_args_for_sglang(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path, GOOD)
    assert main(["engine-args", "sglang", "--config", file]) == 0
    *flags, value = shlex.split(capsys.readouterr().out)
    assert " ".join(flags) == (
        "--page-size 64 --enable-hierarchical-cache --hicache-storage-backend dynamic "
        "--hicache-storage-backend-extra-config"
    )
    own = {"backend_name": "lmcache-core", "interface_v1": 1}
    where = {"module_path": "lmcache_core.adapters.sglang", "class_name": "LMCacheCoreStorage"}
    assert json.loads(value) == {**own, **where, "config": file}
    assert main(["engine-args", "sglang", "--json"]) == 0
    result = record(capsys)
    assert json.loads(result["argv"][-1]) == result["extra_config"] == {**own, **where}


def test_engine_args_for_transformers(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path, GOOD)
    assert main(["engine-args", "transformers", "--config", file]) == 0
    out = capsys.readouterr().out
    assert out == f"from lmcache_core.adapters.transformers import attach; cache = attach(model, {file!r})\n"
    compile(out, "out", "exec")


def test_engine_args_of_a_broken_file_prints_nothing_to_paste(tmp_path: Path, capsys: Capture) -> None:
    assert main(["engine-args", "vllm", "--config", write(tmp_path, "teirs: []\n")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "did you mean `tiers`?" in err


# -- all of it -----------------------------------------------------------------------------------------------


def test_version_help_and_usage(capsys: Capture) -> None:
    for argv, code, says in ((["--version"], 0, "lmcachectl "), (["--help"], 0, "exit codes:"), ([], 2, "COMMAND")):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        out, err = capsys.readouterr()
        assert exit_.value.code == code
        assert says in out + err


def test_every_command_module_is_registered_and_can_speak_json(capsys: Capture) -> None:
    names = {info.name for info in pkgutil.iter_modules(cli.__path__)}
    modules = {name: importlib.import_module(f"lmcache_core.cli.{name}") for name in names}
    commands = {name for name, module in modules.items() if hasattr(module, "add")}
    assert commands == {command.__name__.rpartition(".")[2] for command in cli.COMMANDS}
    groups = {
        "config_cmd": ["config", "from-lmcache"],
        "plugin": ["plugin", "test"],
        "codec_cmd": ["codec", "calibrate"],
    }
    for name in sorted(commands - {"bench"}):
        with pytest.raises(SystemExit):
            main([*groups.get(name, [name.replace("_", "-")]), "--help"])
        assert "--json" in capsys.readouterr().out


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "load", interrupted)
    assert main(["explain"]) == 130


@pytest.mark.parametrize("command", ["check", "explain", "plugins"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_no_command_shows_a_secret(
    dists: Distributions, tmp_path: Path, capsys: Capture, command: str, options: list[str]
) -> None:
    canary = "hunter2-canary"
    dists.backend("far")
    tier = (
        f"  - {{name: cold, backend: {{type: far, url: 'far://u:{canary}@h/?token={canary}', access_key: {canary}}}}}\n"
    )
    assert main([command, write(tmp_path, GOOD + tier), *options]) == 0
    out, err = capsys.readouterr()
    assert "far" in out
    assert canary not in out + err


def test_the_installed_command_and_a_reader_that_leaves_early(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmcache_core"]
    done = subprocess.run([*command, "check", "/nowhere.yaml"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot read the configuration: no such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
    pipe = f"{shlex.join([*command, 'schema'])} | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("{", "", 0)


def test_gds_is_what_the_examples_use() -> None:
    assert isinstance(load(ROOT / "examples/lmcache.yaml", env={}).config.tiers[1].backend, GdsConfig)
