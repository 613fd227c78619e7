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
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from gpu_page import TOLD, Result, page

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "gpu.json", ROOT / "docs" / "benchmarks-gpu.md"
NEEDED = ("numpy", "torch", "xxhash", "pluggy", "pydantic", "yaml", "rich", "zstandard", "pytest", "hypothesis")
GIB, GB = 1 << 30, 1e9

Done = Callable[[Result], None]
"""Told of what a section has measured so far: what it has when it fails, or runs out of time, counts."""


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


def limits(bench: Bench, done: Done) -> None:
    """What plain copies reach: the ceilings of everything below. Also of host memory as the `cpu` backend has it."""
    from lmcache_backends.cpu import CpuMemory

    size = GIB
    device, other = bench.empty(size), bench.empty(size)
    device.random_(0, 256)
    arena = CpuMemory(pin=True, shared=True, gpu=0)
    region = arena.allocate(size)
    result: Result = {"arena_remark": region.remark, "arena_pinned": region.pinned}
    hosts = {"": bench.empty(size, pinned=True), "arena_": bench.torch.frombuffer(region.view, dtype=bench.torch.uint8)}
    for name, host in hosts.items():
        host.copy_(device)
        works = {
            "to_host": lambda h=host: h.copy_(device, non_blocking=True),
            "to_device": lambda h=host: device.copy_(h, non_blocking=True),
        }
        result |= {f"{name}{way}_gb_s": size / bench.seconds(work) / GB for way, work in works.items()}
    result["on_device_gb_s"] = size / bench.seconds(lambda: other.copy_(device)) / GB
    done(result)
    bench.torch.cuda.synchronize()
    arena.close()


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


def pages(bench: Bench, done: Done, ceiling: Result) -> None:
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
                ways = [How(bench.handle), How(bench.handle, path="staged", ring=ring)]
                ways += [How(bench.handle, ctas=n) for n in (4, 8, 16, 32, 64)] if pinned else []
                if geometry.planes[0].dims[-1].page_stride == geometry.planes[0].run_bytes:
                    ways.append(How(bench.handle, path="engine"))
                chosen = GpuPagedKV(base, geometry, blocks, how=ways[0], owner=memory).choose(ids, addresses, ways)
                for how in ways:
                    paged = GpuPagedKV(base, geometry, blocks, how=how, owner=memory)
                    row: Result = {"slots": "pinned" if pinned else "device", "layout": name, "path": how.path}
                    row |= {"ctas": how.ctas, "chosen": how is chosen}
                    for verb, link in (("gather", "to_host"), ("scatter", "to_device")):
                        work = functools.partial(getattr(paged, verb), ids, addresses)
                        rate = nbytes / bench.seconds(work) / GB
                        limit = ceiling[f"{link if pinned else 'on_device'}_gb_s"]
                        row |= {f"{verb}_gb_s": rate, f"{verb}_of_limit": rate / limit}
                    rows.append(row)
                    done({"rows": rows})


def tier(bench: Bench, done: Done, ceiling: Result) -> None:
    """What the GPU tier adds: the ways between pages, places and host memory, for 64 chunks."""
    import numpy as np

    from lmcache_core.build import build
    from lmcache_core.config import load
    from lmcache_core.copies import PageGeometry
    from lmcache_core.gpu import GpuPagedKV, How
    from lmcache_core.pipeline import Lease, Reservation
    from lmcache_core.types import ChunkKey

    layout, _ = _shape()
    count = 64
    nbytes = count * layout.chunk_bytes
    memory = bench.empty(nbytes)
    memory.random_(0, 256)
    bases = memory.data_ptr() + np.arange(64).reshape(32, 2).T * (nbytes // 64)
    blocks = count * layout.blocks
    paged = GpuPagedKV(bases, PageGeometry.nhd(layout), blocks, how=How(bench.handle), owner=memory)
    ids = np.random.default_rng(0).permutation(blocks).reshape(count, -1)
    bench.torch.cuda.synchronize()
    tiers = [
        {"name": "hbm", "capacity": nbytes, "backend": {"type": "gpu"}},
        {"name": "dram", "capacity": nbytes + count * (1 << 16), "backend": {"type": "cpu"}},
    ]
    names = [ChunkKey(b"benchmark-------" + i.to_bytes(16, "big")) for i in range(count)]

    def save(room: Reservation) -> None:
        paged.gather(ids[room.positions], room.on_device(bench.handle))

    def load_(lease: Lease) -> None:
        paged.scatter(ids[: len(lease)], lease.on_device(bench.handle))

    def timed(work: Callable[[], object]) -> float:
        bench.torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        bench.stream.synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {}
    before = memory.sum(dtype=bench.torch.int64).item()
    with closing(build(load({"chunk_tokens": layout.chunk_tokens, "tiers": tiers}).config, layout)) as pipeline:
        for _ in range(bench.repeat):
            start = time.perf_counter()
            times.setdefault("store: pages are free", []).append(timed(lambda: pipeline.store(names, save)))
            pipeline.flush(60)
            times.setdefault("store: all is in host memory", []).append(time.perf_counter() - start)
            for name, clear in (("load from the GPU tier", ""), ("load from host memory", "hbm")):
                if clear:
                    pipeline.clear(clear)
                with pipeline.retrieve(names) as lease:
                    times.setdefault(name, []).append(timed(lambda held=lease: load_(held)))
            pipeline.flush(60)
            pipeline.clear()
    same = before == memory.sum(dtype=bench.torch.int64).item()
    rates = {name: nbytes / statistics.median(taken) / GB for name, taken in times.items()}
    done({"rows": [{"what": name, "gb_s": rate} for name, rate in rates.items()], "same_bytes": same})


SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024,
    },
}  # fmt: skip
"""Of Llama models; `8b` is Llama-3.1-8B's."""


class _Clock:
    """When `generate` gave out the prompt, and each token: a streamer of Transformers."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ttft(done: Done, shape: str, lengths: list[int], repeat: int, device: str) -> None:
    """Seconds to the first of 8 greedy tokens after prompts of random tokens, by a model of random weights: computed,
    and with the prompt in each tier."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmcache_core.adapters.transformers import attach

    torch.manual_seed(0)
    on_gpu = device == "cuda"
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 17, rope_parameters=rope, dtype=torch.bfloat16)
    with torch.device(device):
        before, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None

    def generate(ids: Any) -> tuple[float, list[int]]:
        if on_gpu:
            torch.cuda.synchronize()
        clock, start = _Clock(), time.perf_counter()
        mask = torch.ones_like(ids)
        options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "streamer": clock}
        tokens = model.generate(ids, attention_mask=mask, **options)
        return clock.times[1] - start, tokens[0, ids.shape[1] :].tolist()

    size = SHAPES[shape]
    chunk = 256 * 2 * 2 * size["num_hidden_layers"] * size["num_key_value_heads"] * size["head_dim"]
    hbm = (max(lengths) // 256 + 4) * chunk
    room = 3 * hbm // 2 + (64 << 20)  # the media take some of it for buffers
    names = ["hbm", "dram", "disk"][0 if on_gpu else 1 :]
    with tempfile.TemporaryDirectory(prefix="lmcache-ttft-") as directory:
        backends = {"hbm": {"type": "gpu"}, "dram": {"type": "cpu"}, "disk": {"type": "gds", "path": f"{directory}/kv"}}
        tiers: list[Result] = [{"name": n, "capacity": room, "backend": backends[n]} for n in names]
        # Written back, so that a prompt larger than a queue reaches the disk whole.
        tiers[-1] |= {"write": "back", "lane": {"deadline": "60s"}}
        if on_gpu:
            tiers[0]["capacity"] = hbm
        rows: list[Result] = []
        with attach(model, {"chunk_tokens": 256, "tiers": tiers}) as handle:
            generate(torch.randint(3, 1000, (1, 300), device=device))
            for length in lengths:
                ids = torch.randint(3, 1000, (1, length), device=device)
                row: Result = {"tokens": length}
                handle.pipeline.clear()
                row["cold_s"], expected = generate(ids)
                handle.pipeline.flush(120)
                for name in names:
                    times, same = [], True
                    for _ in range(repeat):
                        if name != names[0]:
                            handle.pipeline.clear("hbm" if name == "dram" else "dram")
                        seconds, tokens = generate(ids)
                        handle.pipeline.flush(120)
                        times.append(seconds)
                        same &= tokens == expected
                        row[f"{name}_sources"] = sorted(set(handle.last.sources))
                    row |= {f"{name}_s": statistics.median(times), f"{name}_tokens_equal": same}
                rows.append(row)
                done({"shape": shape, "device": device, "tiers": names, "rows": rows})


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


def codec(bench: Bench, done: Done, ceiling: Result, *, quick: bool) -> None:
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
            done(out)


# -- running --


def measure(given: argparse.Namespace) -> None:
    """One section, in a process of its own: what a kernel does to its context cannot spoil the others."""

    def done(result: Result) -> None:
        part = given.into.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(given.into)

    if given.section == "ttft":
        lengths = [int(length) for length in given.lengths.split(",")]
        return ttft(done, given.shape, lengths, 1 if given.quick else 3, given.device)
    bench, ceiling = Bench(given.quick), {}
    limits(bench, done if given.section == "limits" else ceiling.update)
    if given.section == "pages":
        pages(bench, done, ceiling)
    elif given.section == "tier":
        tier(bench, done, ceiling)
    elif given.section == "codec":
        codec(bench, done, ceiling, quick=given.quick)
    return None


def run_section(name: str, timeout_s: float, options: list[str]) -> Result:
    """What one section measured, and why it has no more."""
    with tempfile.TemporaryDirectory() as directory:
        into = Path(directory) / "result.json"
        command = [sys.executable, __file__, "--section", name, "--into", str(into), *options]
        error = ""
        start = time.perf_counter()
        try:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, timeout_s))
            if ran.returncode:
                print(ran.stderr[-4000:], file=sys.stderr)
                error = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            error = f"no time left after {timeout_s:.0f} s (--budget)"
        result = json.loads(into.read_text()) if into.is_file() else {}
        return {"result": result, "error": error, "took_s": round(time.perf_counter() - start, 1)}


def machine(device: str) -> Result:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else "?"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        "driver": driver.splitlines()[0] if driver else "?",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "machine": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
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
    parser.add_argument("--budget", type=float, default=1500, help="seconds for tests and measurements together")
    parser.add_argument("--sections", default=",".join(TOLD), help="which to measure, in this order")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of the model of `ttft`")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536", help="prompts of `ttft`, in tokens")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: `ttft` alone, to try it")
    parser.add_argument("--section", choices=TOLD, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    if given.section:
        measure(given)
        return 0
    end = time.monotonic() + given.budget
    try:
        if given.wheels:
            site = unpack(given.wheels)
            os.environ["PYTHONPATH"] += os.pathsep + site
            sys.path.append(site)
        if given.device == "cuda":
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
    if not given.no_tests and given.device == "cuda":
        tests = run_tests(min(240, given.budget / 3))
        print(f"tests/gpu: {tests['summary']}")
    result: Result = {**machine(given.device), "tests": tests, "sections": {}}
    table, numbers = PAGE, RESULTS
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        table, numbers = given.out / PAGE.name, given.out / RESULTS.name
    options = ["--shape", given.shape, "--lengths", given.lengths, "--device", given.device]
    for name in ["ttft"] if given.device == "cpu" else given.sections.split(","):
        found = run_section(name, end - time.monotonic(), options + (["--quick"] if given.quick else []))
        print(f"{name}: {found['took_s']} s{', ' if found['error'] else ''}{found['error']}")
        result["sections"][name] = found
        numbers.write_text(json.dumps(result, indent=1) + "\n")  # after each: whoever is cut off has the others
        table.write_text(page(result))
    print(page(result))
    return 0 if tests["passed"] and not any(found["error"] for found in result["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
