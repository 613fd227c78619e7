"""LMCache core for vLLM: an out-of-tree KV connector (`KVConnectorBase_V1`), loaded by module path.

    --kv-transfer-config '{"kv_connector": "LMCacheCoreConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "lmcache_core.adapters.vllm", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": "/etc/lmcache.yaml"}}'

vLLM makes one of these in the scheduler's process, which owns the pipeline and its threads, and one in each worker's,
which maps the same memory and copies. They share nothing but one `StepPlan` and one `StepReport` a step. An engine
whose KV cannot be stored safely runs as if there were no connector, and says why, once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import ValidationError
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from lmcache_core import config
from lmcache_core.adapters import _vllm_compat as compat
from lmcache_core.adapters._vllm_gpu import GpuWorker
from lmcache_core.adapters._vllm_params import TENANT
from lmcache_core.adapters._vllm_parts import Rank, assemble
from lmcache_core.adapters._vllm_scheduler import Request, Scheduler, Tables
from lmcache_core.adapters._vllm_telemetry import Events, Prom, Stats
from lmcache_core.adapters._vllm_wire import StepPlan, StepReport
from lmcache_core.adapters._vllm_worker import Group, Worker
from lmcache_core.build import build
from lmcache_core.errors import ConfigError, Problem, Unsupported
from lmcache_core.gpu import CudaError
from lmcache_core.identity import Identity
from lmcache_core.layout import KVLayout
from lmcache_core.pipeline import Pipeline
from lmcache_core.protocols import Frozen
from lmcache_core.redact import hide
from lmcache_core.units import format_bytes

logger = init_logger("vllm.lmcache_core")  # below vLLM's own, whose handlers and level apply

SHUTDOWN_S = 10.0
"""Longest time to write down what is still in memory only when the engine stops."""


class Settings(Frozen):
    """What `kv_connector_extra_config` may hold."""

    config: str | dict[str, Any] | None = None
    """The pipeline: path of a file, or the same as a mapping. Default: `LMCACHE_CONFIG_FILE`, `LMCACHE_*`, built-in."""
    load: Literal["auto", "sync", "async"] = "auto"
    """`sync`: within a request's first step, once its chunks are in memory. `async`: between steps, into blocks
    allocated ahead. `auto`: like `sync` for chunks in memory; chunks on storage are overlapped with waiting for blocks
    when vLLM may recompute a failed load (`kv_load_failure_policy`), else like `sync`, which cannot fail a request."""
    layerwise: bool = False
    """Copy layer by layer on a thread of its own while other layers compute. See docs/vllm.md for when that pays."""
    save_decode: bool = True
    """Whether generated tokens are saved too, not only prompts."""
    weights: str = ""
    """Name of the weights, in place of their fingerprint, for models without files on this machine."""


class StepMetadata(KVConnectorMetadata):
    """A `StepPlan` on its way to the worker."""

    def __init__(self, plan: StepPlan | None) -> None:
        self.plan = plan


class ReportMetadata(KVConnectorWorkerMetadata):
    """`StepReport`s on their way to the scheduler, by step."""

    def __init__(self, reports: Iterable[StepReport]) -> None:
        self.reports: dict[int, StepReport] = {}
        for report in reports:
            known = self.reports.get(report.step)
            self.reports[report.step] = report if known is None else known.merge(report)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ReportMetadata:
        if not isinstance(other, ReportMetadata):
            raise TypeError(f"expected ReportMetadata, got {type(other).__name__}")
        return ReportMetadata([*self.reports.values(), *other.reports.values()])


@dataclass
class PagesMetadata(KVConnectorHandshakeMetadata):
    """What a worker found its pages to be: a layout of one block for each KV group, or why there is none."""

    layouts: list[KVLayout]
    refusal: str = ""
    on_gpu: bool = False


class LMCacheCoreConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector vLLM loads, in both of its roles."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        compat.check_api()
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = _settings(self._kv_transfer_config.kv_connector_extra_config)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._pages = PagesMetadata([], "the engine registered no KV memory")
        self._events: Events | None = None
        self._on_gpu = False
        self._counted: dict[str, int] = {}
        if role is KVConnectorRole.SCHEDULER:
            # Mistakes in the configuration stop the engine now, before it has loaded anything.
            self._config = config.load(self._settings.config).config

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache may forget: a preempted request need not be recomputed for our sake."""
        return False

    # -- worker: pages ---------------------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Describe the engine's pages, and prove on them that the description copies what it says."""
        try:
            groups = compat.describe_pages(self._vllm_config, self._kv_cache_config, kv_caches)
            if groups[0].device is None:
                compat.use_huge_pages(kv_caches.values())
            for pages in groups:
                compat.prove_copies(pages)
            bound = [Group(pages.layout, pages.names, partial(compat.paged_kv, pages)) for pages in groups]
            device, by_layer = groups[0].device, self._settings.layerwise
            if device is None:
                self._worker = Worker(compat.rank(), bound, by_layer=by_layer)
            else:
                compute = partial(compat.compute_stream, device)
                self._worker = GpuWorker(compat.rank(), bound, device=device, compute=compute, by_layer=by_layer)
        except (Unsupported, CudaError) as error:
            self._pages = PagesMetadata([], str(error))
            return
        self._pages = PagesMetadata([pages.layout for pages in groups], on_gpu=device is not None)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """The layout of this worker's pages, for the scheduler."""
        return self._pages

    # -- worker: a step --------------------------------------------------------------------------------------
    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The engine is about to compute, whether or not it loads anything first."""
        super().bind_connector_metadata(connector_metadata)
        if isinstance(self._worker, GpuWorker) and (plan := self._plan()) is not None:
            self._worker.begin(plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy every chunk of this step's plan into its blocks."""
        if self._worker is not None and (plan := self._plan()) is not None:
            self._worker.load(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait for the copies of this layer, where layers are copied one by one."""
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Start to copy this layer, where layers are copied one by one."""
        if self._settings.layerwise and self._worker is not None and (plan := self._plan()) is not None:
            self._worker.save_layer(plan, layer_name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of the whole model would not announce its layers."""
        return bool(extra_config.get("layerwise"))

    def wait_for_save(self) -> None:
        """Copy the chunks this step completed out of their blocks, before anything can overwrite them."""
        if self._worker is not None and (plan := self._plan()) is not None:
            self._worker.save(plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Nothing is sent later; requests whose asynchronous load ended in this step."""
        return None, (self._worker.received() if self._worker is not None else None)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of this step's loads that hold nothing."""
        return self._worker.failed() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Tell the scheduler what was copied."""
        reports: list[StepReport] = []
        while self._worker is not None and (report := self._worker.report()) is not None:
            reports.append(report)
        return ReportMetadata(reports) if reports else None

    def _plan(self) -> StepPlan | None:
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, StepMetadata):
            raise TypeError(f"expected StepMetadata, got {type(metadata).__name__}")
        return metadata.plan

    # -- scheduler: start ------------------------------------------------------------------------------------
    def set_xfer_handshake_metadata(self, metadata: Mapping[int, KVConnectorHandshakeMetadata]) -> None:
        """The same for engines without pipeline ranks."""
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): pages for rank, pages in metadata.items()})

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Rank, KVConnectorHandshakeMetadata]) -> None:
        """Build the pipeline for the pages the workers found, or say why there is no caching."""
        try:
            self._scheduler = self._start(metadata)
        except Unsupported as error:
            logger.warning("lmcache-core: caching is off: %s", error)

    def _start(self, found: Mapping[Rank, KVConnectorHandshakeMetadata]) -> Scheduler:
        parallel = self._vllm_config.parallel_config
        workers: dict[Rank, Sequence[KVLayout]] = {}
        self._on_gpu = any(getattr(pages, "on_gpu", False) for pages in found.values())
        for rank, pages in found.items():
            if not isinstance(pages, PagesMetadata):
                raise Unsupported(f"worker {rank} is of another connector: {type(pages).__name__}")
            if not pages.layouts:
                raise Unsupported(pages.refusal)
            workers[rank] = pages.layouts
        if len(workers) != parallel.world_size:
            raise Unsupported(f"{len(workers)} of {parallel.world_size} workers described their pages")
        settings = self._settings
        chunk, block = self._config.chunk_tokens, workers[0, 0][0].block_tokens
        compat.blocks_in_chunk(chunk, block)
        compat.refuse_chunk(self._kv_cache_config, chunk)
        layout, parts = assemble(workers, chunk)
        groups = len(workers[0, 0])
        if groups > 1 and settings.load == "async":
            raise Unsupported("load: async with several KV cache groups: a failed read could not be told to vLLM")
        base = compat.model_identity(self._vllm_config, layout, settings.weights)
        pipeline = build(self._config, layout, shared=True)
        if pipeline.slots.region.share is None:
            pipeline.close()
            raise ConfigError(f"tier {pipeline.memory_name}: vLLM's worker cannot map such memory; use type: cpu")
        recompute = self._kv_transfer_config.kv_load_failure_policy == "recompute"
        sizes = {"tp_size": parallel.tensor_parallel_size, "pp_size": parallel.pipeline_parallel_size}
        base = replace(base, fidelity=pipeline.fidelity, **sizes)
        self._identities = _Identities(base, pipeline, named=compat.names_inputs(self._vllm_config))
        told = self._vllm_config.kv_events_config
        if told is not None and told.enable_kv_cache_events:
            hashed = getattr(self._kv_cache_config, "hash_block_size", None) or block
            if groups == 1 and hashed == block:
                self._events = Events(pipeline, block)
            else:
                logger.warning("lmcache-core: no KV events: %d KV groups, blocks hashed by %d tokens", groups, hashed)
        scheduler = Scheduler(
            pipeline,
            self._identities.admit,
            asynchronous=settings.load == "async",
            overlap=settings.load == "auto" and recompute and groups == 1,
            save_decode=settings.save_decode,
            parts=parts,
            extra=compat.multimodal,
            arrived=None if self._events is None else self._events.arrived,
        )
        self._announce(pipeline, base)
        return scheduler

    def _announce(self, pipeline: Pipeline, identity: Identity) -> None:
        """Say once what is cached where, and what in vLLM's settings can lose it."""
        policy = self._kv_transfer_config.kv_load_failure_policy
        if self._settings.load == "async" and policy != "recompute":
            logger.warning(
                "lmcache-core: load=async with kv_load_failure_policy=%s: a failed read fails its request; "
                "set kv_load_failure_policy to recompute",
                policy,
            )
        late = [tier.name for tier in pipeline.tiers if tier.write_mode == "back"]
        if late and self._vllm_config.shutdown_timeout < SHUTDOWN_S:
            logger.warning(
                "lmcache-core: vLLM kills its engine %s s after it was asked to end; what tier %s has not got by then "
                "is lost. Start vLLM with --shutdown-timeout 30, or use write: through",
                self._vllm_config.shutdown_timeout,
                ", ".join(late),
            )
        layout, slots = pipeline.layout, pipeline.slots
        tiers = [f"{pipeline.memory_name} {slots.count} chunks, {slots.count * layout.chunk_tokens} tokens"]
        for tier in pipeline.tiers:
            room = "no limit" if tier.capacity is None else format_bytes(tier.capacity)
            tiers.append(f"{tier.name} {room} (write {tier.write_mode})")
        logger.info(
            "lmcache-core: caching KV of %s (weights %.12s, %s) in chunks of %d tokens, %s each: %s",
            identity.model,
            identity.weights,
            layout.packing,
            layout.chunk_tokens,
            format_bytes(layout.chunk_bytes),
            "; ".join(tiers),
        )

    # -- scheduler: a request --------------------------------------------------------------------------------
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond the engine's own that the pipeline holds; None while they are being read."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.match(request, num_computed_tokens, read=not request.skip_reading_prefix_cache)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which blocks the promised tokens go to."""
        if self._scheduler is not None:
            self._scheduler.allocated(request.request_id, blocks.get_block_ids, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Which tiers the tokens came from, for vLLM's metrics."""
        if self._scheduler is None:
            return {}
        by_tier = self._scheduler.sources(request.request_id, num_external_tokens)
        if not by_tier:
            found: dict[Any, int] = super().get_external_cache_hit_sources(request, num_external_tokens)
            return found
        return compat.hit_sources(by_tier, self._scheduler.pipeline.memory_name)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Let go of the request, and answer it. Its blocks may be freed: whoever writes them next waits for copies that
        still read them (`StepPlan.after`)."""
        return False, None if self._scheduler is None else self._scheduler.finished(request.request_id)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same for engines with several KV groups."""
        return self.request_finished(request, [])

    # -- scheduler: a step -----------------------------------------------------------------------------------
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The worker's part of this step."""
        if self._scheduler is None:
            return StepMetadata(None)
        block = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        written = partial(compat.blocks_written, scheduler_output, block) if self._on_gpu else None
        if written is not None and (copies := scheduler_output.kv_cache_block_copies):
            self._scheduler.overwritten(copy.dst_block_id for copy in copies)
        plan = self._scheduler.plan(scheduler_output.num_scheduled_tokens, _tables(scheduler_output), written)
        return StepMetadata(None if plan.empty else plan)

    def has_pending_push_work(self) -> bool:
        """Copies that a GPU still makes are asked about in the engine's next step, so there must be one."""
        return self._on_gpu and self._scheduler is not None and self._scheduler.under_way

    def update_connector_output(self, connector_output: Any) -> None:
        """What the worker has done: release what was loaded, publish what was saved."""
        metadata = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(metadata, ReportMetadata):
            for step in sorted(metadata.reports):
                self._scheduler.done(metadata.reports[step])

    # -- scheduler: what others hear -------------------------------------------------------------------------
    def take_events(self) -> Iterable[Any]:
        """KV events of the memory tier since the last step."""
        return () if self._events is None else self._events.take()

    def get_kv_connector_stats(self) -> Stats | None:
        """What the counters grew by since the last step; nothing in a worker."""
        if self._scheduler is None:
            return None
        before, self._counted = self._counted, {**self._scheduler.counts, **self._scheduler.pipeline.counts}
        return Stats.between(before, self._counted)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        """The same, from its plain data."""
        return Stats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[Any]]
    ) -> Prom:
        """The counters for Prometheus."""
        return Prom(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- life ------------------------------------------------------------------------------------------------
    def reset_cache(self) -> bool | None:
        """Forget every chunk. What is computed from now on is kept apart from what was stored before: a reset follows a
        change of the weights that no fingerprint of files shows, so it is not found by other processes either."""
        if self._scheduler is None:
            return None
        self._identities.new_epoch()
        if self._events is not None:
            self._events.cleared()
        return self._scheduler.clear()

    def shutdown(self) -> None:
        """Write down what must be kept, then close."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close(SHUTDOWN_S)
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def _tables(scheduler_output: Any) -> Callable[[str], Tables | None]:
    """Block tables of the requests scheduled in this step."""
    state = scheduler_output.kv_connector_block_state

    def tables(request_id: str) -> Tables | None:
        found: Tables | None = None if state is None else state.get_block_ids(request_id)
        return found

    return tables


class _Identities:
    """Identity of each request: the model's, with its adapter and its tenant."""

    def __init__(self, base: Identity, pipeline: Pipeline, *, named: bool) -> None:
        self._base = base
        self._named = named
        self._pipeline = pipeline
        self._adapters = compat.Adapters()

    def admit(self, request: Request) -> Identity | str:
        """The identity, or why the request takes no part."""
        reason = compat.refuse_request(request, named=self._named)
        if reason:
            return reason
        try:
            lora = self._adapters.describe(request.lora_request)  # type: ignore[attr-defined]
        except Unsupported as error:
            logger.warning_once("lmcache-core: requests with this adapter are not cached: %s", error)
            return "lora"
        identity = self._base.with_request(lora=lora, salt=request.cache_salt)  # type: ignore[attr-defined]
        tenant = (getattr(request, "kv_transfer_params", None) or {}).get(TENANT)
        return self._pipeline.tenant_identity(identity, tenant if isinstance(tenant, str) else None) or "tenant"

    def new_epoch(self) -> None:
        """Keep apart what is stored from now on."""
        revision = self._base.revision.partition("#")[0]
        self._base = replace(self._base, revision=f"{revision}#{uuid.uuid4().hex}")


def _settings(extra: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(dict(extra))
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    where="kv_connector_extra_config",
                    path=".".join(str(part) for part in problem["loc"]),
                    what=f"{problem['msg']}: {hide(problem['input'], str(problem['loc'][-1]))!r}",
                    fix=f"known settings: {', '.join(Settings.model_fields)}",
                )
                for problem in error.errors()
            ]
        ) from None
