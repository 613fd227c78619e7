"""Hugging Face Transformers: `attach(model)` makes `model.generate()` reuse KV across calls, processes and restarts.

`generate` is wrapped on the instance. For a prompt of one sequence, the longest stored prefix is loaded into a fresh
`DynamicCache`, `generate` computes the rest, and the new whole chunks (prompt and answer) are stored. What the caller
passes and gets back is untouched. A call that cannot be served exactly is passed through uncached, with a counted
reason; a model that cannot be served exactly is refused by `attach`.

Bytes move between `[layer][plane][token][head][dim]` chunks and the cache's `[1, head, token, dim]` tensors.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import logging
import threading
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lmcache_core import _native, canonical
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, load
from lmcache_core.copies import PagedKV
from lmcache_core.errors import LMCacheError, Unsupported
from lmcache_core.identity import Identity
from lmcache_core.keys import TokenChain
from lmcache_core.layout import DTYPE_BYTES, KVLayout
from lmcache_core.pipeline import Lease, Pipeline, Reservation
from lmcache_core.types import ChunkKey

logger = logging.getLogger(__name__)

COMPUTED = "computed"
"""Source of a chunk that no tier served."""

_SAMPLES = 1024
"""Elements of a parameter on a device that are fingerprinted beside the sum of all its bits."""


class Bypass(enum.StrEnum):
    """Why a call was passed through uncached."""

    BATCH = "batch"
    OWN_CACHE = "own_cache"
    INPUTS = "inputs"
    PADDING = "padding"
    DECODING = "decoding"
    CACHE_KIND = "cache_kind"
    OUTPUTS = "outputs"
    TRAINING = "training"
    ADAPTER = "adapter"
    HOOKS = "hooks"
    AUTOCAST = "autocast"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Call:
    """Where the KV of one `generate` call came from."""

    bypass: Bypass | None = None
    """Why the cache was not used at all; then everything else is empty."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    sources: tuple[str, ...] = ()
    """For each whole chunk of the prompt the tier that served it, or `COMPUTED`."""
    miss: str | None = None
    """Why the first chunk that was looked up and not served is missing, a `MissReason`; None when all were served."""
    stored_chunks: int = 0
    load_s: float = 0.0
    """Seconds spent before `generate` proper: keys, lookup, reads and copies."""
    store_s: float = 0.0
    """Seconds spent after it: copies into memory slots. Slower tiers are written in the background."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model's KV as its own forward pass produces it."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def layout(self, chunk_tokens: int) -> KVLayout:
        """The canonical chunk layout."""
        return KVLayout(
            order="lknhd",
            dtype=str(self.dtype).removeprefix("torch."),
            num_layers=self.num_layers,
            planes=2,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            chunk_tokens=chunk_tokens,
            block_tokens=chunk_tokens,
        )


def attach(
    model: PreTrainedModel,
    config: PipelineConfig | Mapping[str, Any] | Path | str | None = None,
    *,
    tokenizer: Any = None,
    salt: str | None = None,
) -> Handle:
    """Make `model.generate()` reuse KV through the pipeline that `config` describes.

    `config` is whatever `lmcache_core.config.load` takes: a model, a mapping, a YAML or TOML file, or None for the
    environment. `salt` separates tenants: different salts never share. `tokenizer`, where given, takes part in the
    identity. The handle is a context manager that detaches and closes.

    Raise `Unsupported`, with the reason, for a model whose KV could not be reused exactly, and what `load` and `build`
    raise for a configuration that cannot be used. Nothing is left attached or open then.
    """
    geometry = probe(model)
    settings = load(config).config
    tokenizer_digest = _tokenizer_digest(tokenizer)
    pipeline = build(settings, geometry.layout(settings.chunk_tokens))
    try:
        return Handle(model, pipeline, geometry, tokenizer_digest, salt)
    except BaseException:
        pipeline.close()
        raise


# -- what is supported -----------------------------------------------------------------------------------------


def probe(model: PreTrainedModel) -> Geometry:
    """Check that the model's KV can be reused exactly and measure its geometry with one forward pass of 2 x 2 tokens.

    Raise `Unsupported` with the reason.
    """
    _check_kind(model)
    cache = DynamicCache(config=model.config)
    device = model.device
    with torch.no_grad(), _evaluating(model):
        model(input_ids=torch.tensor([[1, 2], [1, 3]], device=device), past_key_values=cache, use_cache=True)
    layers = cache.layers
    if not layers or any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers}) or ["none"]
        raise Unsupported(f"cache layers of kind {', '.join(kinds)}: only full attention in every layer can be reused")
    shapes = {(tuple(t.shape), t.dtype, t.device) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) > 1:
        raise Unsupported(f"K and V differ in shape, type or device between planes or layers: {_some(shapes)}")
    (shape, dtype, where), *_ = shapes
    if str(dtype).removeprefix("torch.") not in DTYPE_BYTES:
        raise Unsupported(f"KV of type {dtype} is not supported")
    if len(shape) != 4 or shape[0] != 2 or shape[2] != 2:
        raise Unsupported(f"KV of shape {shape} for two prompts of two tokens; expected [2, heads, 2, dim]")
    # A token that came later must not change KV that came earlier (two rows differ in their second token only).
    for layer in layers:
        for plane in (layer.keys, layer.values):
            if not torch.allclose(plane[0, :, 0].float(), plane[1, :, 0].float(), rtol=1e-2, atol=1e-3):
                raise Unsupported("attention is not causal: KV of a prefix depends on what follows it")
    return Geometry(len(layers), shape[1], shape[3], dtype, where)


def _check_kind(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise Unsupported(f"{type(model).__name__} is not a Transformers model that generates; pass the model itself")
    if "generate" in model.__dict__:
        raise Unsupported("`generate` of this model is wrapped already; detach the other handle first")
    config = model.config
    if config.is_encoder_decoder:
        raise Unsupported("encoder-decoder models are not supported: their cache depends on the encoder's input")
    if config.get_text_config(decoder=True) is not config:
        raise Unsupported("multimodal models are not supported: token ids alone do not name their KV")
    if type(model).generate is not GenerationMixin.generate:
        raise Unsupported(f"{type(model).__name__} brings its own `generate`")
    if not model._supports_default_dynamic_cache():
        raise Unsupported(f"{type(model).__name__} does not use a DynamicCache")
    for kind in _rope_types(config):
        if kind in ("dynamic", "longrope"):
            raise Unsupported(f"rope type {kind!r} makes keys depend on the length of the whole prompt")
    if getattr(model, "_tp_size", None):
        raise Unsupported("tensor-parallel models are not supported: each process holds a part of the heads")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise Unsupported(f"parameters must be on one device, not on {', '.join(sorted(devices))}")
    if _has_adapter(model):
        raise Unsupported("an adapter (LoRA, PEFT) is loaded; merge it into the weights first (merge_and_unload)")


def _rope_types(config: Any) -> Iterator[str]:
    """Every rope type named in the configuration, of all layer kinds."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, Mapping):
            for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
                kind = part.get("rope_type", part.get("type"))
                if isinstance(kind, str):
                    yield kind


def _has_adapter(model: Any) -> bool:
    """Whether PEFT tuner layers are in the model, active or not."""
    return any(hasattr(type(module), "active_adapters") and hasattr(module, "base_layer") for module in model.modules())


class _evaluating:  # noqa: N801
    """Evaluation mode for a while."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._training = model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._training)


def _some(things: set[Any]) -> str:
    return "; ".join(sorted(str(thing) for thing in things)[:3])


# -- who the KV belongs to -------------------------------------------------------------------------------------


def fingerprint_model(model: PreTrainedModel) -> str:
    """Digest of what the model computes with, hex: its configuration, every parameter and every buffer in memory.

    On the CPU every byte counts (XXH3-64 per tensor); on a device the integer sum of all elements' bits and
    `_SAMPLES` evenly spaced elements, so that a large model takes one pass over its memory.
    """
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(name, None)
    parts: list[canonical.Canonical] = [json.dumps(config, sort_keys=True, default=str)]
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(named.items()):
        parts.append((name, str(tensor.dtype), tuple(tensor.shape), _tensor_digest(tensor)))
    return canonical.digest(tuple(parts)).hex()


def _tensor_digest(tensor: torch.Tensor) -> canonical.Canonical:
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() == 0:
        return b""
    raw = flat.view(torch.uint8)
    if raw.device.type == "cpu":
        return _native.xxh3_64(memoryview(raw.numpy()))
    width = next(w for w in (torch.int32, torch.int16, torch.uint8) if raw.numel() % w.itemsize == 0)
    total = int(raw.view(width).sum(dtype=torch.int64))
    step = max(1, flat.numel() // _SAMPLES)
    return (total, flat[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes())


def _tokenizer_digest(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


class _Guard:
    """Notices that the model is no longer the one that was fingerprinted, in a fraction of a millisecond.

    Compares which tensors the model consists of, their version counters (in-place writes), and four elements of each
    (writes through `.data`, which no counter sees).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        tensors = [*model.parameters(), *model.buffers()]
        self._state = self._versions(tensors)
        self._views: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            detached = tensor.detach()
            if detached.is_contiguous() and detached.numel() >= 4:
                view = detached.view(-1)[detached.numel() // 2 :][:2]
                self._views.setdefault(tensor.dtype, []).append(torch.cat([view, view[:0]]) if False else view)
        self._sample = self._read()
        self.fingerprint = fingerprint_model(model)

    @staticmethod
    def _versions(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int, int]]:
        return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def _read(self) -> list[bytes]:
        joined = (torch.cat(views) for views in self._views.values())
        return [tensor.view(torch.uint8).cpu().numpy().tobytes() for tensor in joined]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        model = self._model
        return self._state == self._versions([*model.parameters(), *model.buffers()]) and self._sample == self._read()
