"""`lmcachectl demo`: a long document prefilled once, then questions: cold, from DRAM, and from disk after a restart."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from lmcache_core.cli import demo_transformers, demo_vllm
from lmcache_core.cli.bench_common import describe_machine
from lmcache_core.cli.console import OK, PROBLEM, add_json, emit
from lmcache_core.cli.demo_common import (
    DISK,
    DRAM,
    QUESTIONS,
    RECOMPUTE,
    DemoOptions,
    DemoResult,
    Report,
    Run,
    document_text,
    picture,
    runs,
)
from lmcache_core.cli.model import default_directory, resolve
from lmcache_core.config import load
from lmcache_core.errors import LMCacheError

ENGINES: dict[str, Run] = {"transformers": demo_transformers.run, "vllm": demo_vllm.run}

_TITLES = {
    RECOMPUTE: "cache off, recomputed",
    DRAM: "from DRAM",
    DISK: "after a restart, from disk",
}


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo", help="see what a hit saves, on a real model", description=(__doc__ or "").split(": ", 1)[1]
    )
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="default: %(default)s")
    parser.add_argument("--model", metavar="PATH|REPO", help="default: a small model, fetched once (lmcachectl model)")
    parser.add_argument(
        "--tokens", type=_positive, default=4096, help="length of the shared prefix (default: %(default)s)"
    )
    parser.add_argument("--document", type=Path, metavar="FILE", help="your own text (default: the U.S. Constitution)")
    parser.add_argument("--question", action="append", metavar="TEXT", help="your own question; may be repeated")
    parser.add_argument("--chunk-tokens", type=_positive, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--answer-tokens", type=_positive, default=24, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--dram", default="1GiB", metavar="SIZE", help="memory tier (default: %(default)s)")
    parser.add_argument("--disk", default="2GiB", metavar="SIZE", help="disk tier (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where the disk tier lives (default: a temporary directory)"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tell the story. 0 when all answers were equal to the control's, else 1."""
    report = Report(Console(stderr=True, highlight=False))
    model = resolve(args.model, default_directory(), report)
    work = args.work or _scratch()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LMCacheError(f"--work {work}: {error.strerror}") from error
    options = DemoOptions(
        model=model,
        document=document_text(args.document),
        questions=tuple(args.question or QUESTIONS),
        tokens=-(-args.tokens // args.chunk_tokens) * args.chunk_tokens,
        work=work,
        chunk_tokens=args.chunk_tokens,
        answer_tokens=args.answer_tokens,
        dtype=args.dtype,
    )
    try:
        load(options.write_config(args.dram, args.disk), env={})  # a wrong size is told before a model is loaded
        result = ENGINES[args.engine](options, report)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if args.json:
        emit({**result.as_json(), "machine": describe_machine()})
    else:
        print(render(result, options))
    return OK if result.outputs_equal else PROBLEM


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _scratch() -> Path:
    """A new directory on a disk (temporary directories are often memory). What killed runs left there is removed."""
    home = default_directory().parent
    home.mkdir(parents=True, exist_ok=True)
    for litter in home.glob("demo-*-*"):
        if not Path("/proc", litter.name.split("-")[1]).exists():
            shutil.rmtree(litter, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"demo-{os.getpid()}-", dir=home))


def machine() -> str:
    """This machine in a few words, with the date."""
    about = describe_machine()
    return f"{about['cpu']}, {about['cores']} cores, {about['memory']}, load {about['load']}, {about['date']}"


def render(result: DemoResult, options: DemoOptions) -> str:
    """The result for people."""
    chunks = options.tokens // options.chunk_tokens
    recompute = result.ttft(RECOMPUTE)
    lines = [
        "",
        f"{result.model}, {result.dtype}, {result.engine} on {result.device}",
        machine(),
        f"a document of {options.tokens} tokens ({chunks} chunks), then one of {len(options.questions)} questions",
        "",
        f"  {'':28}{'time to first token':>20}{'speed-up':>12}{'KV ready after':>18}",
    ]
    for phase, title in _TITLES.items():
        ttft = result.ttft(phase)
        load_s = statistics.median(answer.load_s for answer in result.phases[phase])
        ready = f"{load_s * 1e3:>15.0f} ms" if load_s else ""
        lines.append(f"  {title:28}{ttft:>18.3f} s{recompute / ttft:>11.1f}x{ready}")
    lines += ["", "  (medians over the questions; the first token includes lookup, reads, checks and copies)", ""]
    lines.append("  where each chunk came from    █ DRAM   ▓ disk   ░ computed")
    for phase, title in _TITLES.items():
        for i, answer in enumerate(result.phases[phase]):
            lines.append(f"  {title if i == 0 else '':28}{picture(answer.sources)}  {runs(answer.sources)}")
    lines.append("")
    for i, question in enumerate(options.questions):
        same = all(result.phases[phase][i].tokens == result.control[i] for phase in (DRAM, DISK))
        lines.append(f"  {question}")
        lines.append(f"    {result.phases[DISK][i].text}  [{'equal in all runs' if same else 'DIFFERENT'}]")
    lines.append("")
    lines += [f"  {note}" for note in result.notes]
    lines += [
        f"  control: {result.control_is}",
        f"  answers equal to the control, token by token: {'yes' if result.outputs_equal else 'NO'}",
        f"  and to the full recompute: {'yes' if result.equal_to_recompute else 'no'}"
        + ("" if result.equal_to_recompute else " (near-ties of 16-bit arithmetic; see docs/demo.md)"),
    ]
    return "\n".join(lines)
