"""What the Transformers adapter must know about a model: whether its KV can be reused exactly, and who it is."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmcache_core import _native, canonical
from lmcache_core.errors import Unsupported
from lmcache_core.layout import DTYPE_BYTES, KVLayout

_SAMPLES = 1024
"""Elements of a parameter on a device that are fingerprinted beside the sum of all its bits."""


class Bypass(enum.StrEnum):
    """Why a call was passed through uncached."""

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
    MOVED = "moved"
    TENANT = "tenant"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model's KV as its own forward pass produces it."""

    num_layers: int
    kv_heads: int
    head_dim: int
    """Elements of one head of K."""
    dtype: torch.dtype
    device: torch.device
    value_dim: int
    """Elements of one head of V."""

    def layout(self, chunk_tokens: int) -> KVLayout:
        """The canonical chunk layout; one plane with K and V of each head side by side where they differ in size."""
        alike = self.head_dim == self.value_dim
        return KVLayout(
            order="lknhd",
            dtype=str(self.dtype).removeprefix("torch."),
            num_layers=self.num_layers,
            planes=2 if alike else 1,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim if alike else self.head_dim + self.value_dim,
            chunk_tokens=chunk_tokens,
            block_tokens=chunk_tokens,
        )


# -- what is supported -----------------------------------------------------------------------------------------


def probe(model: PreTrainedModel) -> Geometry:
    """Check that the model's KV can be reused exactly and measure its geometry with one forward pass of 2 x 2 tokens.

    Raise `Unsupported` with the reason.
    """
    _check_kind(model)
    cache = DynamicCache(config=model.config)
    layers = cache.layers
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    _check_layers(layers, [type(layer) in known for layer in layers])
    for layer in layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            if not hasattr(layer, "record_past"):
                raise Unsupported(
                    "sliding windows need a newer Transformers: this one cannot keep what leaves the window"
                )
            layer.record_past = True
    with torch.no_grad(), _evaluating(model):
        model(input_ids=torch.tensor([[1, 2], [1, 3]], device=model.device), past_key_values=cache, use_cache=True)
    _check_layers(layers, [layer.is_initialized for layer in layers])
    keys, values = ({(tuple(t.shape), t.dtype, t.device) for t in plane} for plane in _planes(layers))
    if len(keys) > 1 or len(values) > 1:
        raise Unsupported(f"K or V differ in shape, type or device between layers: {_some(keys | values)}")
    (shape, dtype, where), *_ = keys
    (value_shape, *rest), *_ = values
    if str(dtype).removeprefix("torch.") not in DTYPE_BYTES or rest != [dtype, where]:
        raise Unsupported(f"KV of type {dtype} and {rest[0]} is not supported")
    if len(shape) != 4 or shape[0] != 2 or shape[2] != 2 or value_shape[:3] != shape[:3]:
        raise Unsupported(
            f"KV of shape {shape}, {value_shape} for two prompts of two tokens; expected [2, heads, 2, dim]"
        )
    # A token that came later must not change KV that came earlier (two rows differ in their second token only).
    for plane in _planes(layers):
        for tensor in plane:
            if not torch.allclose(tensor[0, :, 0].float(), tensor[1, :, 0].float(), rtol=1e-2, atol=1e-3):
                raise Unsupported("attention is not causal: KV of a prefix depends on what follows it")
    return Geometry(len(layers), shape[1], shape[3], dtype, where, value_shape[3])


def _check_layers(layers: Any, usable: list[bool]) -> None:
    """Raise `Unsupported` unless there are layers and all are usable."""
    if not all(usable) or not layers:
        kinds = sorted({type(layer).__name__ for layer, good in zip(layers, usable, strict=True) if not good})
        raise Unsupported(
            f"cache layers of kind {', '.join(kinds) or 'none'}: only attention in every layer can be reused"
        )


def _planes(layers: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [layer.keys for layer in layers], [layer.values for layer in layers]


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
    if len(devices) != 1 or model.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"parameters must be on the CPU or on one CUDA device, not on {', '.join(sorted(devices))}")
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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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


class Guard:
    """Notices, in about a millisecond, that the model is no longer the one that was fingerprinted.

    Compares which tensors the model consists of, their version counters (in-place writes), and four elements of each
    (writes through `.data`, which no counter sees).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        tensors = list(_tensors(model))
        self._state = self._versions(tensors)
        self._views: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.is_contiguous():
                middle = tensor.detach().view(-1)[tensor.numel() // 2 :][:4]
                self._views.setdefault(tensor.dtype, []).append(middle)
        self._sample = self._read()
        self.fingerprint = fingerprint_model(model)

    @staticmethod
    def _versions(tensors: list[torch.Tensor]) -> list[tuple[int, int, int]]:
        return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def _read(self) -> list[bytes]:
        joined = (torch.cat(views) for views in self._views.values())
        return [tensor.view(torch.uint8).cpu().numpy().tobytes() for tensor in joined]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self._state == self._versions(list(_tensors(self._model))) and self._sample == self._read()


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            yield from (tensor for tensor in group.values() if tensor is not None)


def state_refusal(model: Any) -> Bypass | None:
    """Why the model, as it is at this moment, would not produce the KV its weights stand for; None when it would."""
    for module in model.modules():
        if module.training:
            return Bypass.TRAINING
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            # Transformers' own hooks only record outputs, the adapter's measures.
            own = ("transformers.", "lmcache_core.")
            if any(not getattr(hook, "__module__", "").startswith(own) for hook in hooks.values()):
                return Bypass.HOOKS
    return Bypass.ADAPTER if _has_adapter(model) else None
