"""`lmcachectl` when things go wrong around it: no home, odd files, broken plugins, signals. It says so, in JSON too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dists import BACKEND, Distributions
from rich.console import Console

from lmcache_core.cli import demo_transformers, main, openai_server, plugin_new
from lmcache_core.cli.demo_common import DemoOptions, Report
from lmcache_core.config import load
from lmcache_core.config.from_lmcache import convert
from lmcache_core.errors import BackendError, ConfigError
from lmcache_core.plugins import BACKENDS, RIGS, Plugins
from lmcache_core.testing import bench

Capture = pytest.CaptureFixture[str]
PASSWORD = "s3cr3tvalue"


def record(capsys: Capture) -> dict[str, Any]:
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def broken(dists: Distributions, name: str, **methods: str) -> None:
    """A backend that keeps objects in a dict, but for some methods."""
    source = BACKEND.replace("{name}", name).replace("url: str", 'url: str = "here"')
    lines = "".join(f"    def {how}: {body}\n" for how, body in methods.items() if how.startswith(("get", "put")))
    source = source.replace("    def delete(self", lines + "    def delete(self", 1)
    for how, body in methods.items():
        if not how.startswith(("get", "put")):
            source = source.replace("    def build(self", f"    def {how}: {body}\n    def build(self", 1)
    dists.add(f"dist-{name}", {BACKENDS: {name: f"mod_{name}"}}, {f"mod_{name}": "import sys, time\n" + source})


# -- where there is no home ------------------------------------------------------------------------------------------
def test_commands_work_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert main(["explain", "--json"]) == 0 and record(capsys)["ok"]
    assert main(["plugin", "test", "gds", "--json"]) == 1
    assert "XDG_CACHE_HOME" in record(capsys)["error"]


# -- the last line is JSON -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "argv",
    [
        ["explain", "--model", "~nobody-of-that-name/x"],
        ["explain", "--model", "DIR/narrow"],
        ["explain", "--model", "DIR/deep"],
        ["demo", "--model", "DIR/narrow", "--work", "DIR/work", "--document", "DIR/none"],
        ["demo", "--model", "DIR/narrow", "--work", "DIR/work", "--document", "DIR/bytes"],
        ["demo", "--model", "DIR/narrow", "--work", "DIR/bytes"],
        ["model", "--to", "DIR/bytes"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_read_or_written_is_an_error_in_json(tmp_path: Path, capsys: Capture, argv: list[str]) -> None:
    for name, text in (
        ("narrow", '{"num_hidden_layers":2,"num_attention_heads":64,"hidden_size":32}'),
        ("deep", "[" * 100_000),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert main([*(word.replace("DIR", str(tmp_path)) for word in argv), "--json"]) == 1
    found = record(capsys)
    assert found["ok"] is False and found["error"]


def test_a_wrong_command_line_is_an_error_in_json(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["explain", "--bytes-per-token", "x", "--json"])
    assert record(capsys)["ok"] is False


def test_a_file_that_stops_being_readable_is_a_problem_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration: input/output error"):
        load("/proc/self/mem", env={})


@pytest.mark.parametrize("after", ["| true", ">&-"])
def test_nobody_who_reads_changes_no_exit_code(tmp_path: Path, after: str) -> None:
    for name, path, expected in (("good", tmp_path / "kv", 0), ("bad", "/proc/no/kv", 2)):
        (tmp_path / name).write_text(
            "tiers: [{name: dram, capacity: 16MiB, backend: {type: cpu}}, "
            f"{{name: disk, capacity: 64MiB, backend: {{type: gds, path: {path}}}}}]\n"
        )
        line = f'"$0" -m lmcache_core explain {tmp_path / name} {after}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", line, sys.executable], stderr=subprocess.PIPE, timeout=60, check=False)
        assert done.returncode == expected, done.stderr


def test_a_check_that_failed_has_failed_whoever_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lmcache_core.cli import check

    monkeypatch.setattr(check, "_try_memory", lambda tier, pipeline: check._failed(tier, "broken"))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(os.dup(writer), "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["check"]) == 1
        monkeypatch.undo()
    os.close(writer)


def test_a_gpu_tier_is_explained(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(
        "tiers: [{name: g, capacity: 64MiB, backend: {type: gpu}}, {name: m, capacity: 256MiB, backend: {type: cpu}}]"
    )
    assert main(["explain", str(file), "--bytes-per-token", "4096", "--json"]) == 0
    found = record(capsys)
    assert found["budget"]["device_bytes"] == 64 << 20 and found["fits"][0]["chunks"]["g"] == 64


# -- plugins ---------------------------------------------------------------------------------------------------------
def test_a_plugin_that_ends_the_process_has_failed(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    broken(dists, "ends", **{"get_into(self, keys, buffers)": "sys.exit(0)"})
    assert main(["plugin", "test", "ends", "--path", str(tmp_path), "--json"]) == 1
    assert any("SystemExit" in outcome["message"] for outcome in record(capsys)["outcomes"])


def test_a_rig_that_ends_the_process_has_failed(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    broken(dists, "rigged")
    rig = """
    from contextlib import contextmanager
    from lmcache_core.testing.rig import Rig
    class R(Rig):
        @contextmanager
        def start(self, directory):
            raise SystemExit(0)
            yield
    """
    dists.add("dist-rig", {RIGS: {"rigged": "mod_rig:R"}}, {"mod_rig": rig})
    assert main(["plugin", "test", "rigged", "--path", str(tmp_path), "--json"]) == 1
    assert "SystemExit" in record(capsys)["error"]


@pytest.mark.parametrize("command", ["plugin test", "bench backend"])
def test_what_was_given_as_a_secret_option_is_not_repeated(
    dists: Distributions, tmp_path: Path, capsys: Capture, command: str
) -> None:
    body = f"return [RuntimeError('AUTH {PASSWORD}')] * len(keys)"
    broken(dists, "leaky", **{"put_from(self, keys, buffers)": body})
    options = ["--option", f"access_key={PASSWORD}", "--path", str(tmp_path), "--json"]
    options += ["--quick", "--object-bytes", "16KiB"] if command == "bench backend" else []
    assert main([*command.split(), "leaky", *options]) == 1
    out, err = capsys.readouterr()
    assert "AUTH ***" in out and PASSWORD not in out + err


def test_a_word_that_is_no_option_is_not_repeated(capsys: Capture) -> None:
    assert main(["plugin", "test", "gds", "--option", f"password:{PASSWORD}", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "`password...`" in out and PASSWORD not in out + err


def test_a_distribution_half_removed_hides_no_other(dists: Distributions) -> None:
    for name, entries in (("half", b"[lmcache.backends]\nhalf = half\n"), ("noise", b"\xff\xfe")):
        info = dists.path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_bytes(entries)
    names = Plugins().names(BACKENDS)
    assert "cpu" in names and "half" not in names


def test_a_backend_that_cannot_say_its_memory_is_a_problem(
    dists: Distributions, tmp_path: Path, capsys: Capture
) -> None:
    broken(dists, "unsaid", **{"memory_bytes(self, context)": "raise RuntimeError('no licence')"})
    tiers = "{name: dram, capacity: 16MiB, backend: {type: cpu}}, {name: x, backend: {type: unsaid}}"
    file = tmp_path / "lmcache.yaml"
    file.write_text(f"tiers: [{tiers}]\n")
    assert main(["explain", str(file), "--json"]) == 0
    assert main(["check", str(file), "--json"]) == 1
    assert "cannot say what memory it takes: RuntimeError: no licence" in record(capsys)["tiers"][1]["detail"]


def test_a_measurement_of_a_backend_that_hangs_ends(dists: Distributions, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(dists, "hangs", **{"get_into(self, keys, buffers)": "time.sleep(3600)"})
    monkeypatch.setattr(bench, "DEADLINE_S", 0.1)
    config = Plugins().backend("hangs")()
    with pytest.raises(BackendError, match="has not ended within"):
        bench.measure(config, object_bytes=16 << 10, seconds=0.05, working_set=1 << 20)


@pytest.mark.parametrize("name, kind", [("null", "backend"), ("true", "serde"), ("storage", "wrapper")])
def test_names_that_would_not_work_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match="for instance"):
        plugin_new.write(name, kind, tmp_path)


# -- config from-lmcache ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        'local_disk: ","',
        'remote_url: "fs://[bad/x"',
        "remote_url: s3://b.host\nextra_config: {disable_tls: on}",
        "remote_url: valkey://h:1\nextra_config: {tls_enable: null}",
        "remote_url: valkey://h:1\nextra_config: {valkey_enable_ttl: maybe, valkey_ttl_sec: 3}",
        "remote_url: fs://h:0/mnt/kv\nextra_config: {fs_connector_use_odirect: on}",
    ],
)
def test_odd_files_are_converted_or_refused(tmp_path: Path, capsys: Capture, text: str) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(text + "\n")
    assert main(["config", "from-lmcache", str(file), "--json"]) in (0, 1, 2)
    assert "ok" in record(capsys)


def test_true_is_what_lmcache_takes_for_it(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("remote_url: valkey://h:1\nextra_config: {tls_enable: on}\n")
    assert convert(file).data["tiers"][1]["backend"]["url"] == "rediss://h:1"


@pytest.mark.parametrize(
    "spec",
    [
        '{"type":"s3","s3_endpoint":"b.h","max_capacity_gb":"lots"}',
        '{"type":"fs","base_path":"/x/y","max_capacity_gb":1e999}',
        '{"type":"fs","base_path":"/x/y","max_capacity_gb":NaN}',
        '{"type":"valkey","startup_nodes":","}',
        '{"type":["a"]}',
    ],
)
def test_adapters_that_cannot_be(spec: str) -> None:
    with pytest.raises(ConfigError):
        convert(adapters=[spec])


@pytest.mark.parametrize(
    "spec",
    [
        f'{{"type":"valkey","startup_nodes":"u:{PASSWORD}@h:1"}}',
        f'{{"type":"resp","host":"u:{PASSWORD}@h","port":1}}',
    ],
)
def test_no_login_of_an_adapters_address_is_copied(spec: str) -> None:
    made = convert(adapters=[spec])
    assert PASSWORD not in made.text and made.data["tiers"][1]["backend"]["url"] == "redis://h:1"


def test_a_size_beyond_all_numbers_is_a_problem() -> None:
    with pytest.raises(ConfigError, match="must be a size in GiB"):
        load({"max_local_cpu_size": 1e300}, env={})


def test_half_a_configuration_does_not_stay(tmp_path: Path, capsys: Capture) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text("chunk_size: 256\n")
    code = (
        "import resource, sys; from lmcache_core.cli import config_cmd, main; load = config_cmd._load;\n"
        "def full(made):\n"
        "    found = load(made); resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8)); return found\n"
        "config_cmd._load = full; sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, "config", "from-lmcache", str(theirs), "-o", str(ours), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and json.loads(done.stdout)["problems"]
    assert not ours.exists()


# -- signals ---------------------------------------------------------------------------------------------------------
WORKING = """\
import signal, sys, time
from lmcache_core.cli import bench_backend, main
from lmcache_core.cli import plugin_test
def wait(*args):
    print("working", flush=True)
    time.sleep(60)
plugin_test.check = wait
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.exit(main(["plugin", "test", "gds", "--path", sys.argv[1], "--json"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_leaves_no_files(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", WORKING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert not list(tmp_path.iterdir())


def test_a_server_ends_however_often_its_owner_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline()

    def again(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(openai_server.time, "sleep", again)
    try:
        with pytest.raises(KeyboardInterrupt):
            openai_server._stop(process)
        monkeypatch.undo()
        assert process.wait(5) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_an_interrupted_demo_leaves_no_phase_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho working\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    class Interrupted(Report):
        def step(self, text: str) -> Any:
            def say(line: str) -> None:
                raise KeyboardInterrupt

            from contextlib import nullcontext

            return nullcontext(say)

    with pytest.raises(KeyboardInterrupt):
        demo_transformers._phase(
            "first", DemoOptions(tmp_path, "x", ("?",), 256, tmp_path), Interrupted(Console(quiet=True))
        )
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 5
    while Path("/proc", str(pid)).exists() and time.monotonic() < end:
        time.sleep(0.02)
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            break
    try:
        assert not Path("/proc", str(pid)).exists()
    finally:
        if Path("/proc", str(pid)).exists():
            os.kill(pid, signal.SIGKILL)


def test_the_demo_does_not_replace_a_configuration(tmp_path: Path) -> None:
    theirs = tmp_path / "lmcache.yaml"
    theirs.write_text("mine: true\n")
    DemoOptions(tmp_path, "x", ("?",), 256, tmp_path).write_config("1GiB", "2GiB")
    assert theirs.read_text() == "mine: true\n"
