"""`lmcachectl engine-args ENGINE`: the exact flag or line that connects an engine."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from lmcache_core.cli.console import OK, add_json, emit
from lmcache_core.config import load
from lmcache_core.errors import ConfigError


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "engine-args",
        help="print the flag or line that connects an engine",
        description="Print the flags (vllm, sglang) or the lines (transformers) that connect an engine. "
        'Use it as: eval "vllm serve MODEL $(lmcachectl engine-args vllm --config FILE)"',
    )
    parser.add_argument("engine", choices=["vllm", "sglang", "transformers"])
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration (default: what the environment says)"
    )
    parser.add_argument(
        "--face",
        choices=list(VLLM_FACES),
        default="connector",
        help="vllm: as a KV connector (default), or within vLLM's own offloading as a secondary tier or a spec",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the arguments; a wrong configuration raises `ConfigError` before anything is printed."""
    config = None
    if args.engine != "vllm" and args.face != "connector":
        raise ConfigError("--face is for vllm")
    if args.config is not None:
        load(args.config)
        config = str(args.config.absolute())
    if args.engine == "vllm":
        transfer = VLLM_FACES[args.face](config)
        argv = ["--kv-transfer-config", json.dumps(transfer, separators=(",", ":"))]
        if args.json:
            emit({"ok": True, "engine": "vllm", "argv": argv, "kv_transfer_config": transfer})
        else:
            print(shlex.join(argv))
        return OK
    if args.engine == "sglang":
        extra = sglang_extra_config(config)
        argv = ["--page-size", "64", "--enable-hierarchical-cache", "--hicache-storage-backend", "dynamic"]
        argv += ["--hicache-storage-backend-extra-config", json.dumps(extra, separators=(",", ":"))]
        if args.json:
            emit({"ok": True, "engine": "sglang", "argv": argv, "extra_config": extra})
        else:
            print(shlex.join(argv))
        return OK
    arguments = f"model, {config!r}" if config else "model"
    code = f"from lmcache_core.adapters.transformers import attach; cache = attach({arguments})"
    if args.json:
        emit({"ok": True, "engine": "transformers", "code": code})
    else:
        print(code)
    return OK


def vllm_transfer_config(config: str | None) -> dict[str, Any]:
    """What vLLM's `--kv-transfer-config` must say. A failed load is recomputed, never an error of the request."""
    transfer: dict[str, Any] = {
        "kv_connector": "LMCacheCoreConnector",
        "kv_connector_module_path": "lmcache_core.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
    if config is not None:
        transfer["kv_connector_extra_config"] = {"config": config}
    return transfer


def vllm_secondary_tier(config: str | None) -> dict[str, Any]:
    """The same for our tier below vLLM's own CPU tier."""
    tier = {"type": "LMCacheCoreTier", "module_path": _OFFLOAD, **({} if config is None else {"config": config})}
    extra = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": CPU_BYTES,
        "block_size": 256,
        "secondary_tiers": [tier],
    }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def vllm_offloading_spec(config: str | None) -> dict[str, Any]:
    """The same for our pipeline in the place of vLLM's CPU tier."""
    extra = {"spec_name": "LMCacheCoreOffloadingSpec", "spec_module_path": _OFFLOAD}
    if config is not None:
        extra["config"] = config
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


_OFFLOAD = "lmcache_core.adapters.vllm_offload"
CPU_BYTES = 8 << 30
"""vLLM's CPU tier has no default size."""

VLLM_FACES = {
    "connector": vllm_transfer_config,
    "secondary-tier": vllm_secondary_tier,
    "offloading-spec": vllm_offloading_spec,
}
"""Ways into vLLM, by their names."""


def sglang_extra_config(config: str | None) -> dict[str, Any]:
    """What SGLang's `--hicache-storage-backend-extra-config` must say."""
    extra: dict[str, Any] = {
        "backend_name": "lmcache-core",
        "module_path": "lmcache_core.adapters.sglang",
        "class_name": "LMCacheCoreStorage",
        "interface_v1": 1,
    }
    if config is not None:
        extra["config"] = config
    return extra
