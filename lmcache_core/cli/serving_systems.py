"""The systems that `bench serving` compares: vLLM's OpenAI server with nothing, and with each connector."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmcache_core.cli.engine_args import vllm_transfer_config
from lmcache_core.cli.openai_server import STOP_S, Client, free_port, serving, vllm_environment
from lmcache_core.errors import LMCacheError

NAME = "bench"
NONE, OFFLOAD, LMCACHE, OURS = "none", "vllm-offload", "lmcache", "lmcache-core"
BLOCK_TOKENS = 128
"""vLLM's default on a CPU."""
_SHM = Path("/dev/shm")
_CAUSE = re.compile(r"^(?:\(.*?\] )?([\w.]*(?:Error|Exception): .+)$", re.M)
"""The end of a traceback, perhaps behind what vLLM's logger writes before each line."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all systems."""

    model: Path
    dtype: str
    longest: int
    """Tokens of the longest request."""
    kv_cache: int
    """Tokens that the engine's own KV cache holds."""
    store: int
    """Bytes of host memory that a connector may fill."""
    work: Path
    peer_python: Path


class Running:
    """A system that answers."""

    def __init__(self, url: str, groups: Sequence[int]) -> None:
        self._client = Client(url, NAME)
        self._groups = set(groups)

    def ask(self, prompt: Sequence[int], count: int) -> tuple[float, list[int]]:
        """Complete `prompt` with exactly `count` tokens."""
        ttft, tokens, _ = self._client.ask(prompt, count, ignore_eos=True)
        if len(tokens) != count:
            raise LMCacheError(f"the server answered with {len(tokens)} tokens instead of {count}")
        return ttft, tokens

    def cpu_s(self) -> float:
        """Processor seconds of its processes so far."""
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) in self._groups:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def start(name: str, setting: Setting) -> Iterator[Running]:
    """Run a system until the block ends. Raise `LMCacheError` where it does not start, saying why."""
    with ExitStack() as stack:
        environment = vllm_environment()
        groups: list[int] = []
        transfer = _TRANSFERS[name](setting, environment, groups, stack)
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(setting.model)]
        command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", setting.dtype]
        command += ["--max-model-len", str(setting.longest), "--enforce-eager", "--shutdown-timeout", str(int(STOP_S))]
        # vLLM keeps one block for itself.
        command += ["--block-size", str(BLOCK_TOKENS)]
        command += ["--num-gpu-blocks-override", str(setting.kv_cache // BLOCK_TOKENS + 1)]
        if transfer:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        url = f"http://127.0.0.1:{port}"
        log = setting.work / f"{name}.log"
        process = stack.enter_context(serving(f"vLLM with {name}", command, environment, log, f"{url}/health"))
        running = Running(url, [*groups, process.pid])
        running.ask(range(1000, 1064), 2)
        yield running


def why(name: str, setting: Setting, error: LMCacheError) -> str:
    """In one line why a system did not start: the first exception in its log, else what was raised here."""
    log = setting.work / f"{name}.log"
    found = _CAUSE.search(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else None
    return found[1] if found else str(error).splitlines()[0]


def _none(setting: Setting, environment: dict[str, str], groups: list[int], stack: ExitStack) -> Mapping[str, Any]:
    return {}


def _ours(setting: Setting, environment: dict[str, str], groups: list[int], stack: ExitStack) -> Mapping[str, Any]:
    config = setting.work / "lmcache.yaml"
    tiers = [{"name": "dram", "capacity": setting.store, "backend": {"type": "cpu"}}]
    config.write_text(yaml.safe_dump({"tiers": tiers}), encoding="utf-8")
    return vllm_transfer_config(str(config))


def _offload(setting: Setting, environment: dict[str, str], groups: list[int], stack: ExitStack) -> Mapping[str, Any]:
    """Stock where its copies run; on a CPU with copies of ours (`_vllm_cpu_offload`), since it would refuse."""
    extra = {
        "cpu_bytes_to_use": setting.store,
        "spec_name": "CopySpec",
        "spec_module_path": "lmcache_core.adapters._vllm_cpu_offload",
        "offload_prompt_only": False,
    }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def _lmcache(setting: Setting, environment: dict[str, str], groups: list[int], stack: ExitStack) -> Mapping[str, Any]:
    """Its server from its own environment, and its connector in vLLM's process: of its environment only what vLLM's
    lacks is put in front, so that all systems run the same vLLM, torch and transformers."""
    python = setting.peer_python
    if not python.is_file():
        raise LMCacheError(
            f"no LMCache environment at {python} (make bench-peer makes one; --peer-python names another)"
        )
    environment |= {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    overlay = setting.work / "lmcache"
    overlay.mkdir()
    place = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    here = Path(sysconfig.get_path("purelib"))
    for entry in Path(subprocess.run(place, capture_output=True, text=True, check=True).stdout.strip()).iterdir():
        wanted = entry.name.startswith("lmcache") or not entry.name.endswith((".dist-info", ".pth"))
        if wanted and not (here / entry.name).exists():
            (overlay / entry.name).symlink_to(entry)
    port, health = free_port(), free_port()
    command = [str(python), "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(health), "--disable-observability"]
    command += ["--l1-size-gb", f"{setting.store / (1 << 30):g}", "--eviction-policy", "LRU"]
    command += ["--supported-transfer-mode", "lmcache_driven"]
    stack.callback(_remove_leftovers, set(_SHM.glob("lmcache_*")))
    address = f"http://127.0.0.1:{health}/healthcheck"
    server = serving("LMCache's server", command, environment, setting.work / "lmcache-server.log", address)
    groups.append(stack.enter_context(server).pid)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(overlay), environment.get("PYTHONPATH")]))
    # Its server pulls pages out of shared memory. On a CPU hits are three times as fast so as with what `auto` takes.
    extra = {
        "lmcache.mp.host": "tcp://127.0.0.1",
        "lmcache.mp.port": port,
        "lmcache.mp.mp_transfer_mode": "lmcache_driven",
        "lmcache.mp.save_decode_cache": True,
    }
    return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def _remove_leftovers(before: set[Path]) -> None:
    """LMCache 0.5.6 leaves the engine's pages in shared memory behind, under the id of a process that has ended."""
    for file in set(_SHM.glob("lmcache_kv_*")) - before:
        if not Path("/proc", file.name.split("_")[2]).exists():
            file.unlink(missing_ok=True)


_TRANSFERS: Mapping[str, Callable[[Setting, dict[str, str], list[int], ExitStack], Mapping[str, Any]]] = {
    NONE: _none,
    OFFLOAD: _offload,
    LMCACHE: _lmcache,
    OURS: _ours,
}
