"""What depends on the version of vLLM's own offloading framework (`vllm/v1/kv_offload`), in one place.

Checked against vLLM 0.32. The framework is experimental: what it looked like before has other classes and other calls.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import vllm
from pydantic import ValidationError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowSpec

from lmcache_core.adapters import _vllm_compat as compat
from lmcache_core.adapters._vllm_telemetry import COUNTERS, Stats
from lmcache_core.errors import ConfigError, Problem, Unsupported
from lmcache_core.identity import Identity
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import Frozen
from lmcache_core.redact import hide

TESTED = "0.32"

ROW_FORMAT = 1
"""Version of the `packing` string this module writes. Raise it when the string's meaning changes."""


def unknown(wrong: list[str]) -> Unsupported:
    """The error for a framework that is not the one known here."""
    return Unsupported(
        f"vLLM {vllm.__version__} has an offloading framework that this lmcache-core does not know (tested with "
        f"{TESTED}):\n  "
        + "\n  ".join(wrong)
        + f"\nUse vLLM {TESTED}, or the KV connector, which works with {compat.TESTED}: "
        "`lmcachectl engine-args vllm` prints its --kv-transfer-config."
    )


try:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.v1.kv_offload.base import (
        CanonicalKVCaches,
        GPULoadStoreSpec,
        LoadStoreSpec,
        Locality,
        LookupResult,
        Medium,
        OffloadingCounterMetadata,
        OffloadingEvent,
        OffloadingManager,
        OffloadingSpec,
        OffloadingWorker,
        OffloadKey,
        PrepareStoreOutput,
        ReqContext,
        RequestOffloadingContext,
        TransferResult,
        get_offload_group_idx,
    )
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError as error:  # 0.30 and 0.31
    raise unknown([str(error)]) from error

__all__ = [
    "ROW_FORMAT",
    "SPEC_KEYS",
    "TESTED",
    "CacheHitSource",
    "CanonicalKVCaches",
    "Counted",
    "GPULoadStoreSpec",
    "JobResult",
    "LoadStoreSpec",
    "Locality",
    "LookupResult",
    "Medium",
    "OffloadKey",
    "OffloadingEvent",
    "OffloadingManager",
    "OffloadingSpec",
    "OffloadingWorker",
    "PrepareStoreOutput",
    "ReqContext",
    "RequestOffloadingContext",
    "SecondaryTierManager",
    "Settings",
    "TransferJob",
    "TransferResult",
    "check_api",
    "differences",
    "engine_of",
    "get_offload_group_idx",
    "identity",
    "logger",
    "metric_definitions",
    "row_layout",
    "settings_of",
    "windows",
]

logger = init_logger("vllm.lmcache_core")  # below vLLM's own, whose handlers and level apply

_METHODS: dict[type, dict[str, tuple[str, ...]]] = {
    SecondaryTierManager: {
        "__init__": ("offloading_spec", "primary_kv_view", "tier_type", "backpressure_detector"),
        "lookup": ("key", "req_context"),
        "submit_store": ("job_metadata",),
        "submit_load": ("job_metadata",),
        "get_finished_jobs": (),
        "on_new_request": ("req_context",),
        "on_request_finished": ("req_context",),
        "on_schedule_end": ("context",),
        "touch": ("keys", "req_context"),
        "drain_jobs": (),
        "get_stats": (),
        "shutdown": (),
    },
    OffloadingManager: {
        "lookup": ("key", "req_context"),
        "get_load_source": ("key", "req_context"),
        "prepare_load": ("keys", "req_context"),
        "complete_load": ("keys", "req_context"),
        "prepare_store": ("keys", "req_context"),
        "complete_store": ("keys", "req_context", "success"),
        "on_new_request": ("req_context",),
        "on_request_finished": ("req_context",),
        "on_schedule_end": ("context",),
        "touch": ("keys", "req_context"),
        "reset_cache": (),
        "get_stats": (),
        "shutdown": (),
    },
    OffloadingWorker: {
        "submit_store": ("job_id", "src_spec", "dst_spec"),
        "submit_load": ("job_id", "src_spec", "dst_spec"),
        "get_finished": (),
        "wait": ("job_ids",),
        "shutdown": (),
    },
    OffloadingSpec: {"__init__": ("config",), "get_manager": (), "get_worker": ("kv_caches",)},
}
"""Methods that we override, with their parameters."""

_FIELDS: dict[type, tuple[str, ...]] = {
    TransferJob: ("job_id", "keys", "chunk_ids", "is_promotion", "req_context"),
    JobResult: ("job_id", "success", "successful_keys", "transfer_time", "transfer_bytes"),
    TransferResult: ("job_id", "success", "transfer_size", "transfer_time"),
    PrepareStoreOutput: ("keys_to_store", "store_spec", "evicted_keys"),
    ReqContext: ("req_id",),
    CanonicalKVCaches: ("tensors", "group_data_refs"),
    OffloadingConfig: (
        *("groups", "worker_kv_bytes_per_block", "extra_config", "engine_id", "cache", "parallel"),
        *("replicated_layout", "canonical_layout", "kv_cache_layout"),
    ),
}


def differences() -> list[str]:
    """What of the installed framework is not as we know it."""
    wrong: list[str] = []
    for kind, methods in _METHODS.items():
        for name, expected in methods.items():
            found = [p for p in inspect.signature(getattr(kind, name, lambda: None)).parameters if p != "self"]
            if tuple(found) != expected:
                wrong.append(f"{kind.__name__}.{name} takes ({', '.join(found)}), expected ({', '.join(expected)})")
        abstract: frozenset[str] = getattr(kind, "__abstractmethods__", frozenset())
        wrong += [f"{kind.__name__}.{name} is a new abstract method" for name in abstract - methods.keys()]
    for kind, names in _FIELDS.items():
        fields = inspect.signature(kind).parameters
        wrong += [f"{kind.__name__}.{name} is missing" for name in names if name not in fields]
    return wrong


def check_api() -> None:
    """Raise `Unsupported` with everything that differs when the installed framework is not the one known here."""
    wrong = differences()
    if wrong:
        raise unknown(wrong)


# -- settings --------------------------------------------------------------------------------------------------
class Settings(Frozen):
    """What users say to us, beside vLLM's own keys."""

    config: str | dict[str, Any] | None = None
    """The pipeline: path of a file, or the same as a mapping. Default: `LMCACHE_CONFIG_FILE`, `LMCACHE_*`, built-in."""
    weights: str = ""
    """Name of the weights, in place of their fingerprint, for models without files on this machine."""
    tenant: str | None = None
    """Whose engine this is, where the configuration has `tenancy`: the framework does not tell us a request's."""


SPEC_KEYS = {"spec_name", "spec_module_path", "offload_prompt_only", "self_describing_kv_events"}
"""Keys of `kv_connector_extra_config` that are vLLM's own and that an `OffloadingSpec` may be used with."""


def settings_of(given: Mapping[str, Any], where: str) -> Settings:
    """Our settings. Raise `ConfigError` with every mistake."""
    try:
        return Settings.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    where=where,
                    path=".".join(str(part) for part in problem["loc"]),
                    what=f"{problem['msg']}: {hide(problem['input'], str(problem['loc'][-1]))!r}",
                    fix=f"known settings: {', '.join(Settings.model_fields)}; "
                    "the size of a chunk is `chunk_tokens` of the configuration"
                    if where == "kv_connector_extra_config"
                    else f"known settings: {', '.join(Settings.model_fields)}",
                )
                for problem in error.errors()
            ]
        ) from None


# -- identity --------------------------------------------------------------------------------------------------
def engine_of(config: OffloadingConfig) -> tuple[Any, Any]:
    """vLLM's `vllm_config` and `kv_cache_config` of the engine that is making us.

    The framework hands on an extract without the revision, the quantisation, adapters, overrides of the model's
    configuration, ..., and the KV of two engines that differ in any of them must not be mixed up. So it is taken from
    the connector up the stack. Raise `Unsupported` when there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is OffloadingConnector.__init__.__code__:
            vllm_config, kv_cache_config = frame.f_locals["vllm_config"], frame.f_locals["kv_cache_config"]
            if vllm_config.kv_transfer_config.engine_id == config.engine_id:
                return vllm_config, kv_cache_config
        frame = frame.f_back  # type: ignore[assignment]
    raise Unsupported("it was not made by vLLM's OffloadingConnector, so that it cannot know whose KV this is")


def windows(config: OffloadingConfig, kv_cache_config: Any) -> frozenset[int]:
    """KV groups of layers with a window."""
    groups = kv_cache_config.kv_cache_groups
    return frozenset(
        group.group_id for group in config.groups if isinstance(groups[group.group_id].kv_cache_spec, SlidingWindowSpec)
    )


def row_layout(
    config: OffloadingConfig, vllm_config: Any, kv_cache_config: Any, face: str, row_bytes: int, blocks: int
) -> KVLayout:
    """Layout of what `face` stores: rows of `blocks` blocks of every worker, as vLLM copies them out of its pages.

    Raise `Unsupported` for KV that vLLM's block hashes and this layout do not tell apart.
    """
    compat.refuse_engine(vllm_config, kv_cache_config)
    if vllm_config.lora_config is not None:
        raise Unsupported("with --enable-lora blocks are named by the name of an adapter, not by what is in it")
    if not compat.names_inputs(vllm_config):
        raise Unsupported(
            "with --mm-processor-cache-gb 0 and --no-enable-prefix-caching images are named by a number, not by their "
            "content: leave out one of them"
        )
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if not algorithm.startswith("sha256"):
        raise Unsupported(f"--prefix-caching-hash-algo {algorithm}: its hashes are random or can be forged")
    specs = [kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec for group in config.groups]
    if blocks > 1 and any(isinstance(spec, SlidingWindowSpec) for spec in specs):
        raise Unsupported(
            "layers with a sliding window give up single blocks of a chunk: leave out `block_size` and "
            "`blocks_per_chunk`, or start vLLM with --disable-hybrid-kv-cache-manager"
        )
    facts = {
        "groups": [
            [type(spec).__name__, repr(spec), len(g.layer_names)] for spec, g in zip(specs, config.groups, strict=True)
        ],
        "pages": [_page_format(vllm_config, spec) for spec in specs],
        "blocks": blocks,
        "workers": config.parallel.world_size,
        "replicated": config.replicated_layout,
        "canonical": config.canonical_layout,
    }
    tokens = config.groups[0].tokens_per_block * blocks
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return KVLayout(
        order="pages",
        dtype="uint8",
        num_layers=1,
        planes=1,
        kv_heads=1,
        head_dim=1,
        chunk_tokens=tokens,
        block_tokens=tokens,
        packing=f"vllm-{face}/{ROW_FORMAT}/{config.kv_cache_layout}/{mark}",
        page_bytes=row_bytes,
    )


def _page_format(vllm_config: Any, spec: Any) -> str:
    """What is inside a page. The layers know it, but they are in the workers: found out here as they do."""
    if not current_platform.is_cpu():
        chosen = vllm_config.attention_config.backend
        return f"{current_platform.device_type}/{current_platform.get_device_name()}/{chosen}"
    if isinstance(spec, MLAAttentionSpec):
        return "cpu/mla"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    isa = _get_attn_isa(model.dtype, spec.block_size, spec.head_size, cache.cache_dtype)
    return compat.cpu_page_format(vllm_config, isa, spec, spec.dtype)


def identity(vllm_config: Any, layout: KVLayout, weights: str) -> Identity:
    """Identity of every row of this engine. A row holds the parts of all ranks."""
    parallel = vllm_config.parallel_config
    base = compat.model_identity(vllm_config, layout, weights)
    return replace(base, tp_size=parallel.tensor_parallel_size, pp_size=parallel.pipeline_parallel_size)


# -- metrics ---------------------------------------------------------------------------------------------------
_LABELLED = {name: row for name, row in COUNTERS.items() if name in ("hit", "miss", "drop")}


def metric_definitions() -> dict[str, Any]:
    """Our counters, for vLLM's metrics."""
    return {
        metric: OffloadingCounterMetadata(documentation=text, labelnames=(label,))
        for metric, text, label in _LABELLED.values()
    }


class Counted:
    """What a pipeline's counters grew by since the last time."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts
        self._before: dict[str, int] = {}

    def take(self) -> OffloadingConnectorStats | None:
        """The increments for vLLM; None when nothing grew."""
        before, self._before = self._before, dict(self._counts)
        grown = Stats.between(before, self._before)
        if grown.is_empty():
            return None
        stats = OffloadingConnectorStats()
        for name, count in grown.data.items():
            counter, _, detail = name.partition(".")
            if counter in _LABELLED:
                stats.increase_counter(_LABELLED[counter][0], count, (detail,))
        return stats
