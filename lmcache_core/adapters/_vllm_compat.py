"""Everything that depends on vLLM's version, in one place: its API, its page formats, its requests and its models.

Checked against vLLM 0.30, 0.31 and 0.32 (`vllm/distributed/kv_transfer/kv_connector/v1/base.py` and what calls it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import vllm
from vllm import _custom_ops as cpu_ops
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, model_parallel_is_initialized
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from lmcache_core import _cuda, canonical
from lmcache_core.adapters._weights import fingerprint
from lmcache_core.copies import Dim, PagedKV, PageGeometry, Plane
from lmcache_core.errors import ConfigError, Problem, Unsupported
from lmcache_core.gpu import CudaError, GpuPagedKV, How
from lmcache_core.identity import Identity
from lmcache_core.layout import DTYPE_BYTES, KVLayout
from lmcache_core.slots import prefer_huge_pages

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ModuleNotFoundError:  # before 0.32, which tells its metrics only how much came from a connector
    CacheHitSource = None

if TYPE_CHECKING:
    from numpy.typing import NDArray

TESTED = "0.30 to 0.32"

_NAME_THEM = 'name them yourself with kv_connector_extra_config={"weights": "<a string that changes with them>"}'

PAGE_FORMAT = 1
"""Version of the `packing` string this module writes. Raise it when the string's meaning changes."""

_METHODS: dict[str, tuple[str, ...]] = {
    "__init__": ("vllm_config", "role", "kv_cache_config"),
    "register_kv_caches": ("kv_caches",),
    "bind_connector_metadata": ("connector_metadata",),
    "start_load_kv": ("forward_context", "kwargs"),
    "wait_for_layer_load": ("layer_name",),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata", "kwargs"),
    "wait_for_save": (),
    "get_finished": ("finished_req_ids",),
    "get_block_ids_with_load_errors": (),
    "build_connector_worker_meta": (),
    "get_handshake_metadata": (),
    "set_xfer_handshake_metadata_pp_aware": ("metadata",),
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
    "update_connector_output": ("connector_output",),
    "request_finished": ("request", "block_ids"),
    "reset_cache": (),
    "shutdown": (),
    "take_events": (),
    "get_kv_connector_stats": (),
    "build_kv_connector_stats": ("data",),
    "build_prom_metrics": ("vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    "requires_piecewise_for_cudagraph": ("extra_config",),
}
"""Methods of `KVConnectorBase_V1` the adapter overrides or calls, with their parameters."""

_FIELDS: dict[str, tuple[str, ...]] = {
    "SchedulerOutput": (
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "kv_connector_block_state",
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "kv_cache_block_copies",
    ),
    "KVConnectorOutput": ("kv_connector_worker_meta", "invalid_block_ids", "finished_recving"),
    "KVConnectorBlockState": ("req_ids", "resolve_block_ids"),
    "MultiModalFeatureSpec": ("modality", "identifier", "mm_position"),
    "FullAttentionSpec": (
        "block_size",
        "num_kv_heads",
        "head_size",
        "head_size_v",
        "non_causal",
        "state_content_bytes",
    ),
}
_REQUEST = ("prompt_embeds", "mm_features", "lora_request", "cache_salt", "resumable", "pooling_params")


def installed_api() -> dict[str, Any]:
    """What the installed vLLM is like, for `differences`."""
    kinds = (SchedulerOutput, KVConnectorOutput, KVConnectorBlockState, MultiModalFeatureSpec, FullAttentionSpec)
    methods = {name: getattr(KVConnectorBase_V1, name, None) for name in _METHODS}
    return {
        "methods": {
            name: [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
            for name, method in methods.items()
            if method is not None
        },
        "abstract": sorted(KVConnectorBase_V1.__abstractmethods__),
        "fields": {kind.__name__: [field.name for field in dataclasses.fields(kind)] for kind in kinds},
        "request": list(inspect.signature(Request.__init__).parameters),
    }


def differences(api: Mapping[str, Any]) -> list[str]:
    """What of a vLLM's API is not as the adapter knows it. `api`: methods of the connector's base class with their
    parameters, abstract ones, fields of data classes, parameters of a request."""
    wrong: list[str] = []
    for name, expected in _METHODS.items():
        found = api["methods"].get(name)
        if found is None:
            wrong.append(f"KVConnectorBase_V1.{name} is missing")
        elif tuple(found) != expected:
            wrong.append(f"KVConnectorBase_V1.{name} takes ({', '.join(found)}), expected ({', '.join(expected)})")
    wrong += [f"KVConnectorBase_V1.{name} is a new abstract method" for name in api["abstract"] if name not in _METHODS]
    for kind, names in _FIELDS.items():
        wrong += [f"{kind}.{name} is missing" for name in names if name not in api["fields"][kind]]
    return wrong + [f"Request has no {name}" for name in _REQUEST if name not in api["request"]]


def check_api() -> None:
    """Raise `Unsupported` with everything that differs when this vLLM's connector API is not the one known here."""
    wrong = differences(installed_api())
    if wrong:
        raise Unsupported(
            f"vLLM {vllm.__version__} has a KV connector API that this lmcache-core does not know "
            f"(tested with {TESTED}):\n  " + "\n  ".join(wrong) + f"\nUse vLLM {TESTED}, or a newer lmcache-core."
        )


# -- pages -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Pages:
    """The engine's KV memory of one KV group of one worker, as it is."""

    layout: KVLayout
    """Of one block: `chunk_tokens` equals `block_tokens`."""
    names: tuple[str, ...]
    """Layers, in the order of their numbers."""
    bases: tuple[int, ...]
    """Address of block 0 in each layer."""
    block_stride: int
    """Bytes from one block to the next within a layer."""
    num_blocks: int
    tensors: tuple[torch.Tensor, ...]
    """The layers' memory, in the order of `bases`."""
    page: Plane
    """One page of one layer: where its bytes are, in the order in which a slot has them."""
    axes: tuple[int, ...] = (1, 2, 3)
    """That order, as axes of the tensors."""
    split: int = 1
    """Into how many the engine's tensors cut each of its blocks."""
    device: int | None = None
    """The GPU whose memory it is; None for host memory."""


def rank() -> tuple[int, int]:
    """Pipeline and tensor rank of this worker; both 0 where there are no workers apart."""
    if not model_parallel_is_initialized():
        return 0, 0
    return get_pp_group().rank_in_group, get_tp_group().rank_in_group


def refuse_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise `Unsupported` when KV of this engine cannot be stored by prefix, or not yet."""
    parallel, model, cache = vllm_config.parallel_config, vllm_config.model_config, vllm_config.cache_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise Unsupported("context parallel engines are not supported yet")
    if model.runner_type != "generate" or model.is_diffusion or not model.is_prefix_caching_supported:
        raise Unsupported("the KV of this model's tokens may depend on later tokens, so a prefix cannot be reused")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise Unsupported(f"speculative decoding with {speculative.method!r} keeps KV that looks beyond its prefix")
    second_runner = getattr(vllm_config, "use_v2_model_runner", False)
    if speculative is not None and parallel.pipeline_parallel_size > 1 and not second_runner:
        raise Unsupported("speculative decoding on several pipeline ranks: vLLM's first model runner never saves")
    if getattr(cache, "calculate_kv_scales", False):
        raise Unsupported("calculate_kv_scales makes KV depend on the first request; it cannot be shared")
    groups = kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    for spec in specs:
        if type(spec) not in (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec):
            raise Unsupported(f"KV of kind {type(spec).__name__} is not supported yet")
        if getattr(spec, "non_causal", False):
            raise Unsupported("non-causal attention: a prefix cannot be reused")
        head_size_v = 0 if isinstance(spec, MLAAttentionSpec) else spec.head_size
        packed = (spec.state_content_bytes, spec.num_head_slots, spec.page_size_padded) != (None, None, None)
        if spec.head_size_v != head_size_v or packed or spec.tokens_per_state != 1:
            raise Unsupported("KV packed in a way this version does not know")
    if len({spec.block_size for spec in specs}) > 1:
        raise Unsupported(f"KV cache groups with blocks of {sorted({spec.block_size for spec in specs})} tokens")


def blocks_in_chunk(chunk: int, block: int) -> int:
    """Engine blocks of `block` tokens in a chunk of `chunk`. Raise `ConfigError` where they are not whole."""
    if chunk % block:
        raise ConfigError(
            [
                Problem(
                    where="kv_connector_extra_config",
                    path="chunk_tokens",
                    what=f"{chunk} is not a multiple of vLLM's block of {block} tokens",
                    why="a chunk is stored as whole blocks",
                    fix=f"set chunk_tokens: {-(-chunk // block) * block}, or vLLM's --block-size",
                )
            ]
        )
    return chunk // block


def refuse_chunk(kv_cache_config: Any, chunk_tokens: int) -> None:
    """Raise `Unsupported` where chunks are longer than what a layer with a window still has of them when they are
    complete."""
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else chunk_tokens
        if window < chunk_tokens:
            raise Unsupported(
                f"chunk_tokens is {chunk_tokens}, but layers with a sliding window keep only {window} tokens; set "
                f"chunk_tokens to at most {window}, or start vLLM with --disable-hybrid-kv-cache-manager"
            )


def describe_pages(vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, torch.Tensor]) -> list[Pages]:
    """Describe the registered KV tensors of each KV group by their strides. Raise `Unsupported` for any doubt about
    their meaning."""
    refuse_engine(vllm_config, kv_cache_config)
    groups = kv_cache_config.kv_cache_groups
    known = {name for group in groups for name in group.layer_names}
    if known != kv_caches.keys():
        raise Unsupported(f"layers without a KV cache group of their own: {sorted(known ^ kv_caches.keys())}")
    return [_describe_group(vllm_config, kv_cache_config.num_blocks, group, kv_caches) for group in groups]


def use_huge_pages(kv_caches: Iterable[torch.Tensor]) -> None:
    """Let vLLM's KV, which is allocated and not touched yet, be in huge pages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kv_caches}
    for address, nbytes in storages.items():
        prefer_huge_pages(address, nbytes)


def _describe_group(vllm_config: Any, num_blocks: int, group: Any, kv_caches: Mapping[str, torch.Tensor]) -> Pages:
    spec = group.kv_cache_spec
    names = tuple(sorted(group.layer_names, key=_layer_order))
    tensors = tuple(kv_caches[name] for name in names)
    first = tensors[0]
    kind = first.device.type
    if kind not in ("cpu", "cuda"):
        raise Unsupported(f"KV in {kind} memory is not supported yet")
    if kind == "cuda" and not _cuda.available():
        raise Unsupported(f"KV is in GPU memory, which lmcache-core cannot copy: {_cuda.why_not()}")
    dtype = str(first.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise Unsupported(f"KV of dtype {dtype} is not supported")
    itemsize = first.element_size()
    planes = 1 if isinstance(spec, MLAAttentionSpec) else 2
    # Where the kernels of the backend want shorter blocks, vLLM shows each of its blocks as several.
    split = max(1, first.shape[0] // num_blocks) if kind == "cuda" else 1
    shape = (num_blocks * split, spec.num_kv_heads, spec.block_size // split, planes * spec.head_size)
    for name, tensor in zip(names, tensors, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != first.dtype or tensor.stride() != first.stride():
            raise Unsupported(
                f"layer {name} has KV of shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}; "
                f"expected {shape}, {first.stride()}, {first.dtype}"
            )
    if len({tensor.data_ptr() for tensor in tensors}) != len(tensors):
        raise Unsupported("layers that share their KV are not supported yet")
    layout_name = getattr(vllm_config.cache_config.kv_cache_layout, "name", vllm_config.cache_config.kv_cache_layout)
    axes, page = _page(str(layout_name), shape, first.stride(), itemsize)
    dense = not page.dims and (split == 1 or first.stride(0) * itemsize == page.run_bytes)
    if not dense and (kind == "cpu" or split > 1):
        raise Unsupported(f"a block of this KV layout is not one run of memory (strides {first.stride()})")
    if split > 1:
        page = replace(page, run_bytes=split * page.run_bytes)
    if kind == "cuda":
        packed = _backend(vllm_config, names) + (f"/split{split}" if split > 1 else "")
    else:
        packed = (_mla_packing if planes == 1 else _cpu_packing)(vllm_config, names, spec, first.dtype)
    layout = KVLayout(
        order="pages",
        dtype=dtype,
        num_layers=len(tensors),
        planes=planes,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
        chunk_tokens=spec.block_size,
        block_tokens=spec.block_size,
        packing=f"vllm-{kind}/{PAGE_FORMAT}/{layout_name}/{packed}",
    )
    return Pages(
        layout=layout,
        names=names,
        bases=tuple(tensor.data_ptr() for tensor in tensors),
        block_stride=split * first.stride(0) * itemsize,
        num_blocks=num_blocks,
        tensors=tensors,
        page=page,
        axes=axes,
        split=split,
        device=first.device.index if kind == "cuda" else None,
    )


def _page(layout_name: str, shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[tuple[int, ...], Plane]:
    """The axes of a page in the order of the layout's name, and its bytes in that order.

    A name says how memory is nested, outermost first: Layers, Blocks, Heads, tokeNs, Content; the tensors of all layers
    have the axes [B, H, N, C]. Raise `Unsupported` where the strides say otherwise.
    """
    if sorted(layout_name) != sorted("LBHNC"):
        raise Unsupported(f"the KV layout {layout_name!r} is not known")
    nested = ["BHNC".index(letter) for letter in layout_name if letter != "L"]
    beyond = 1
    for axis in reversed(nested):
        if shape[axis] == 1:
            continue  # its stride says nothing
        if strides[axis] < beyond:
            raise Unsupported(f"strides {tuple(strides)} of shape {tuple(shape)} are not of the layout {layout_name}")
        beyond = strides[axis] * shape[axis]
    inner = [axis for axis in nested if axis != 0]
    run = inside = item
    dims: list[Dim] = []
    for axis in reversed(inner):
        step = strides[axis] * item
        if shape[axis] > 1 and (dims or step != run):
            dims.insert(0, Dim(shape[axis], step, inside))
        elif shape[axis] > 1:
            run *= shape[axis]
        inside *= shape[axis]
    return tuple(inner), Plane(run, tuple(dims))


def _backend(vllm_config: Any, names: tuple[str, ...]) -> str:
    """The attention backend of these layers, which writes their pages on a GPU. Identities name vLLM's version too."""
    layers = vllm_config.compilation_config.static_forward_context
    try:
        found = {layers[name].get_attn_backend().get_name() for name in names}
    except (AttributeError, KeyError) as error:
        raise Unsupported(f"the attention layers do not name their backend ({error!r})") from error
    if len(found) != 1:
        raise Unsupported(f"the layers of one KV cache group have several attention backends: {sorted(found)}")
    return str(found.pop())


def compute_stream(device: int) -> int:
    """The CUDA stream that the engine's next work goes to."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def paged_kv(pages: Pages, layout: KVLayout, start: int = 0, stop: int | None = None) -> PagedKV:
    """The copier between layers `start...stop` of these pages and slots of `layout`, which is theirs alone."""
    geometry = replace(PageGeometry.opaque(layout, block_stride=pages.block_stride), planes=(pages.page,))
    bases, blocks = pages.bases[start:stop], pages.num_blocks
    if pages.device is None:
        return PagedKV(bases, geometry, blocks, owner=pages.tensors)
    how = How(compute_stream(pages.device), pages.device)
    return GpuPagedKV(bases, geometry, blocks, how=how, owner=pages.tensors)


def prove_copies(pages: Pages) -> None:
    """Copy one block out of the pages and one into them, and compare with what vLLM's own tensors say.

    Called before the engine serves: block 0 is its null block, and gets its bytes back. Raise `Unsupported` when a
    byte differs: then the addresses do not mean what the layout says.
    """
    slot = torch.zeros(pages.layout.chunk_bytes, dtype=torch.uint8, pin_memory=pages.device is not None).numpy()
    address = [int(slot.ctypes.data)]
    last = pages.num_blocks - 1
    before = {block: _bytes_of(pages, block) for block in (0, last)}
    pattern = np.random.default_rng(0).integers(0, 256, slot.size, dtype=np.uint8)
    try:
        copier = paged_kv(pages, pages.layout)
        copier.gather([last], address)
        _settle(pages)
        same = np.array_equal(slot, before[last])
        slot[:] = pattern
        copier.scatter([0], address)
        _settle(pages)
        same = same and np.array_equal(_bytes_of(pages, 0), pattern)
        slot[:] = before[0]
        copier.scatter([0], address)
        _settle(pages)
    except (CudaError, ValueError) as error:
        raise Unsupported(f"pages on GPU {pages.device} cannot be copied: {error}") from error
    same = same and all(np.array_equal(_bytes_of(pages, block), was) for block, was in before.items())
    if not same:
        raise Unsupported("copying a page did not give the bytes that vLLM's own tensors hold; the layout is not known")


def _settle(pages: Pages) -> None:
    """Wait for copies that were only queued."""
    if pages.device is not None:
        torch.cuda.current_stream(pages.device).synchronize()


def _bytes_of(pages: Pages, block: int) -> NDArray[np.uint8]:
    """One block of every layer, read through the engine's tensors, in the order of a slot."""
    start, stop = block * pages.split, (block + 1) * pages.split
    own = [tensor[start:stop].permute(0, *pages.axes) for tensor in pages.tensors]
    found: NDArray[np.uint8] = torch.stack(own).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def _layer_order(name: str) -> tuple[list[int], str]:
    """Layers by the numbers in their names, so that `layers.10` comes after `layers.9`."""
    return [int(number) for number in re.findall(r"\d+", name)], name


def _mla_packing(vllm_config: Any, names: tuple[str, ...], spec: Any, dtype: torch.dtype) -> str:
    """Name of what is inside a page of MLA latents: the backend, and a fingerprint of how it writes a known pattern."""
    layers = vllm_config.compilation_config.static_forward_context
    backends = [getattr(layers.get(name), "impl", None) for name in names]
    kinds = {type(backend).__name__ for backend in backends}
    update = getattr(backends[0], "do_kv_cache_update", None)
    if len(kinds) != 1 or update is None:
        raise Unsupported(f"the MLA layers do not name one page format ({', '.join(sorted(kinds))})")
    text = vllm_config.model_config.hf_text_config
    latent, rope, block = text.kv_lora_rank, text.qk_rope_head_dim, spec.block_size
    pattern = (torch.arange(block * (latent + rope), dtype=torch.int64) * 7919 % 509 - 254) / 2
    c, pe = pattern.to(vllm_config.model_config.dtype).view(block, -1).split([latent, rope], dim=1)
    page = torch.zeros((1, block, latent + rope), dtype=dtype)
    slots, one = torch.arange(block, dtype=torch.int64), torch.ones(1)
    try:
        update(c.contiguous(), pe.contiguous().unsqueeze(1), page, slots, vllm_config.cache_config.cache_dtype, one)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise Unsupported(f"vLLM's page packing kernel cannot be asked ({error})") from error
    return f"mla.{kinds.pop()}/{hashlib.sha256(page.view(torch.uint8).numpy().tobytes()).hexdigest()[:8]}"


def _cpu_packing(vllm_config: Any, names: tuple[str, ...], spec: Any, dtype: torch.dtype) -> str:
    """Name of what is inside a page, as the layers say it; see `cpu_page_format`."""
    layers = vllm_config.compilation_config.static_forward_context
    found = {getattr(layers.get(name), "isa", None) for name in names}
    if len(found) != 1 or not isinstance(isa := found.pop(), str):
        raise Unsupported("the attention layers do not name one page format (`isa`); is this vLLM's CPU backend?")
    return cpu_page_format(vllm_config, isa, spec, dtype)


def cpu_page_format(vllm_config: Any, isa: str, spec: Any, dtype: torch.dtype) -> str:
    """The instruction set vLLM packs a page for, and a fingerprint of the packing itself.

    vLLM transposes and interleaves keys for the CPU's matrix instructions. The fingerprint comes from packing a known
    pattern with vLLM's own kernel, so that a release that packs otherwise under the same name cannot be misread.
    """
    heads, block, dim = spec.num_kv_heads, spec.block_size, spec.head_size
    # Halves of integers below 256 are exact in every element type.
    pattern = torch.arange(2 * block * heads * dim, dtype=torch.int64) * 7919 % 509
    computed = torch.float32 if dtype == torch.float32 else vllm_config.model_config.dtype
    key, value = ((pattern - 254) / 2).to(computed).view(2, block, heads, dim)
    page = torch.zeros((1, heads, 2 * block, dim), dtype=dtype)
    key_cache, value_cache = page.chunk(2, dim=2)
    slots = torch.arange(block, dtype=torch.int64)
    kv_dtype = vllm_config.cache_config.cache_dtype
    try:
        cpu_ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa, kv_cache_dtype=kv_dtype)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise Unsupported(f"vLLM's page packing kernel cannot be asked ({error})") from error
    return f"{isa}/{hashlib.sha256(page.view(torch.uint8).numpy().tobytes()).hexdigest()[:8]}"


# -- identity --------------------------------------------------------------------------------------------------
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "return_dict"}


_MODEL = ("quantization_config", "model_impl", "model_class_overrides")
"""Settings that change what the same files compute."""

_INPUTS = (
    "mm_processor_kwargs", "mm_encoder_attn_backend", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path",
    "video_pruning_rate",
)  # fmt: skip
"""Settings that change what becomes of an image, a sound, ...: vLLM's hash of it has only what the request says."""


def model_identity(vllm_config: Any, layout: KVLayout, weights: str = "") -> Identity:
    """Identity of every KV this engine computes without adapters. `weights` replaces the fingerprint of the files.

    Raise `Unsupported` when the weights can be neither found nor named.
    """
    model = vllm_config.model_config
    text = model.hf_text_config
    rope = {
        name: getattr(text, name, None)
        for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
    }
    if set(re.findall(r'"(?:rope_)?type":"(\w+)"', _json(rope))) - {"default"}:
        # Some scalings choose their factors by the longest sequence the engine is set up for.
        rope["max_model_len"] = model.max_model_len
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in _VOLATILE}
    engine = {
        "config": hashlib.sha256(_json(config).encode()).hexdigest()[:16],
        "dtype": str(model.dtype),
        "kv": vllm_config.cache_config.cache_dtype,
        "quantization": model.quantization,
        "vllm": vllm.__version__,
    }
    # Younger than the fields above: engines that leave them alone keep the keys they have always had.
    engine |= {name: value for name in _MODEL if (value := getattr(model, name, None)) not in (None, "auto", {})}
    multimodal = getattr(model, "multimodal_config", None)
    inputs = {name: value for name in _INPUTS if (value := getattr(multimodal, name, None)) not in (None, {})}
    if inputs:
        engine["multimodal"] = inputs
    return Identity(
        model=model.served_model_name,
        weights=weights or _weights(vllm_config),
        layout=layout,
        revision=model.revision or "",
        rope=_json(rope),
        engine=_json(engine),
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _weights(vllm_config: Any) -> str:
    model = vllm_config.model_config
    if vllm_config.load_config.load_format == "dummy":
        return canonical.digest(("dummy", model.seed, _json(model.hf_config.to_dict()))).hex()
    return fingerprint(model.model, model.revision, _NAME_THEM)


# -- requests --------------------------------------------------------------------------------------------------
def blocks_written(scheduler_output: Any, block_tokens: int) -> Iterator[int]:
    """Blocks that requests were given for this step and that it may write; what they had before is theirs alone."""
    for new in scheduler_output.scheduled_new_reqs:
        for table in new.block_ids:
            yield from table[new.num_computed_tokens // block_tokens :]
    for given in scheduler_output.scheduled_cached_reqs.new_block_ids:
        for table in given or ():
            yield from table


def names_inputs(vllm_config: Any) -> bool:
    """Whether vLLM names images, sounds, ... by their content. Where it caches none of them it counts them instead
    (`renderer0-mm-1-image-0`), and another process means other ones by these names."""
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    caches = multimodal is None or multimodal.mm_processor_cache_gb != 0
    return bool(caches or vllm_config.cache_config.enable_prefix_caching)


def refuse_request(request: Any, *, named: bool = True) -> str:
    """Why this request's KV cannot be named by its token ids alone, or an empty string. `named`: see `names_inputs`."""
    if request.mm_features and not named:
        return "multimodal"
    if any(not isinstance(f.identifier, str) or not f.identifier for f in request.mm_features):
        return "multimodal"  # inputs without a name of their content
    if request.prompt_embeds is not None:
        return "prompt_embeds"
    if request.resumable:
        return "streaming_input"
    if request.pooling_params is not None:
        return "pooling"
    return ""


def multimodal(request: Any) -> Callable[[int, int], bytes] | None:
    """What the token ids `start...stop` of a request do not say: the images, sounds, ... whose placeholders they hold.

    vLLM names each input by a hash of its content and of how it is processed (or as the caller named it: `uuid`).
    None for a request of text alone.
    """
    features = request.mm_features
    if not features:
        return None

    def extra(start: int, stop: int) -> bytes:
        held = tuple(
            (f.modality, f.identifier, f.mm_position.offset - start, f.mm_position.length)
            for f in features
            if f.mm_position.offset < stop and f.mm_position.offset + f.mm_position.length > start
        )
        return canonical.encode(held) if held else b""

    return extra


class Adapters:
    """Identity of LoRA adapters, by content."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str, str], str] = {}

    def describe(self, lora: Any) -> str:
        """Name and content id of a request's adapter, empty without one. Raise `Unsupported` when it has no files."""
        if lora is None:
            return ""
        which = (lora.lora_int_id, lora.lora_name, lora.lora_path)
        # vLLM loads an adapter once for its id, unless told to replace it in place.
        if which not in self._known or lora.load_inplace:
            self._known[which] = f"{lora.lora_name}@{fingerprint(lora.lora_path, None, _NAME_THEM)}"
        return self._known[which]


def hit_sources(by_tier: Mapping[str, int], memory: str) -> dict[CacheHitSource, int]:
    """Tokens by tier name -> by vLLM's kind of source; the tier called `memory` is host memory, the others disks."""
    found: dict[CacheHitSource, int] = {}
    for tier, tokens in by_tier.items():
        source = CacheHitSource.HOST if tier == memory else CacheHitSource.DISK
        found[source] = found.get(source, 0) + tokens
    return found
