"""`lmcachectl bench backend` and `plugin bench`: the figures, the method, and what is said when nothing is measured.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from dists import BACKEND, Distributions

from lmcache_core.cli import bench_backend, main
from lmcache_core.cli.bench_backend import BackendEffort, measure_backend
from lmcache_core.errors import LMCacheError
from lmcache_core.plugins import BACKENDS, RIGS
from lmcache_core.protocols import BackendConfig
from lmcache_core.testing.bench import Figures
from lmcache_core.testing.memory import DictConfig
from lmcache_core.testing.rig import Baseline, Medium

Capture = pytest.CaptureFixture[str]
FIGURES = {"put_gb_s", "get_gb_s", "put_vs_baseline", "get_vs_baseline", "exists_1000_ms", "cpu_s_per_gb"}
TINY = BackendEffort(rounds=3, seconds=1, working_set=8 << 16, limit=60.0)

RIG = """
from contextlib import contextmanager
from lmcache_core.testing.rig import Baseline, Medium, Rig
from plug_s9 import Config

class S9Rig(Rig):
    @contextmanager
    def start(self, directory):
        (directory / "up").touch()
        yield Medium(Config(url="s9://rig", region="rig"), Baseline("s9-bench", lambda n, s: 1e9, lambda n, s: 2e9))
        (directory / "up").unlink()
"""


@pytest.fixture
def s9(dists: Distributions) -> Distributions:
    """A backend with a rig."""
    entries = {BACKENDS: {"s9": "plug_s9"}, RIGS: {"s9": "plug_s9_rig:S9Rig"}}
    dists.add("lmcache-backend-s9", entries, {"plug_s9": BACKEND.replace("{name}", "s9"), "plug_s9_rig": RIG})
    return dists


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_backend.measure

    def measure(config: BackendConfig, **options: Any) -> Figures:
        return real(config, **{**options, "seconds": 0.01})

    monkeypatch.setattr(bench_backend, "QUICK", TINY)
    monkeypatch.setattr(bench_backend, "FULL", TINY)
    monkeypatch.setattr(bench_backend, "measure", measure)


@pytest.mark.usefixtures("tiny", "s9")
@pytest.mark.parametrize("command", [["bench", "backend"], ["plugin", "bench"]])
def test_both_commands_measure_through_the_rig(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "place"
    words = ["s9", "--quick", "--json", "--object-bytes", "64KiB", "--path", str(place)]
    assert main([*command, *words]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one line, so that it is the last"
    result = json.loads(out)
    assert set(result["figures"]) == FIGURES
    assert all(isinstance(value, float) and value > 0 for value in result["figures"].values())
    assert (result["type"], result["baseline"], result["object_bytes"]) == ("s9", "s9-bench", 65536)
    assert result["rounds"] == 3 and {len(rates) for rates in result["gb_s"].values()} == {3}
    put, get = result["put"], result["get"]
    assert (put["control"], get["control"]) == (1.0, 2.0)
    assert put["ratio"] == pytest.approx(put["subject"], abs=0.002), "the control writes 1 GB/s"
    assert list(place.iterdir()) == [], "the files of the run are removed"


@pytest.mark.usefixtures("tiny", "s9")
def test_text_shows_every_figure(tmp_path: Path, capsys: Capture) -> None:
    assert main(["plugin", "bench", "s9", "--object-bytes", "64KiB", "--path", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    for words in (
        "backend s9, objects of 64 KiB, 3 rounds",
        "put",
        "get",
        "exists_1000_ms",
        "cpu_s_per_gb",
        "s9-bench",
    ):
        assert words in captured.out
    assert captured.err == "", "progress is for terminals"


@pytest.mark.usefixtures("tiny")
def test_without_a_rig_options_name_the_medium_and_nothing_is_compared(
    dists: Distributions, tmp_path: Path, capsys: Capture
) -> None:
    dists.backend("s8")
    words = ["bench", "backend", "s8", "--object-bytes", "64KiB", "--path", str(tmp_path), "--option", "url=s8://x"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["baseline"] is None
    assert result["figures"]["put_vs_baseline"] is None and result["figures"]["put_gb_s"] > 0
    assert main(words) == 0
    assert "nothing to compare with" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["nonesuch"], ["no backend `nonesuch` is installed", "installed: ", " cpu, ", "lmcache-backend-nonesuch"]),
        (["s88"], ["did you mean `s8`?"]),
        (["s8"], ["s8.url", "Field required", "backend `s8` has no rig", "rigs installed: ", "--option url=..."]),
        (["s8", "--option", "urll=x", "--option", "url=x"], ["s8.urll", "did you mean `url`?"]),
        (["s8", "--option", "url"], ["--option", "`url` is no setting", "key=value"]),
        (["s8", "--option", "url={x"], ["--option url", "is no JSON"]),
    ],
)
def test_what_cannot_be_measured_is_said(
    dists: Distributions, tmp_path: Path, capsys: Capture, words: list[str], says: list[str]
) -> None:
    dists.backend("s8")
    assert main(["bench", "backend", *words, "--json", "--path", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert all(said in captured.err for said in says), captured.err
    assert json.loads(captured.out)["ok"] is False


@pytest.mark.parametrize("size", ["8", "8M", "4KiB"])
def test_a_wrong_object_size_is_refused(size: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "backend", "cpu", "--object-bytes", size])
    assert ended.value.code == 2
    assert "--object-bytes" in capsys.readouterr().err


def test_a_rig_that_cannot_start_says_why(s9: Distributions, tmp_path: Path, capsys: Capture) -> None:
    source = """
    from lmcache_core.errors import BackendUnavailable
    from lmcache_core.testing.rig import Rig
    class S9Rig(Rig):
        def start(self, directory):
            raise BackendUnavailable("s9-server is not installed: apt-get install s9")
    """
    (s9.path / "plug_s9_rig.py").write_text(dedent(source))
    assert main(["bench", "backend", "s9", "--path", str(tmp_path)]) == 1
    assert "apt-get install s9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, says",
    [
        ("import not_there", "it needs `not_there`"),
        ("S9Rig = 5", "names 5, not a subclass of Rig"),
        ("from lmcache_core.testing.rig import Rig\nclass S9Rig(Rig): pass", "S9Rig does not implement start"),
    ],
)
def test_a_broken_rig_names_its_distribution(
    s9: Distributions, tmp_path: Path, capsys: Capture, source: str, says: str
) -> None:
    (s9.path / "plug_s9_rig.py").write_text(source)
    assert main(["bench", "backend", "s9", "--path", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "rig `s9` of lmcache-backend-s9 1.2.3 (plug_s9_rig:S9Rig)" in err and says in err


@pytest.mark.usefixtures("tiny")
def test_a_wrong_backend_has_no_speed(s9: Distributions, tmp_path: Path, capsys: Capture) -> None:
    source = BACKEND.replace("{name}", "s9").replace("bytes(buffer))", "bytes(len(buffer)))")
    (s9.path / "plug_s9.py").write_text(source)
    assert main(["bench", "backend", "s9", "--path", str(tmp_path), "--object-bytes", "64KiB", "--json"]) == 1
    assert "other bytes" in json.loads(capsys.readouterr().out)["error"]


# -- the method ------------------------------------------------------------------------------------------------------
SAMPLE = Figures(1.0, 1.0, 0.5, 0.1, 1.0, 1.0, 65536, 4, 4)


def arms(monkeypatch: pytest.MonkeyPatch, put: list[float], get: list[float]) -> list[str]:
    """Play these rates (GB/s); return who ran, as it runs."""
    ran: list[str] = []
    turn = iter([SAMPLE, *(replace(SAMPLE, put_gb_s=p, get_gb_s=g) for p, g in zip(put, get, strict=True)), SAMPLE])

    def measure(config: BackendConfig, **options: Any) -> Figures:
        ran.append("ours" if options["object_bytes"] == 65536 else "exists")
        return next(turn)

    monkeypatch.setattr(bench_backend, "measure", measure)
    return ran


def medium(ran: list[str], control: Callable[[], float]) -> Medium:
    def put(object_bytes: int, seconds: int) -> float:
        assert (object_bytes, seconds) == (65536, 1)
        ran.append("base")
        return control()

    return Medium(DictConfig(), Baseline("other", put, lambda n, s: 4e9))


def test_rounds_alternate_and_a_ratio_is_the_median_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = arms(monkeypatch, put=[1.0, 9.0, 3.0], get=[2.0, 2.0, 8.0])
    controls = iter([1e9, 2e9, 3e9, 4e9])
    result = measure_backend(medium(ran, lambda: next(controls)), 65536, TINY)
    assert ran == ["base", "ours", "ours", "base", "base", "ours", "ours", "base", "exists"]
    assert result["figures"]["put_vs_baseline"] == 0.75  # of 1/2, 9/3, 3/4: the first round does not count
    assert result["figures"]["get_vs_baseline"] == 0.5
    assert (result["put"]["subject"], result["put"]["subject_best"]) == (3.0, 9.0)
    assert result["figures"]["exists_1000_ms"] == 0.5


@pytest.mark.parametrize("limit, rounds", [(90.0, 3), (110.0, 4), (10.0, 3), (1000.0, 9)])
def test_no_round_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch, limit: float, rounds: int) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(bench_backend, "monotonic", lambda: float(next(clock)))
    ran = arms(monkeypatch, put=[1.0] * 9, get=[1.0] * 9)
    # A round takes 10 s of this clock, and 10 s pass between rounds: they begin at 10, 30, 50, 70, 90 s.
    effort = replace(TINY, rounds=9, limit=limit)
    assert measure_backend(medium(ran, lambda: 1e9), 65536, effort)["rounds"] == rounds


def test_a_baseline_that_measures_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = arms(monkeypatch, put=[1.0] * 3, get=[1.0] * 3)
    with pytest.raises(LMCacheError, match="baseline other: put gave 0"):
        measure_backend(medium(ran, lambda: 0.0), 65536, TINY)


# -- the built-in rigs -----------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name, baseline", [("cpu", "memcpy, 4 threads"), ("gds", "own pread/pwrite")])
def test_the_built_in_backends_have_rigs(
    name: str, baseline: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_core.cli.bench_disk.shutil.which", lambda program: None)
    monkeypatch.setattr("lmcache_core.cli.rigs._SPAN", 32 << 16)
    monkeypatch.setattr(bench_backend, "FULL", replace(TINY, seconds=0))
    assert main(["bench", "backend", name, "--json", "--object-bytes", "64KiB", "--path", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["baseline"].startswith(baseline)
    assert all(value > 0 for value in result["figures"].values())
