"""Build, test and measure on the NVIDIA GPU of this machine; write docs/benchmarks-gpu.md and results/gpu.json.

    python benchmarks/gpu.py                     build csrc with the nvcc here, run tests/gpu, measure, write
    python benchmarks/gpu.py --no-build --quick  with the libraries that are there, fewer repetitions
    python benchmarks/gpu.py --wheels DIR        with Python packages from wheels in DIR: no registry is asked

Needs an NVIDIA driver, PyTorch for CUDA, and what lmcache-core and its tests need. Uses the Python that runs it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "gpu.json", ROOT / "docs" / "benchmarks-gpu.md"
NEEDED = ("numpy", "torch", "xxhash", "pluggy", "pydantic", "yaml", "rich", "zstandard", "pytest", "hypothesis")
GIB, GB = 1 << 30, 1e9

Result = dict[str, Any]


class NotPossible(Exception):
    """This machine lacks something; the message says what, and how to get it."""


# -- getting there --


def build() -> float:
    """Build both libraries beside the sources; return seconds."""
    for tool, fix in (
        ("cmake", "install CMake 3.18 or newer"),
        ("nvcc", "put the CUDA toolkit's bin directory on PATH"),
    ):
        if shutil.which(tool) is None:
            raise NotPossible(f"no {tool} here: {fix}, or run with --no-build")
    start = time.perf_counter()
    directory = ROOT / "build" / "gpu"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", "csrc", "-B", directory, "-DCMAKE_BUILD_TYPE=Release", "-DSKBUILD_STATE=editable", *generator],
        ["cmake", "--build", directory, "--parallel"],
        ["cmake", "--install", directory],
    ):
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ran.returncode:
            raise NotPossible(f"{' '.join(map(str, command))} failed:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}")
    return time.perf_counter() - start


def unpack(wheels: Path) -> str:
    """Install all wheels into a directory of their own and return it."""
    site = tempfile.mkdtemp(prefix="lmcache-gpu-")
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise NotPossible(f"no wheels in {wheels}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site, *found]
    subprocess.run(command, check=True)
    return site


def require() -> None:
    """Raise `NotPossible` unless everything is there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fix = f"{sys.executable} -m pip install {' '.join(missing)}, or --wheels DIR"
        raise NotPossible(f"this Python has no {', '.join(missing)}: {fix}")
    from lmcache_serde.cachegen import cuda

    if reason := cuda.why_not():
        raise NotPossible(reason)
    import torch

    if not torch.cuda.is_available():
        raise NotPossible(f"PyTorch {torch.__version__} here has no CUDA: install its CUDA wheel")


def run_tests(timeout_s: float, sanitizer: str | None = None) -> Result:
    """tests/gpu, in a process of its own: a fault there leaves no broken device to the measurements."""
    watch = ["compute-sanitizer", "--tool", sanitizer, "--error-exitcode", "9"] if sanitizer else []
    what = ["tests/gpu", "-q", "--maxfail=30", "--no-header", "-p", "no:cacheprovider"]
    command = [*watch, sys.executable, "-m", "pytest", *what]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not finished after {timeout_s:.0f} s"}
    if ran.returncode:
        print(ran.stdout[-6000:], ran.stderr[-2000:], sep="\n", file=sys.stderr)
    lines = ran.stdout.strip().splitlines()
    return {
        "passed": ran.returncode == 0,
        "summary": lines[-1].strip("= ") if lines else f"exit status {ran.returncode}",
    }


# -- measuring --


class Bench:
    """Times work queued on one stream with events."""

    def __init__(self, quick: bool) -> None:
        import torch

        self.torch = torch
        self.stream = torch.cuda.Stream()
        self.handle = int(self.stream.cuda_stream)
        self.repeat = 5 if quick else 20

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of several runs, each after the one before it is done."""
        times = []
        with self.torch.cuda.stream(self.stream):
            for i in range(self.repeat + 2):
                begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(self.stream)
                work()
                end.record(self.stream)
                end.synchronize()
                if i > 1:
                    times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def empty(self, nbytes: int, *, pinned: bool = False) -> Any:
        if pinned:
            return self.torch.empty(nbytes, dtype=self.torch.uint8, pin_memory=True)
        return self.torch.empty(nbytes, dtype=self.torch.uint8, device="cuda")


def limits(bench: Bench) -> Result:
    """What plain copies reach: the ceilings of everything below."""
    size = GIB
    host, device, other = bench.empty(size, pinned=True), bench.empty(size), bench.empty(size)
    device.random_(0, 256)
    host.copy_(device)
    rates = {
        "to_host": size / bench.seconds(lambda: host.copy_(device, non_blocking=True)),
        "to_device": size / bench.seconds(lambda: device.copy_(host, non_blocking=True)),
        "on_device": size / bench.seconds(lambda: other.copy_(device)),
    }
    return {f"{name}_gb_s": rate / GB for name, rate in rates.items()}


def _shape() -> tuple[Any, Any]:
    """Chunks of 256 tokens of a Llama-3.1-8B: layout, and the codec's shape."""
    from lmcache_core.layout import KVLayout
    from lmcache_serde.cachegen.format import Shape

    layout = KVLayout("lknhd", "bfloat16", 32, 2, 8, 128, chunk_tokens=256, block_tokens=16)
    return layout, Shape("bfloat16", 32, 2, 256, 1024)


@contextmanager
def _ring(memory: Any) -> Iterator[Any]:
    from lmcache_core.gpu import Ring

    ring = Ring(memory.data_ptr(), memory.numel(), places=4)
    try:
        yield ring
    finally:
        ring.close()


def pages(bench: Bench, ceiling: Result) -> list[Result]:
    """Gather and scatter of 16 chunks, for two layouts, every path, slots pinned and on the device."""
    import numpy as np

    from lmcache_core.copies import PageGeometry
    from lmcache_core.gpu import GpuPagedKV, How

    layout, _ = _shape()
    count, blocks = 16, 16 * 16 * 2
    nbytes = count * layout.chunk_bytes
    memory = bench.empty(2 * nbytes)
    memory.random_(0, 256)
    ids = np.random.default_rng(0).permutation(blocks)[: count * layout.blocks].reshape(count, -1)
    layer = 2 * nbytes // 32
    bases = memory.data_ptr() + np.arange(32) * layer
    layouts = {
        "NHD, K and V apart": (PageGeometry.nhd(layout), np.stack([bases, bases + layer // 2])),
        "HND, K and V packed": (PageGeometry.hnd(layout, packed=True), bases),
    }
    staging = bench.empty(4 * layout.chunk_bytes)
    bench.torch.cuda.synchronize()
    rows: list[Result] = []
    with _ring(staging) as ring:
        for pinned in (True, False):
            slots = bench.empty(nbytes, pinned=pinned)
            addresses = slots.data_ptr() + np.arange(count) * layout.chunk_bytes
            for name, (geometry, base) in layouts.items():
                ways = [How(bench.handle), How(bench.handle, ctas=32), How(bench.handle, path="staged", ring=ring)]
                if geometry.planes[0].dims[-1].page_stride == geometry.planes[0].run_bytes:
                    ways.append(How(bench.handle, path="engine"))
                for how in ways:
                    paged = GpuPagedKV(base, geometry, blocks, how=how, owner=memory)
                    row: Result = {"slots": "pinned" if pinned else "device", "layout": name, "path": how.path}
                    row["ctas"] = how.ctas
                    for verb, link in (("gather", "to_host"), ("scatter", "to_device")):
                        work = functools.partial(getattr(paged, verb), ids, addresses)
                        rate = nbytes / bench.seconds(work) / GB
                        limit = ceiling[f"{link if pinned else 'on_device'}_gb_s"]
                        row |= {f"{verb}_gb_s": rate, f"{verb}_of_limit": rate / limit}
                    rows.append(row)
    return rows


def _like_kv(bench: Bench, shape: Any, count: int) -> Any:
    """Chunks with what makes KV compressible: offsets and scales by channel, neighbours alike, small V at the start."""
    torch = bench.torch
    generator = torch.Generator(device="cuda").manual_seed(0)
    rows, channels = shape.rows, shape.channels
    noise = torch.randn((count, rows, shape.tokens, channels), generator=generator, device="cuda", dtype=torch.bfloat16)
    scale = torch.randn((1, rows, 1, channels), generator=generator, device="cuda").mul_(0.6).exp_()
    offset = torch.randn((1, rows, 1, channels), generator=generator, device="cuda").mul_(2)
    offset[:, 1::2] = 0
    return noise.mul_(scale.bfloat16()).add_(offset.bfloat16())


def codec(bench: Bench, ceiling: Result, *, quick: bool) -> Result:
    """Encode and decode at `balanced` and `lossless`, and how few thread blocks keep up with the link."""
    import numpy as np

    from lmcache_serde import cachegen
    from lmcache_serde.cachegen import cuda, native

    torch, (_, shape) = bench.torch, _shape()
    out: Result = {"rows": []}
    for level in ("balanced", "lossless"):
        coding = cachegen.coding(level, shape, n_raw=0)
        for count in (1, 4, 16) if quick else (1, 4, 16, 64):
            chunks = _like_kv(bench, shape, count)
            room = (shape.bound + 255) // 256 * 256
            blobs, decoded = bench.empty(count * room), torch.empty_like(chunks)
            scratch = bench.empty(cuda.scratch_bytes(shape, count, coding))
            sizes = torch.zeros(count, dtype=torch.int64, pin_memory=True)
            raw, status = (torch.zeros(count, dtype=torch.int32, device="cuda") for _ in range(2))
            sources = chunks.data_ptr() + np.arange(count) * shape.nbytes
            places = blobs.data_ptr() + np.arange(count) * room
            targets = decoded.data_ptr() + np.arange(count) * shape.nbytes
            lent = (scratch.data_ptr(), scratch.numel())
            given = (sources, places, lent, sizes.data_ptr(), raw.data_ptr(), bench.handle)
            torch.cuda.synchronize()
            encoding = bench.seconds(lambda g=given, c=coding: cuda.encode(shape, c, *g))
            to = (places, sizes.tolist(), targets, lent, status.data_ptr(), bench.handle)
            decoding = bench.seconds(lambda t=to: cuda.decode(shape, *t))
            nbytes = count * shape.nbytes
            row: Result = {"level": level, "chunks": count, "ratio": nbytes / int(sizes.sum())}
            row |= {"encode_gb_s": nbytes / encoding / GB, "decode_gb_s": nbytes / decoding / GB}
            row |= {"encode_us": encoding * 1e6, "decode_us": decoding * 1e6}
            if count == 1:
                blob = np.ascontiguousarray(blobs[: int(sizes[0])].cpu().numpy())
                chunk, room_here = chunks.view(torch.uint8).cpu().numpy().reshape(-1), np.empty(shape.bound, np.uint8)
                (size,), _ = native.encode(shape, coding, [chunk], [room_here])
                back = np.empty(shape.nbytes, np.uint8)
                native.decode(shape, [blob], [back])
                got = decoded.view(torch.uint8).cpu().numpy().reshape(-1)
                row["equals_host"] = bool(np.array_equal(room_here[:size], blob) and np.array_equal(back, got))
            out["rows"].append(row | {"status_ok": not bool(status.any())})
            if level == "balanced" and count == 16:
                out["by_ctas"] = [
                    {
                        "ctas": c,
                        "decode_gb_s": nbytes / bench.seconds(lambda t=to, c=c: cuda.decode(shape, *t, ctas=c)) / GB,
                    }
                    for c in (8, 16, 32, 48, 64, 96, 128)
                ]
                out["needed_gb_s"] = row["ratio"] * ceiling["to_device_gb_s"]
                enough = [r["ctas"] for r in out["by_ctas"] if r["decode_gb_s"] >= out["needed_gb_s"]]
                out["ctas_needed"] = enough[0] if enough else None
    return out


# -- telling --


def page(result: Result) -> str:
    """docs/benchmarks-gpu.md."""
    limit, tests, coded = result["limits"], result["tests"], result["codec"]
    lines = [
        "# Benchmarks on a GPU",
        "",
        f"{result['device']}, driver {result['driver']}, CUDA {result['cuda']}, PyTorch {result['torch']};",
        f"{result['date']}; `make gpu`. Medians; GB/s are 10^9 bytes of bfloat16 a second.",
        "",
        f"`tests/gpu`: {tests['summary']}. Plain copies of 1 GiB: {limit['to_host_gb_s']:.1f} GB/s to pinned memory,",
        f"{limit['to_device_gb_s']:.1f} from it, {limit['on_device_gb_s']:.0f} on the device.",
        "",
        "## Pages and slots",
        "",
        "16 chunks of 256 tokens of a Llama-3.1-8B (512 MiB), random blocks of 16 tokens. In brackets, the part of the",
        "plain copy.",
        "",
        "| slots | layout | path | gather | scatter |",
        "|---|---|---|---|---|",
    ]
    for row in result["pages"]:
        path = row["path"] + (f", {row['ctas']} blocks" if row["ctas"] else "")
        cells = [f"{row[f'{verb}_gb_s']:.1f} ({row[f'{verb}_of_limit']:.2f})" for verb in ("gather", "scatter")]
        lines.append(f"| {row['slots']} | {row['layout']} | {path} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "## Codec",
        "",
        "The same chunks, of random numbers with a model's offsets and scales: the ratio is not a model's.",
        "",
        "| level | chunks | ratio | encode GB/s | decode GB/s | encode us | decode us |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in coded["rows"]:
        cells = [f"{row[name]:.0f}" for name in ("encode_gb_s", "decode_gb_s", "encode_us", "decode_us")]
        lines.append(f"| {row['level']} | {row['chunks']} | {row['ratio']:.2f} | {' | '.join(cells)} |")
    equal = all(row.get("equals_host", True) and row["status_ok"] for row in coded["rows"])
    steps = ", ".join(f"{row['ctas']}: {row['decode_gb_s']:.0f}" for row in coded["by_ctas"])
    needed = coded["ctas_needed"] or "more than 128"
    lines += [
        "",
        f"Bytes and values equal to the host's: {'yes' if equal else 'NO'}. Decode GB/s by thread blocks (one for a",
        f"multiprocessor): {steps}. To keep up with the link ({coded['needed_gb_s']:.0f} GB/s decoded): {needed}.",
        "",
    ]
    return "\n".join(lines)


def measure(quick: bool, tests: Result) -> Result:
    import torch

    bench = Bench(quick)
    ceiling = limits(bench)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else "?"
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0] if driver else "?",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "machine": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
        "tests": tests,
        "limits": ceiling,
        "pages": pages(bench, ceiling),
        "codec": codec(bench, ceiling, quick=quick),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-build", action="store_true", help="use the libraries that are there")
    parser.add_argument(
        "--sanitize", metavar="TOOL", help="run the tests under compute-sanitizer (memcheck, racecheck)"
    )
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, no batch of 64 chunks")
    parser.add_argument("--wheels", type=Path, help="directory of wheels with the Python packages that are missing")
    parser.add_argument("--out", type=Path, help="write gpu.json and benchmarks-gpu.md there instead")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    try:
        if given.wheels:
            site = unpack(given.wheels)
            os.environ["PYTHONPATH"] += os.pathsep + site
            sys.path.append(site)
        if not given.no_build:
            print(f"built csrc in {build():.0f} s")
        require()
    except NotPossible as problem:
        print(f"nothing was measured: {problem}", file=sys.stderr)
        return 2
    tests: Result = {"passed": True, "summary": "not run"}
    if given.sanitize:
        tests = run_tests(540, given.sanitize)
        print(f"tests/gpu under {given.sanitize}: {tests['summary']}")
        return 0 if tests["passed"] else 1
    if not given.no_tests:
        tests = run_tests(240)
        print(f"tests/gpu: {tests['summary']}")
    result = measure(given.quick, tests)
    table, numbers = PAGE, RESULTS
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        table, numbers = given.out / PAGE.name, given.out / RESULTS.name
    numbers.write_text(json.dumps(result, indent=1) + "\n")
    table.write_text(page(result))
    print(page(result))
    return 0 if tests["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
