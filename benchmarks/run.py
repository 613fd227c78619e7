"""Run the benchmarks and write their tables into docs/benchmarks.md and README.md, each with date, machine and command.

    python benchmarks/run.py                        everything this environment can run, but serving
    python benchmarks/run.py --only tiers --quick   one of them
    python benchmarks/run.py --render               tables again from the stored results, nothing measured

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; what was measured is kept in
benchmarks/results/NAME.json. Run it on an idle machine: every ratio has its control in the same run, but a loaded
machine slows what computes more than what waits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_core.cli import bench_serving

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "codec.md", ROOT / "README.md")
PEER_PYTHON = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))
LMCACHECTL = [sys.executable, "-m", "lmcache_core"]

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One command whose last line on stdout is a JSON object."""

    command: Sequence[str]
    shown: str
    """The command as the page shows it."""
    missing: Callable[[], str | None]
    """What this environment lacks for it, or None."""


def _needs(*modules: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None

    return missing


def _peer() -> str | None:
    return None if PEER_PYTHON.is_file() else f"no LMCache environment at {PEER_PYTHON} (make bench-peer)"


BENCHMARKS: dict[str, Benchmark] = {
    "tiers": Benchmark([*LMCACHECTL, "bench", "tiers", "--json"], "lmcachectl bench tiers", lambda: None),
    "lmcache": Benchmark(
        [sys.executable, str(ROOT / "benchmarks" / "against_lmcache.py"), "--json", "--peer-python", str(PEER_PYTHON)],
        "python benchmarks/against_lmcache.py",
        _peer,
    ),
    "transformers": Benchmark(
        [*LMCACHECTL, "demo", "--engine", "transformers", "--json"],
        "lmcachectl demo --engine transformers",
        _needs("torch", "transformers"),
    ),
    "vllm": Benchmark(
        [*LMCACHECTL, "demo", "--engine", "vllm", "--json"], "lmcachectl demo --engine vllm", _needs("torch", "vllm")
    ),
}
SERVING = tuple(bench_serving.SHAPES)
"""Run when asked for only: in full they take most of an hour."""
for _shape in SERVING:
    BENCHMARKS[_shape] = Benchmark(
        [*LMCACHECTL, "bench", "serving", "--shape", _shape, "--json", "--peer-python", str(PEER_PYTHON)],
        f"lmcachectl bench serving --shape {_shape}",
        _needs("torch", "vllm"),
    )
BACKENDS = {"gds": 0.9, "redis": 0.8, "fsspec": 0.9, "s3": 0.9, "mooncake": 0.9}
"""Media that are measured against the best client of their own, with the ratio that is the goal."""
for _type in BACKENDS:
    BENCHMARKS[_type] = Benchmark(
        [*LMCACHECTL, "bench", "backend", _type, "--json"], f"lmcachectl bench backend {_type}", lambda: None
    )
BENCHMARKS["codec"] = Benchmark(
    [*LMCACHECTL, "bench", "codec", "--json", "--incumbent", str(PEER_PYTHON)], "lmcachectl bench codec", lambda: None
)
BENCHMARKS["quality"] = Benchmark(
    [*LMCACHECTL, "bench", "codec-quality", "--tokens", "2048", "--windows", "8", "--json"],
    "lmcachectl bench codec-quality --tokens 2048 --windows 8",
    _needs("torch", "transformers"),
)
QUICK = ("tiers", "lmcache", "codec", *SERVING, *BACKENDS)
"""Benchmarks that know --quick."""


def measure(name: str, *, quick: bool) -> Result:
    """Run one benchmark and store its result. Raise `SystemExit` when it gives none."""
    benchmark = BENCHMARKS[name]
    command = [*benchmark.command, *(["--quick"] if quick and name in QUICK else [])]
    print(f"{name}: {benchmark.shown}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    try:
        result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise SystemExit(f"{name}: exit code {done.returncode} and no JSON object on the last line") from None
    if "figures" not in result and "rows" not in result:
        raise SystemExit(f"{name}: {json.dumps(result)}")
    result["command"] = benchmark.shown + (" --quick" if quick and name in QUICK else "")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def stored() -> dict[str, Result]:
    """The results of earlier runs."""
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in BENCHMARKS
        if (file := RESULTS / f"{name}.json").is_file()
    }


# -- tables ----------------------------------------------------------------------------------------------------------
def where(result: Mapping[str, Any]) -> str:
    """The line above a table: the command, the machine, the date."""
    machine = result["machine"]
    if isinstance(machine, dict):
        machine = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, last-level cache "
            f"{machine['last_level_cache']}, Linux {machine['kernel']}, {machine['simd']}, {machine['date']}"
        )
    return f"`{result['command']}` on {machine}:"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> str:
    """A Markdown table; columns from `right` on are right-aligned but for the last."""
    rule = ["---" if i < right or i == len(head) - 1 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def figures_table(result: Result) -> str:
    """The figures with their targets."""
    rows = []
    for name, value in result["figures"].items():
        sign, target = result["targets"][name].split()
        good = value >= float(target) if sign == ">=" else value <= float(target)
        rows.append([f"`{name}`", f"{value:g}", f"{sign} {target}", "met" if good else "**not met**"])
    return grid(["figure", "value", "target", ""], rows)


def rates_table(result: Result) -> str:
    """Every ratio with the rates behind it."""
    rows = []
    for tier in ("memory", "disk"):
        for model, found in result[tier].items():
            size = f"{result['chunk_bytes'][model] / (1 << 20):.3g} MiB"
            for kind, ratio in found.items():
                if isinstance(ratio, dict) and "ratio" in ratio:
                    cells = [
                        f"{ratio[rate]:.2f}" for rate in ("ratio", "subject", "subject_best", "control", "control_best")
                    ]
                    rows.append([f"{tier} {kind}, {size}", *cells, ratio["control_name"]])
    return grid(["", "ratio", "GB/s", "best", "control GB/s", "best", "control"], rows)


def small_table(result: Result) -> str:
    """Lookups, keys and the control plane in full."""
    rows = [[f"lookup of 1,000 chunks, {where}", f"{value:g} ms", ""] for where, value in result["lookup_ms"].items()]
    rows += [[f"keys of 128k tokens from {kind}", f"{v:g} Mtok/s", ""] for kind, v in result["keys_mtok_s"].items()]
    for mode, times in result["control_us_per_key"].items():
        parts = ", ".join(f"{part} {value:g}" for part, value in times.items() if part != "total")
        rows.append([f"control plane, {mode}", f"{times['total']:g} us/key", parts])
    return grid(["", "median", ""], rows)


def tiers_table(result: Result) -> str:
    """All of `bench tiers`."""
    baseline = f"Disk baseline: {result['baseline']['disk']}."
    return "\n\n".join([where(result), figures_table(result), rates_table(result), small_table(result), baseline])


def lmcache_table(result: Result) -> str:
    """Beside LMCache."""
    rows = []
    for row in result["rows"]:
        legacy = " / ".join(f"{value:g}" for part, value in row["theirs"].items() if part != "mp")
        mp = row["theirs"].get("mp")
        cells = [row["name"], row["unit"], f"{row['ours']:g}", legacy, "" if mp is None else f"{mp:g}"]
        control = "" if row["control"] is None else f"{row['control']:g}"
        verdict = row["verdict"] if row["verdict"] != "BEHIND" else "**behind**"
        rows.append([*cells, control, f"{row['ratio']:.2f}", verdict])
    head = ["", "unit", "lmcache-core", "LMCache, in process", "LMCache, multiprocess", "memcpy", "ratio", ""]
    return f"{where(result)}\n\n{grid(head, rows, right=2)}"


def ttft_table(results: Mapping[str, Result]) -> str:
    """Time to first token of the demos."""
    names = ("ttft_recompute_s", "ttft_dram_s", "ttft_disk_s", "speedup_dram", "speedup_disk", "outputs_equal")
    blocks = []
    for engine in ("transformers", "vllm"):
        if engine in results:
            figures = results[engine]["figures"]
            cells = [results[engine]["model"], *(str(figures[name]).lower() for name in names)]
            head = ["model", "recompute, s", "from DRAM, s", "from disk, s", "DRAM x", "disk x", "answers equal"]
            blocks.append(f"{where(results[engine])}\n\n{grid(head, [cells])}")
    return "\n\n".join(blocks)


def backends_table(results: Mapping[str, Result]) -> str:
    """Every medium against the best client of its own."""
    found = {name: results[name] for name in BACKENDS if name in results}
    rows = []
    for name, result in found.items():
        figures, goal = result["figures"], BACKENDS[name]
        ratios = [figures["put_vs_baseline"], figures["get_vs_baseline"]]
        verdict = "met" if min(ratios) >= goal else "**not met**"
        rates = [f"{figures['put_gb_s']:.2f}", f"{figures['get_gb_s']:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
        small = [f"{figures['exists_1000_ms']:.3g}", f"{figures['cpu_s_per_gb']:.2f}", result["baseline"]]
        rows.append([f"`{name}`", *rates, f">= {goal}, {verdict}", *small])
    head = ["", "put GB/s", "get GB/s", "put ratio", "get ratio", "goal", "1,000 exist, ms", "CPU s/GB", "baseline"]
    commands = ", ".join(f"`{result['command']}`" for result in found.values())
    machine = where(next(iter(found.values()))).partition(" on ")[2]
    return f"{commands} on {machine}\n\n{grid(head, rows)}"


def serving_table(results: Mapping[str, Result]) -> str:
    """Every system that served, for each shape."""
    blocks = []
    for result in (results[shape] for shape in SERVING if shape in results):
        head, *rows = bench_serving.rows(result)
        blocks.append("\n\n".join([where(result), grid(head, rows), *bench_serving.notes(result)]))
    return "\n\n".join(blocks)


def codec_table(result: Result) -> str:
    """Speed of the codec's levels."""
    rows = [
        [name, *(f"{row[column]:.3g}" for column in ("ratio", "encode_gb_s_core", "decode_gb_s_core")), row["simd"]]
        for name, row in result["figures"].items()
    ]
    head = ["", "ratio", "encode GB/s a core", "decode GB/s a core", "instructions"]
    two = "Two threads code {encode} (encode) and {decode} (decode) times what one does.".format(**result["two_cores"])
    times = result.get("times_incumbent")
    if times:
        two += " `balanced` is {encode} and {decode} times as fast as LMCache's codec on the CPU.".format(**times)
    return f"{where(result)}\n\n{grid(head, rows)}\n\n{two}"


def quality_table(result: Result) -> str:
    """What the codec's levels cost a model."""
    columns = ("bits_per_value", "ratio", "kl", "top1", "dppl_percent", "dppl_error")
    parts = {"mean of all": result["figures"], **result["texts"]}
    rows = [
        [level, part, *(f"{figures[level][column]:.3g}" for column in columns)]
        for level in result["figures"]
        for part, figures in parts.items()
    ]
    head = ["level", "text", "bits/value", "ratio", "KL, nats/token", "top-1 %", "perplexity %", "standard error"]
    return f"{where(result)}\n\n{grid(head, rows, right=2)}"


def readme_table(results: Mapping[str, Result]) -> str:
    """The short version."""
    blocks = []
    for engine in ("transformers", "vllm"):
        if engine in results:
            f, model = results[engine]["figures"], results[engine]["model"]
            blocks.append(
                f"* {engine}, {model}: first token {f['ttft_recompute_s']:.2f} s recomputed, "
                f"{f['ttft_dram_s']:.3f} s from DRAM ({f['speedup_dram']:g}x), "
                f"{f['ttft_disk_s']:.3f} s from disk after a restart ({f['speedup_disk']:g}x)"
            )
    text = "\n".join(blocks)
    if "tiers" in results:
        text += f"\n\n{where(results['tiers'])}\n\n{figures_table(results['tiers'])}"
    return text.strip()


def tables(results: Mapping[str, Result]) -> dict[str, str]:
    """Every table whose results are there, by the name of its place."""
    made = {"readme": readme_table(results), "ttft": ttft_table(results), "serving": serving_table(results)}
    if "tiers" in results:
        made["tiers"] = tiers_table(results["tiers"])
    if "lmcache" in results:
        made["lmcache"] = lmcache_table(results["lmcache"])
    if "codec" in results:
        made["codec"] = codec_table(results["codec"])
    if "quality" in results:
        made["quality"] = quality_table(results["quality"])
    if any(name in results for name in BACKENDS):
        made["backends"] = backends_table(results)
    return {name: text for name, text in made.items() if text}


def write(page: Path, made: Mapping[str, str]) -> bool:
    """Put the tables in their places; whether the page changed."""
    before = page.read_text(encoding="utf-8")

    def place(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- bench:{name} -->\n{made[name]}\n<!-- /bench:{name} -->" if name in made else match[0]

    after = re.sub(r"<!-- bench:(\w+) -->\n.*?<!-- /bench:\1 -->", place, before, flags=re.DOTALL)
    if after != before:
        page.write_text(after, encoding="utf-8")
    return after != before


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; not for published tables")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    if not args.render:
        for name in args.only or [name for name in BENCHMARKS if name not in SERVING]:
            lacking = BENCHMARKS[name].missing()
            if lacking is None:
                measure(name, quick=args.quick)
            elif args.only:
                raise SystemExit(f"{name}: {lacking}")
            else:
                print(f"{name}: left out, {lacking}", file=sys.stderr)
    made = tables(stored())
    for page in PAGES:
        if page.is_file() and write(page, made):
            print(f"{page.relative_to(ROOT)}: tables written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
