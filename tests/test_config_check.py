"""`lmcachectl check` never hangs: building, trying and closing every tier are bounded, and the fault has a name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dists import Distributions

from lmcache_core.cli import main

Capture = pytest.CaptureFixture[str]

GOOD = """\
chunk_tokens: 16
tiers:
  - {name: dram, capacity: 4MiB, backend: {type: cpu}}
  - {name: cold, backend: {type: far, url: u}}
  - {name: disk, capacity: 64MiB, backend: {type: gds, path: DIR/kv}}
"""
WAIT = "import threading; threading.check_test_release.wait(60)"


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What hanging backends of these tests wait for; set at the end, so that no thread stays."""
    event = threading.Event()
    monkeypatch.setattr(threading, "check_test_release", event, raising=False)
    yield event
    event.set()


def change(dists: Distributions, old: str, new: str, name: str = "far") -> None:
    """Write the backend `name`, one line of it changed."""
    path = dists.path / f"{dists.backend(name)}.py"
    source = path.read_text()
    assert source.count(old) == 1, old
    path.write_text(source.replace(old, new))


def checked(tmp_path: Path, capsys: Capture, text: str = GOOD, timeout: str = "2s") -> dict[str, dict[str, Any]]:
    """The rows of a check that has failed, by tier."""
    file = tmp_path / "lmcache.yaml"
    file.write_text(text.replace("DIR", str(tmp_path)))
    assert main(["check", str(file), "--json", "--timeout", timeout]) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["ok"] is False
    return {row["tier"]: row for row in record["tiers"]}


@pytest.mark.usefixtures("release")
def test_a_backend_that_never_gets_built(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    change(dists, "def build(self, context): return Store()", f"def build(self, context): {WAIT}; return Store()")
    rows = checked(tmp_path, capsys)
    assert rows["cold"]["detail"] == "building backend `far` has not ended within 2 s"
    assert [row["ok"] for row in rows.values()] == [True, False, True], "the others are tried all the same"


@pytest.mark.usefixtures("release")
def test_two_backends_that_never_get_built(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    for name in ("far", "near"):
        change(
            dists, "def build(self, context): return Store()", f"def build(self, context): {WAIT}; return Store()", name
        )
    rows = checked(tmp_path, capsys, GOOD + "  - {name: other, backend: {type: near, url: u}}\n")
    assert rows["cold"]["detail"] == "building backend `far` has not ended within 2 s"
    assert rows["other"]["detail"] == "building backend `near` has not ended within 2 s"
    assert (rows["dram"]["ok"], rows["disk"]["ok"]) == (True, True)


@pytest.mark.usefixtures("release")
def test_a_backend_that_hangs_while_its_index_is_read(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    change(
        dists, "    def close(self): pass", f"    def close(self): pass\n    def scan(self): {WAIT}; return iter(())"
    )
    rows = checked(tmp_path, capsys)
    assert rows["cold"]["detail"].startswith("allocating memory and reading what is stored has not ended within ")
    assert [row["ok"] for row in rows.values()] == [True, False, True]


@pytest.mark.usefixtures("release")
def test_a_round_trip_that_hangs(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    change(dists, "def put_from(self, keys, buffers):", f"def put_from(self, keys, buffers):\n        {WAIT}")
    rows = checked(tmp_path, capsys)
    assert rows["cold"]["detail"] == "no answer within 2 s: the medium hangs"
    assert [row["ok"] for row in rows.values()] == [True, False, True]


@pytest.mark.usefixtures("release")
def test_closing_that_hangs(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    change(dists, "    def close(self): pass", f"    def close(self): {WAIT}")
    file = tmp_path / "lmcache.yaml"
    file.write_text(GOOD.replace("DIR", str(tmp_path)))
    assert main(["check", str(file), "--json", "--timeout", "2s"]) == 0, "every tier gave back what it was given"


def test_errors_of_clients_are_shown_without_secrets(dists: Distributions, tmp_path: Path, capsys: Capture) -> None:
    error = "raise OSError(f'cannot reach {self.url} as {self.access_key.get_secret_value()}')"
    change(dists, "def build(self, context): return Store()", f"def build(self, context): {error}")
    tier = "{type: far, url: 'far://u:canary-1@h', access_key: canary-2}"
    rows = checked(tmp_path, capsys, GOOD.replace("{type: far, url: u}", tier))
    assert "cannot reach far://***@h as ***" in rows["cold"]["detail"]


@pytest.mark.parametrize("text", ["0", "-1s", "soon", "2 days"])
def test_a_timeout_must_be_a_duration(text: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["check", f"--timeout={text}"])
    assert "--timeout" in capsys.readouterr().err
