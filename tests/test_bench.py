"""The benchmarks run and say what they promise to say. Nothing here looks at how long anything took."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmcache_core.cli import bench, bench_common, bench_disk, bench_tiers, main
from lmcache_core.cli.bench_common import Arena, Effort, Ratio, interleave
from lmcache_core.cli.layouts import preset
from lmcache_core.errors import LMCacheError
from lmcache_core.layout import KVLayout
from lmcache_core.types import ChunkKey

ROOT = Path(__file__).parent.parent
CHUNK = 65536
TINY = Effort(
    span=8 * (CHUNK + 4096),
    copy_batch=2 * CHUNK,
    copy_rounds=3,
    cold_builds=1,
    disk_batch=8 * CHUNK,
    disk_turn=0.0,
    disk_rounds=3,
    small_rounds=3,
)
FIO = """#!{python}
import json, re, sys
if sys.argv[1] == "--version":
    print("fio-9.9")
    sys.exit()
options = dict(option.lstrip("-").partition("=")[::2] for option in sys.argv[1:])
open({log!r}, "a").write(json.dumps(options) + "\\n")
if options["ioengine"] == "io_uring":
    print("fio: io_uring: Operation not permitted", file=sys.stderr)
    sys.exit(1)
rate = 10**9 * int(options["iodepth"]) * int(options["numjobs"])
print("fio: a warning before the object")
print(json.dumps({{"jobs": [{{"error": 0, "read": {{"bw_bytes": rate}}, "write": {{"bw_bytes": rate + 10**9}}}}]}}))
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_common, "effort", lambda quick: TINY)


@pytest.fixture
def no_fio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_disk.shutil, "which", lambda name: None)


@pytest.fixture
def fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, str]]]:
    """A program that answers like fio; returns the options of every run so far."""
    program, log = tmp_path / "fio", tmp_path / "fio.log"
    program.write_text(FIO.format(python=sys.executable, log=str(log)))
    program.chmod(0o700)
    monkeypatch.setattr(bench_disk.shutil, "which", lambda name: str(program))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# -- the command -----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("tiny", "no_fio")
def test_json_has_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "place"
    assert main(["bench", "tiers", "--json", "--path", str(place), "--chunk-bytes", str(CHUNK)]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "one line, so that it is the last"
    result = json.loads(out)
    assert result["figures"].keys() == bench.TARGETS.keys() == result["targets"].keys()
    assert all(isinstance(value, float) and value > 0 for value in result["figures"].values())
    assert "fio not installed" in result["baseline"]["disk"]
    assert result["chunk_bytes"] == {"64 KiB": CHUNK}
    assert set(result["memory"]["64 KiB"]) == {"put", "get", "cold"}
    assert {"put", "get", "looked_at", "direct"} <= set(result["disk"]["64 KiB"])
    assert set(result["lookup_ms"]) == {"memory", "absent", "disk"}
    assert set(result["keys_mtok_s"]) == {"int32", "int64", "list"}
    assert set(result["control_us_per_key"]["evicting"]) == {"store", "lookup", "load", "total"}
    assert {"date", "cpu", "cores", "memory", "simd"} <= set(result["machine"])
    assert list(place.iterdir()) == [], "the files of the run are removed"


@pytest.mark.usefixtures("tiny", "no_fio")
def test_text_shows_every_figure_and_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tiers", "--quick", "--path", str(tmp_path), "--chunk-bytes", str(CHUNK)]) == 0
    captured = capsys.readouterr()
    for name, (sign, target) in bench.TARGETS.items():
        line = next(line for line in captured.out.splitlines() if name in line)
        assert f"{sign} {target:g}" in line and ("ok" in line or "NOT MET" in line)
    assert captured.err == "", "progress is for terminals"


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "tiers", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in bench.TARGETS) and "median" in text


@pytest.mark.parametrize("nbytes", ["0", "-256", "1000"])
def test_a_wrong_chunk_size_is_refused(nbytes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tiers", "--chunk-bytes", nbytes]) == 1
    assert f"--chunk-bytes {nbytes}" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(["bench", "tiers", "--path", str(file), "--json"]) == 1
    captured = capsys.readouterr()
    assert str(file) in captured.err and "--path" in captured.err
    assert json.loads(captured.out)["ok"] is False


def test_a_directory_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = bench_disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bench_disk.shutil, "disk_usage", lambda path: usage._replace(free=CHUNK))
    with pytest.raises(LMCacheError, match=r"64 KiB free.*--path"):
        bench_disk.measure_disk(next(iter(bench._layouts(CHUNK).values())), tmp_path, TINY)


# -- the method ------------------------------------------------------------------------------------------------------
def test_arms_take_turns_in_rotating_order() -> None:
    ran: list[str] = []

    def arm(name: str) -> Callable[[int], float]:
        def run(number: int) -> float:
            ran.append(f"{name}{number}")
            return float(number)

        return run

    rates = interleave({name: arm(name) for name in "abc"}, 3)
    assert ran == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]
    assert rates == {name: [0.0, 1.0, 2.0] for name in "abc"}


def test_a_ratio_is_the_median_against_the_best_control() -> None:
    rates = {"mine": [4e9, 9e9, 2e9], "slow": [1e9, 1e9, 1e9], "fast": [8e9, 6e9, 8e9]}
    ratio = Ratio.of(rates, "mine", ["slow", "fast"])
    assert (ratio.control_name, ratio.ratio) == ("fast", 0.5)  # of 0.5, 1.5 and 0.25
    assert (ratio.subject, ratio.subject_best, ratio.control, ratio.control_best) == (4.0, 9.0, 8.0, 8.0)


def test_arenas_rotate_through_different_memory() -> None:
    arena = Arena(CHUNK, 4 * (CHUNK + 4096))
    arena.fill()
    assert arena.chunks == 4
    first, second = (arena.addresses(arena.take(2)) for _ in range(2))
    assert len({*first, *second}) == 4 and all(address % 4096 == 0 for address in (*first, *second))
    assert arena.addresses(arena.take(2)).tolist() == first.tolist()
    numbers = [int.from_bytes(arena.piece(i)[:8].tobytes(), "little") for i in range(4)]
    assert numbers == [0, 1, 2, 3]


def test_pages_are_gathered_and_scattered_for_layouts_with_layers() -> None:
    layout = KVLayout("lknhd", "bfloat16", 4, 2, 2, 16, 256, 256)
    assert set(bench_tiers.measure_copies(layout, TINY)) == {"put", "get", "gather", "scatter", "cold"}


def test_a_put_that_stores_too_little_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bench_tiers.MemoryTier(bench_tiers.TINY, 8, 2)
    same = [ChunkKey(bytes(32)), ChunkKey(b"1" * 32)]
    monkeypatch.setattr(bench_tiers, "fresh_keys", lambda n: same)
    tier.put(lambda slots: None)
    with pytest.raises(LMCacheError, match="0 of 2 chunks were stored"):
        tier.put(lambda slots: None)
    tier.close()


# -- fio -------------------------------------------------------------------------------------------------------------
def test_fio_is_the_control_and_the_best_of_it_counts(
    tmp_path: Path, fio: Callable[[], list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    found = bench_disk.measure_disk(next(iter(bench._layouts(CHUNK).values())), place, TINY)
    assert found.baseline == "fio-9.9"
    assert found.put.control_name == "write fio libaio iodepth=4 numjobs=2"
    assert found.get.control_name == "read fio libaio iodepth=4 numjobs=2"
    assert (found.put.control, found.get.control) == (9.0, 8.0)
    assert len(found.looked_at["write"]) == 6, "io_uring is forbidden here"
    ways = {(run["ioengine"], run["iodepth"], run["numjobs"]) for run in fio()}
    engines = [("psync", "1"), ("io_uring", "1"), ("io_uring", "4"), ("libaio", "1"), ("libaio", "4")]
    assert ways == {(engine, depth, jobs) for engine, depth in engines for jobs in ("1", "2")}
    for run in fio():
        assert (run["direct"], run["bs"], run["directory"]) == ("1", str(CHUNK), str(place))
        assert run["rw"] == "write" or (run["rw"], run["rwmixread"]) == ("rw", "100")


def test_a_disk_without_any_working_control_is_an_error(
    tmp_path: Path, fio: Callable[[], list[dict[str, str]]]
) -> None:
    (tmp_path / "fio").write_text('#!/bin/sh\n[ "$1" = --version ] && echo fio-9.9 && exit\necho broken >&2\nexit 1\n')
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(LMCacheError, match=r"no control runs here.*broken"):
        bench_disk.measure_disk(next(iter(bench._layouts(CHUNK).values())), place, TINY)


# -- the scripts -----------------------------------------------------------------------------------------------------
WORKER = """#!{python}
import json, sys
print(json.dumps({{"value": 0}}), flush=True)
for line in sys.stdin:
    print(json.dumps({answer}), flush=True)
"""


@pytest.mark.parametrize("seconds, verdict, code", [(10.0, "ahead", 0), (1e-9, "BEHIND", 1)])
@pytest.mark.usefixtures("tiny")
def test_lmcache_beside_us(
    seconds: float, verdict: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(WORKER.format(python=sys.executable, answer={"value": seconds}))
    python.chmod(0o700)
    script = load_script("against_lmcache")
    arguments = ["--peer-python", str(python), "--only", "small", "--path", str(tmp_path)]
    assert script.main(arguments) == code
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert {row["verdict"] for row in result["rows"]} == {verdict}
    assert all(row["name"] in "\n".join(out[:-1]) for row in result["rows"])


@pytest.mark.parametrize(
    "answer, said", [({"error": "hash: boom"}, "LMCache: hash: boom"), (None, "is lmcache==0.5.6 installed")]
)
@pytest.mark.usefixtures("tiny")
def test_what_fails_on_the_other_side_is_said(
    answer: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(WORKER.format(python=sys.executable, answer=answer) if answer else "#!/bin/sh\nexit 1\n")
    python.chmod(0o700)
    script = load_script("against_lmcache")
    assert script.main(["--peer-python", str(python), "--only", "small", "--path", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("tiny", "no_fio")
def test_tables_are_written_between_their_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "tiers", "--json", "--path", str(tmp_path), "--chunk-bytes", str(CHUNK)]) == 0
    result = json.loads(capsys.readouterr().out)
    script = load_script("run")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- bench:tiers -->\noutdated\n<!-- /bench:tiers -->\nbetween\n"
        "<!-- bench:lmcache -->\nkept\n<!-- /bench:lmcache -->\nafter\n"
    )
    monkeypatch.setattr(script, "PAGES", (page,))
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tiers.json").write_text(json.dumps({**result, "command": "lmcachectl bench tiers"}))
    assert script.main(["--render"]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:tiers -->\n`lmcachectl bench tiers` on ") and text.endswith("after\n")
    assert all(f"`{name}`" in text for name in bench.TARGETS)
    assert result["machine"]["date"] in text and "outdated" not in text and "\nkept\n" in text
    assert script.main(["--render"]) == 0
    assert page.read_text() == text, "writing again changes nothing"


def test_the_pages_have_places_for_every_table() -> None:
    script = load_script("run")
    places = {
        "docs/benchmarks.md": ("ttft", "serving", "tiers", "lmcache", "backends"),
        "docs/codec.md": ("codec", "quality"),
        "README.md": ("readme",),
    }
    for page, names in places.items():
        text = (ROOT / page).read_text()
        assert all(f"<!-- bench:{name} -->\n" in text and f"<!-- /bench:{name} -->" in text for name in names)
    assert {str(page.relative_to(ROOT)) for page in script.PAGES} == set(places)


def test_presets_of_the_figures_exist() -> None:
    sizes = [preset(name, 256).chunk_bytes for name in bench.MODELS]
    assert sizes == [32 << 20, 5898240]
