"""An engine's OpenAI server as a process: start it, wait for it, stream from it, end it and all it started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lmcache_core.errors import LMCacheError

START_S = 600.0
"""Longest time a server may take to answer; a first start may compile kernels."""
STOP_S = 60.0
"""Longest time a server may take to write down its cache and end."""


def vllm_environment() -> dict[str, str]:
    """For vLLM on a CPU: the same cores for every server, since by default it uses another number of them when there is
    a connector. What is set already wins."""
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


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def get(url: str) -> str:
    """Body of a GET request."""
    with urllib.request.urlopen(url, timeout=10) as response:
        body: str = response.read().decode()
    return body


@contextmanager
def serving(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, health: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; it answers at the URL `health` when the block begins.

    It leads a process group, which ends with it. Raise `LMCacheError` with the end of its log when it, or what the
    block does with it, fails.
    """
    from openai import OpenAIError

    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        _wait(process, health)
        yield process
    except (OSError, RuntimeError, OpenAIError) as error:
        raise LMCacheError(f"{name}: {error}\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}") from error
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], health: str) -> None:
    """Until the server answers. Raise `RuntimeError` when it ends first or takes too long."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        status = process.poll()
        if status is not None:
            raise RuntimeError(f"it ended with status {status} before it answered")
        try:
            get(health)
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"it did not answer within {START_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process of its group: first asked, then told, at once when interrupted again."""
    try:
        _ask_to_stop(process)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _ask_to_stop(process: subprocess.Popen[bytes]) -> None:
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


class Client:
    """Streams completions from the server at `url` and times them. May be used from several threads."""

    def __init__(self, url: str, model: str) -> None:
        from openai import OpenAI

        self._model = model
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=START_S, max_retries=0)

    def ask(self, prompt: Sequence[int], count: int, **extra: Any) -> tuple[float, list[int], str]:
        """Complete `prompt`, greedily: seconds until the first token, the ids of the new tokens (at most `count`), and
        their text. `extra` are fields of the request that the OpenAI API does not know."""
        tokens: list[int] = []
        text: list[str] = []
        first = 0.0
        begun = time.perf_counter()
        stream = self._client.completions.create(
            model=self._model,
            prompt=list(prompt),
            temperature=0.0,
            max_tokens=count,
            stream=True,
            extra_body={**extra, "return_token_ids": True},
        )
        for chunk in stream:
            for choice in chunk.choices:
                new = getattr(choice, "token_ids", None) or []
                if new and not first:
                    first = time.perf_counter()
                tokens += new
                text.append(choice.text)
        return first - begun, tokens, "".join(text)
