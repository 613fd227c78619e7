"""Time to first token through a slow link: raw chunks, every level of cachegen, and the level chosen while streaming.

    python benchmarks/shaped_link.py --model .models/smollm2-135m-instruct        as root: it makes a network namespace

A Redis server runs in a network namespace of its own behind a virtual cable, whose both ends a token bucket filter
holds to `--mbit` (the kernel's tbf). For each setting vLLM prefills a document once, in bfloat16, forgets what is in
memory, and is asked again, several times. In the second half the cable becomes slower while chunks are on their way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from lmcache_core.cli.engine_args import vllm_transfer_config

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_WAIT_POLICY": "passive",
}
LEVELS = ("near", "high", "balanced", "small", "tiny")
LADDER = ("high", "balanced", "small", "tiny")
NEAR, FAR = "10.213.7.1", "10.213.7.2"


class Cable:
    """A namespace with a Redis server behind a virtual cable of a chosen speed. Linux, root."""

    def __init__(self) -> None:
        self.name = f"lmc{os.getpid() % 100000}"
        self._ends = (f"{self.name}a", f"{self.name}b")

    def __enter__(self) -> Cable:
        near, far = self._ends
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            _run("ip", "netns", "add", self.name)
            undo.callback(_run, "ip", "netns", "del", self.name)
            _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
            undo.callback(_run, "ip", "link", "del", near)
            _run("ip", "addr", "add", f"{NEAR}/30", "dev", near)
            _run("ip", "link", "set", near, "up")
            inside = ("ip", "netns", "exec", self.name)
            _run(*inside, "ip", "addr", "add", f"{FAR}/30", "dev", far)
            _run(*inside, "ip", "link", "set", far, "up")
            server = subprocess.Popen(
                [*inside, "redis-server", "--bind", FAR, "--protected-mode", "no", "--save", "", "--port", "6379"],
                stdout=subprocess.DEVNULL,
            )
            undo.callback(server.wait)
            undo.callback(server.terminate)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def speed(self, mbit: int | None) -> None:
        """Hold both directions to `mbit` Mbit/s; None lifts the limit."""
        near, far = self._ends
        for inside, end in (((), near), (("ip", "netns", "exec", self.name), far)):
            # A bucket must hold a whole offloaded segment (64 KiB), or the filter drops what it cannot cut.
            limit = [
                "replace",
                "dev",
                end,
                "root",
                "tbf",
                "rate",
                f"{mbit}mbit",
                "burst",
                "256kb",
            ]
            if mbit is None:
                subprocess.run(
                    [*inside, "tc", "qdisc", "del", "dev", end, "root"], check=False, stderr=subprocess.DEVNULL
                )
            else:
                _run(*inside, "tc", "qdisc", *limit, "latency", "100ms")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@dataclass
class Row:
    """What one setting took."""

    setting: str
    ttft_s: list[float] = field(default_factory=list)
    dram_ttft_s: list[float] = field(default_factory=list)
    """The same prompt while its chunks are in memory: what no link can improve."""
    changing_ttft_s: list[float] = field(default_factory=list)
    stored_bytes: int = 0
    read_bytes: list[int] = field(default_factory=list)
    """Bytes read while the speed changed."""
    levels: dict[str, int] = field(default_factory=dict)
    """Chunks read at each level while the speed changed."""


@dataclass(frozen=True)
class Shape:
    """The link and the prompt."""

    mbit: int
    slow_mbit: int
    slow_after_s: float
    target_s: float
    repetitions: int


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--document", type=Path, help="a text file instead of the demo's")
    parser.add_argument("--tokens", type=int, default=4104)
    parser.add_argument("--mbit", type=int, default=1000)
    parser.add_argument("--slow-mbit", type=int, default=100, help="the speed it falls to")
    parser.add_argument("--slow-after", type=float, default=0.1, help="seconds after the question")
    parser.add_argument("--target", type=float, default=1.0, help="seconds the adaptive level aims at")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer levels and repetitions")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    missing = [tool for tool in ("ip", "tc", "redis-server") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        print(f"needs root and {', '.join(missing) or 'nothing else'}: it makes a network namespace", file=sys.stderr)
        return 2
    os.environ.update(ENVIRONMENT)
    shape = Shape(args.mbit, args.slow_mbit, args.slow_after, args.target, 2 if args.quick else args.repetitions)
    settings = ["raw", "balanced", "tiny", "adaptive"] if args.quick else ["raw", *LEVELS, "adaptive"]
    rows = measure(args.model, args.document, args.tokens, settings, shape)
    figures = summary(rows, shape)
    if not args.json:
        show(rows, shape)
    print(json.dumps({"figures": figures, "rows": [vars(row) for row in rows], "shape": vars_of(shape)}))
    return 0


def vars_of(shape: Shape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


def measure(model: Path, document: Path | None, tokens: int, settings: list[str], shape: Shape) -> list[Row]:
    from transformers import AutoTokenizer

    path = document or Path(__file__).resolve().parent.parent / "lmcache_core" / "cli" / "constitution.txt"
    prompt = AutoTokenizer.from_pretrained(model)(path.read_text(encoding="utf-8")).input_ids[:tokens]
    if len(prompt) < tokens:
        print(f"the document has {len(prompt)} tokens, fewer than {tokens}", file=sys.stderr)
    rows = []
    with Cable() as cable:
        for setting in settings:
            rows.append(measure_one(model, prompt, cable, Row(setting), shape))
            print(f"{setting}: {rows[-1]}", file=sys.stderr)
    return rows


def measure_one(model: Path, prompt: list[int], cable: Cable, row: Row, shape: Shape) -> Row:
    """One engine, in this process, so that its memory tier can be emptied."""
    from vllm import LLM, SamplingParams

    cable.speed(None)
    connector = vllm_transfer_config(None) | {
        "kv_connector_extra_config": {"config": configuration(row.setting, shape)}
    }
    options: dict[str, Any] = {"kv_transfer_config": connector, "enable_prefix_caching": False, "enforce_eager": True}
    room = len(prompt) + 1
    llm = LLM(model=str(model), dtype="bfloat16", max_model_len=room, kv_cache_memory_bytes=1 << 30, **options)
    try:
        pipeline = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler.pipeline
        once = SamplingParams(temperature=0, max_tokens=1, detokenize=False)

        def ask() -> float:
            begun = perf_counter()
            llm.generate({"prompt_token_ids": prompt}, once, use_tqdm=False)
            return perf_counter() - begun

        def ask_far() -> float:
            pipeline.clear("dram")
            return ask()

        ask()
        if not pipeline.flush(120):
            raise RuntimeError(f"{row.setting}: not everything was stored in two minutes")
        far = pipeline.tiers[0]
        row.stored_bytes = far.stats()["written_bytes"]
        row.dram_ttft_s = [ask() for _ in range(shape.repetitions)]
        for _ in range(shape.repetitions):
            cable.speed(shape.mbit)
            row.ttft_s.append(ask_far())
        for _ in range(shape.repetitions):
            cable.speed(shape.mbit)
            before = far.stats()
            with later(shape.slow_after_s, partial(cable.speed, shape.slow_mbit)):
                row.changing_ttft_s.append(ask_far())
            after = far.stats()
            row.read_bytes.append(after["read_bytes"] - before["read_bytes"])
            for name in after:
                if name.startswith("read_cachegen"):
                    row.levels[name] = row.levels.get(name, 0) + after[name] - before.get(name, 0)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return row


@contextlib.contextmanager
def later(delay: float, action: Any) -> Iterator[None]:
    """Do something `delay` seconds from now, on another thread, while the block runs."""
    ended = threading.Event()

    def run() -> None:
        if not ended.wait(delay):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def configuration(setting: str, shape: Shape) -> dict[str, Any]:
    tier: dict[str, Any] = {
        "name": "far",
        "backend": {"type": "redis", "url": f"redis://{FAR}:6379/0", "prefix": f"{setting}:"},
        "lane": {"deadline": "60s", "lookup_deadline": "5s"},
    }
    if setting == "adaptive":
        serde = {"type": "cachegen", "level": "adaptive", "levels": list(LADDER), "target": f"{shape.target_s}s"}
        tier |= {"lossy": True, "serde": serde}
    elif setting != "raw":
        tier |= {"lossy": True, "serde": {"type": "cachegen", "level": setting}}
    return {"chunk_tokens": 256, "tiers": [{"name": "dram", "capacity": "2GiB", "backend": {"type": "cpu"}}, tier]}


def summary(rows: list[Row], shape: Shape) -> dict[str, Any]:
    """`adaptive_wins`: it is in time, and every fixed level is either late or was read with fewer bits."""
    by = {row.setting: row for row in rows}
    ttft = {name: statistics.median(row.ttft_s) for name, row in by.items()}
    changing = {name: statistics.median(row.changing_ttft_s) for name, row in by.items()}
    read = {name: statistics.median(row.read_bytes) for name, row in by.items()}
    late = shape.target_s * 1.1
    rivals = [name for name in by if name != "adaptive" and changing[name] <= late]
    return {
        "ttft_s": {name: round(value, 4) for name, value in ttft.items()},
        "dram_ttft_s": {name: round(statistics.median(row.dram_ttft_s), 4) for name, row in by.items()},
        "changing_ttft_s": {name: round(value, 4) for name, value in changing.items()},
        "balanced_vs_raw": round(ttft["raw"] / ttft["balanced"], 2),
        "adaptive_in_time": changing["adaptive"] <= late,
        "adaptive_wins": changing["adaptive"] <= late and all(read["adaptive"] > read[name] for name in rivals),
    }


def show(rows: list[Row], shape: Shape) -> None:
    print(f"{'setting':10} {'stored MB':>10} {shape.mbit:>6} Mbit/s   falls to {shape.slow_mbit}   MB read then")
    for row in rows:
        ttft, changing = statistics.median(row.ttft_s), statistics.median(row.changing_ttft_s)
        read = statistics.median(row.read_bytes) / 1e6
        print(f"{row.setting:10} {row.stored_bytes / 1e6:10.1f} {ttft:10.3f} s {changing:12.3f} s {read:14.1f}")


if __name__ == "__main__":
    sys.exit(main())
