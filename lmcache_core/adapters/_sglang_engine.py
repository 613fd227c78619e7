"""What depends on SGLang's version: its storage interface, and the facts about the engine that make an identity.

Checked against SGLang 0.5.23 (`sglang/srt/mem_cache/hicache_storage.py`, `sglang/srt/runtime_context.py`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sglang
from pydantic import Field, ValidationError
from sglang.srt import runtime_context

from lmcache_core import config
from lmcache_core.adapters._page_store import Pages
from lmcache_core.adapters._weights import fingerprint
from lmcache_core.config import PipelineConfig
from lmcache_core.errors import ConfigError, Problem, Unsupported
from lmcache_core.identity import Identity
from lmcache_core.protocols import Frozen
from lmcache_core.redact import hide

TESTED = "0.5.23"

STORAGE_API: dict[str, tuple[str, ...]] = {
    "register_mem_pool_host": ("mem_pool_host",),
    "register_mem_host_pool_v2": ("host_pool", "host_pool_name"),
    "on_host_pools_registered": (),
    "batch_exists_v2": ("keys", "pool_transfers", "extra_info"),
    "batch_get_v2": ("transfers", "extra_info"),
    "batch_set_v2": ("transfers", "extra_info"),
    "batch_get_v1": ("keys", "host_indices", "extra_info"),
    "batch_set_v1": ("keys", "host_indices", "extra_info"),
    "get": ("key", "target_location", "target_sizes"),
    "batch_get": ("keys", "target_locations", "target_sizes"),
    "set": ("key", "value", "target_location", "target_sizes"),
    "batch_set": ("keys", "values", "target_locations", "target_sizes"),
    "exists": ("key",),
    "batch_exists": ("keys", "extra_info"),
    "clear": (),
    "get_stats": (),
}
"""Methods of `HiCacheStorage` with their parameters."""

LINKER_API: dict[str, tuple[str, ...]] = {
    "lookup": ("rid", "transfers"),
    "load": ("rid", "transfers"),
    "start_layer_wise_loading": (),
    "finish_layer_wise_loading": ("counter_index",),
    "cancel_queued_load": ("rid",),
    "offload": ("transfers", "session_id"),
    "num_completed_offloads": (),
    "pop_completed_offload": (),
    "reset": (),
    "close": (),
}
"""Methods of `UnifiedCacheLinker` with their parameters."""

NUMERICS = (
    "device", "dtype", "quantization", "quantization_param_path", "kv_cache_dtype", "attention_backend",
    "prefill_attention_backend", "decode_attention_backend", "json_model_override_args", "context_length", "model_impl",
    "load_format", "enable_tf32_matmul", "enable_deterministic_inference", "rl_on_policy_target",
    "speculative_algorithm", "speculative_draft_model_path", "speculative_draft_model_revision",
)  # fmt: skip
"""Settings of the engine that may change the bytes of its KV."""


class Settings(Frozen):
    """What `--hicache-storage-backend-extra-config` may hold of ours."""

    config: str | dict[str, Any] | None = None
    """The pipeline: path of a file, or the same as a mapping. Default: `LMCACHE_CONFIG_FILE`, `LMCACHE_*`, built-in.
    `{rank}` in a path is this rank's place, such as `tp0-pp0`: every rank has a pipeline of its own."""
    pools: dict[str, str | dict[str, Any]] = Field(default_factory=dict)
    """The same for other pools of a hybrid model by their names (`mamba`, `swa`, `indexer`, `draft`): each has pages of
    its own size, so that each has a pipeline of its own."""
    weights: str = ""
    """Name of the weights, in place of their fingerprint, for models without files on this machine."""
    salt: str | None = None
    """Keeps what this engine stores apart from engines with another salt, beside the `cache_salt` of requests."""
    tenant: str | None = None
    """Whose engine this is, where the configuration has `tenancy`."""


def settings_of(extra: Mapping[str, Any], *, ours: tuple[str, ...]) -> Settings:
    """Our settings out of an engine's mapping, in which `ours` are not for us. Raise `ConfigError`."""
    try:
        return Settings.model_validate({name: value for name, value in extra.items() if name not in ours})
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    where="extra config",
                    path=".".join(str(part) for part in problem["loc"]),
                    what=f"{problem['msg']}: {hide(problem['input'], str(problem['loc'][-1]))!r}",
                    fix=f"known settings: {', '.join(Settings.model_fields)}",
                )
                for problem in error.errors()
            ]
        ) from None


def load_config(source: str | dict[str, Any] | None, ranks: Ranks) -> PipelineConfig:
    """The pipeline of one rank. Raise `ConfigError`."""
    if isinstance(source, str):
        source = source.replace("{rank}", f"tp{ranks.tp_rank}-pp{ranks.pp_rank}")
    return config.load(source).config


class Ranks(Frozen):
    """The place of this process among those of one engine."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    replicated: bool = False
    """All tensor parallel ranks hold the same KV (MLA)."""


def check_api(base: type, api: Mapping[str, tuple[str, ...]]) -> None:
    """Raise `Unsupported` with everything that differs when `base` is not the interface known here."""
    wrong: list[str] = []
    for name, expected in api.items():
        method = getattr(base, name, None)
        if method is None:
            wrong.append(f"{base.__name__}.{name} is missing")
        elif (found := tuple(inspect.signature(method).parameters)[1:]) != expected:
            wrong.append(f"{base.__name__}.{name} takes ({', '.join(found)}), expected ({', '.join(expected)})")
    abstract: frozenset[str] = getattr(base, "__abstractmethods__", frozenset())
    wrong += [f"{base.__name__}.{name} is a new abstract method" for name in sorted(abstract - api.keys())]
    if wrong:
        raise Unsupported(
            f"SGLang {sglang.__version__} has an interface that this lmcache-core does not know "
            f"(tested with {TESTED}):\n  " + "\n  ".join(wrong) + f"\nUse SGLang {TESTED}, or a newer lmcache-core."
        )


def model_mark() -> tuple[str, str]:
    """What tells weights apart that were replaced while the engine runs: their path and their version."""
    leaf = runtime_context.get_context().config_leaf
    return str(leaf("model_path")), str(leaf("weight_version"))


def model_identity(pages: Pages, pool: str, ranks: Ranks, settings: Settings) -> Identity:
    """Identity of every page of a pool of this engine. Raise `Unsupported` when the weights cannot be named."""
    leaf = runtime_context.get_context().config_leaf
    try:
        engine: dict[str, Any] = {name: leaf(name) for name in NUMERICS}
        path, version = model_mark()
        revision, model, seed = leaf("revision"), leaf("served_model_name"), leaf("random_seed")
        adapters = (leaf("lora_paths") or ()) if leaf("enable_lora") else ()
    except (AttributeError, ValueError) as error:
        raise Unsupported(f"SGLang {sglang.__version__} does not tell what it runs with ({error})") from error
    engine |= {"sglang": sglang.__version__, "pool": pool, "cp": [ranks.cp_rank, ranks.cp_size]}
    if settings.weights:
        weights = settings.weights
    elif engine["load_format"] == "dummy":
        text = Path(path, "config.json").read_text()
        weights = hashlib.sha256(_json(("dummy", seed, text)).encode()).hexdigest()
    else:
        weights = fingerprint(path, revision, 'name them yourself with "weights": "<a string that changes with them>"')
    return Identity(
        model=str(model or path),
        weights=weights,
        layout=pages.layout,
        revision=f"{revision or ''}@{version}",
        # SGLang's page hash has the name of a request's adapter in it; what the names stand for is said here.
        lora=_json(sorted((_adapter(adapter)) for adapter in adapters)) if adapters else "",
        tp_rank=0 if ranks.replicated and pool != "mamba" else ranks.tp_rank,
        tp_size=ranks.tp_size,
        pp_rank=ranks.pp_rank,
        pp_size=ranks.pp_size,
        engine=_json(engine),
        salt=settings.salt,
    )


def _adapter(adapter: Any) -> tuple[str, str]:
    return adapter.lora_name, fingerprint(adapter.lora_path, None, "give the adapter as a directory")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
