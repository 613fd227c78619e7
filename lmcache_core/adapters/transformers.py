"""Hugging Face Transformers: `attach(model)` makes `model.generate()` reuse KV across calls, processes and restarts.

`generate` is wrapped on the instance. For a prompt of one sequence, the longest stored prefix is loaded into a fresh
`DynamicCache`, `generate` computes the rest, and the new whole chunks (prompt and answer) are stored. What the caller
passes and gets back is untouched. A call that cannot be served exactly is passed through uncached, with a counted
reason; a model that cannot be served exactly is refused by `attach`.

Bytes move between `[layer][plane][token][head][dim]` chunks and the cache's `[1, head, token, dim]` tensors.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from lmcache_core.adapters._transformers_model import Bypass, Geometry, Guard, probe, state_refusal
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, load
from lmcache_core.copies import PagedKV, PageGeometry
from lmcache_core.errors import Unsupported
from lmcache_core.identity import Identity
from lmcache_core.keys import TokenChain
from lmcache_core.pipeline import Lease, Pipeline, Reservation
from lmcache_core.types import COMPUTED

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_PLAIN: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "dola_layers": (None,),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (None, False),
    "prefill_chunk_size": (None,),
    "custom_generate": (None,),
    "assistant_model": (None,),
}
"""Generation options and the values with which `generate` feeds each token of one sequence exactly once."""

_OUTPUTS = ("output_attentions", "output_hidden_states")
"""Options that return something for every prompt token, also for those that would not be computed."""


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


def attach(
    model: PreTrainedModel,
    config: PipelineConfig | Mapping[str, Any] | Path | str | None = None,
    *,
    tokenizer: Any = None,
    salt: str | None = None,
    tenant: str | None = None,
) -> Handle:
    """Make `model.generate()` reuse KV through the pipeline that `config` describes.

    `config` is whatever `lmcache_core.config.load` takes: a model, a mapping, a YAML or TOML file, or None for the
    environment. `salt` keeps apart what must not be shared: different salts never share. `tenant` is whose calls these
    are, where the configuration has `tenancy`; see `Handle.tenant`. `tokenizer`, where given, takes part in the
    identity. The handle is a context manager that detaches and closes.

    Raise `Unsupported`, with the reason, for a model whose KV could not be reused exactly, and what `load` and `build`
    raise for a configuration that cannot be used. Nothing is left attached or open then.
    """
    geometry = probe(model)
    settings = config if isinstance(config, PipelineConfig) else load(config).config
    tokenizer_digest = _tokenizer_digest(tokenizer)
    pipeline = build(settings, geometry.layout(settings.chunk_tokens))
    try:
        return Handle(model, pipeline, geometry, tokenizer_digest, salt, tenant)
    except BaseException:
        pipeline.close()
        raise


def _tokenizer_digest(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _synchronize(device: torch.device) -> None:
    """Wait for this thread's copies from and to the device: slots may change hands afterwards."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class _Generate:
    """What stands in for `model.generate` while a handle is attached."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        functools.update_wrapper(self, handle.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle.generate(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied model is another model: it starts without a handle.
        copy = memo[id(self.handle.model)]
        return MethodType(type(copy).generate, copy)


class Handle:
    """The attachment of one model to one pipeline. Thread-safe as far as the model is."""

    def __init__(
        self,
        model: PreTrainedModel,
        pipeline: Pipeline,
        geometry: Geometry,
        tokenizer_digest: str = "",
        salt: str | None = None,
        tenant: str | None = None,
    ) -> None:
        self.model = model
        self.pipeline = pipeline
        self.geometry = geometry
        self.paged = geometry.device.type == "cpu"
        """Copy straight between slots and the cache's tensors; otherwise through the device, a chunk at a time."""
        self.tenant = tenant
        """Whose the next calls are, where the configuration has `tenancy`; without one they are not cached."""
        self.last = Call()
        """The most recent call."""
        self.counts: Counter[str] = Counter()
        """`calls`, `bypass.<reason>`, `miss.<reason>`, `prompt_tokens`, `reused_tokens`, `stored_chunks`, `errors`."""
        self._lock = threading.Lock()
        self._guard = Guard(model)
        self._home = (model.device, model.dtype)
        self._salt = salt
        self._tokenizer_digest = tokenizer_digest
        self.original = model.generate
        self._signature = inspect.signature(self.original)
        self._known = {
            "input_ids",
            "attention_mask",
            "tokenizer",
            *vars(GenerationConfig()),
            *self._signature.parameters,
        }
        model.generate = _Generate(self)

    # -- life --------------------------------------------------------------------------------------------------
    def detach(self) -> None:
        """Give the model its own `generate` back; the pipeline stays open. Idempotent."""
        wrapper = self.model.__dict__.get("generate")
        if isinstance(wrapper, _Generate) and wrapper.handle is self:
            del self.model.generate

    def close(self, timeout: float = 30.0) -> None:
        """Detach, write down what must be written, within `timeout` seconds, and release the memory. Idempotent."""
        self.detach()
        self.pipeline.close(timeout)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def identity(self) -> Identity:
        """Who the KV of the next call belongs to, but for its tenant: the model as it is in memory now."""
        with self._lock:
            if not self._guard.holds():
                self._guard = Guard(self.model)
            weights = self._guard.fingerprint
        config = self.model.config
        rope = {name: getattr(config, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta")}
        engine = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {self.geometry.device.type}, "
            f"{config._attn_implementation}, float32 matmul {torch.get_float32_matmul_precision()}"
        )
        return Identity(
            model=type(self.model).__name__,
            weights=weights,
            layout=self.pipeline.layout,
            rope=json.dumps(rope, sort_keys=True, default=str),
            tokenizer=self._tokenizer_digest,
            engine=engine,
            salt=self._salt,
            fidelity=self.pipeline.fidelity,
        )

    # -- one call ----------------------------------------------------------------------------------------------
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` with reuse; what the attached model calls."""
        begun = perf_counter()
        prepared = self._prepare(args, kwargs)
        if isinstance(prepared, Bypass):
            self._count(Call(bypass=prepared))
            return self.original(*args, **kwargs)
        chain, cache, call = prepared
        call = replace(call, load_s=perf_counter() - begun)
        result = self.original(*args, past_key_values=cache, **kwargs)
        begun = perf_counter()
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        stored = self._store(chain, cache, sequences[0])
        self._count(replace(call, stored_chunks=stored, store_s=perf_counter() - begun))
        return result

    def _count(self, call: Call) -> None:
        with self._lock:
            self.last = call
            self.counts["calls"] += 1
            if call.bypass is not None:
                self.counts[f"bypass.{call.bypass}"] += 1
            if call.miss is not None:
                self.counts[f"miss.{call.miss}"] += 1
            self.counts["prompt_tokens"] += call.prompt_tokens
            self.counts["reused_tokens"] += call.reused_tokens
            self.counts["stored_chunks"] += call.stored_chunks

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TokenChain, Any, Call] | Bypass:
        """Load what is stored of the prompt, or say why not. Trouble with the cache is a bypass, never an error."""
        try:
            bound = self._signature.bind(*args, **kwargs).arguments
        except TypeError:
            return Bypass.INPUTS  # `generate` itself says what is wrong
        arguments = {**bound.pop("kwargs", {}), **bound}
        try:
            refusal = self._refusal(arguments)
            if refusal is not None:
                return refusal
            ids = arguments["inputs"] if arguments.get("inputs") is not None else arguments["input_ids"]
            return self._load(ids[0].cpu().numpy())
        except Exception:
            logger.warning("the KV cache could not be read; the call is computed without it", exc_info=True)
            self.counts["errors"] += 1
            return Bypass.ERROR

    def _refusal(self, arguments: dict[str, Any]) -> Bypass | None:
        """Why this call cannot be served exactly, or None."""
        given = arguments.get("generation_config")
        defaults = [vars(config) for config in (given, self.model.generation_config) if config is not None]

        def option(name: str) -> Any:
            return next((o[name] for o in (arguments, *defaults) if o.get(name) is not None), None)

        if arguments.get("past_key_values") is not None:
            return Bypass.OWN_CACHE
        ids = arguments["inputs"] if arguments.get("inputs") is not None else arguments.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            return Bypass.INPUTS
        if any(value is not None for name, value in arguments.items() if name not in self._known):
            return Bypass.INPUTS
        if ids.shape[0] != 1:
            return Bypass.BATCH
        if self._padded(ids, arguments.get("attention_mask"), option):
            return Bypass.PADDING
        if option("use_cache") is False or option("cache_implementation") not in (None, "dynamic"):
            return Bypass.CACHE_KIND
        if any(option(name) not in plain for name, plain in _PLAIN.items()):
            return Bypass.DECODING
        if any(option(name) for name in _OUTPUTS):
            return Bypass.OUTPUTS
        if torch.is_autocast_enabled(self.geometry.device.type):
            return Bypass.AUTOCAST
        if (self.model.device, self.model.dtype) != self._home:
            return Bypass.MOVED
        return state_refusal(self.model)

    @staticmethod
    def _padded(ids: torch.Tensor, mask: Any, option: Callable[[str], Any]) -> bool:
        """Whether some prompt tokens are masked out, by the caller or by the rule with which `generate` infers it."""
        if mask is not None:
            return not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or not bool((mask == 1).all())
        pad, eos = option("pad_token_id"), option("eos_token_id")
        if pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos]):
            return False
        return bool((ids == pad).any())

    def _load(self, ids: NDArray[np.int64]) -> tuple[TokenChain, Any, Call] | Bypass:
        """A cache that holds the longest stored prefix of the prompt, at least one token short of it."""
        identity = self.pipeline.tenant_identity(self.identity(), self.tenant)
        if identity is None:
            return Bypass.TENANT
        chain = TokenChain(identity)
        chain.extend(ids)
        cache = DynamicCache(config=self.model.config)
        usable = (len(ids) - 1) // chain.chunk_tokens
        if usable == 0:
            return chain, cache, Call(prompt_tokens=len(ids), sources=(COMPUTED,) * len(chain.keys))
        with self.pipeline.retrieve(chain.keys[:usable]) as lease:
            if len(lease):
                self._fill(cache, lease)
            call = Call(
                prompt_tokens=len(ids),
                reused_tokens=len(lease) * chain.chunk_tokens,
                sources=(*lease.sources, *[COMPUTED] * (len(chain.keys) - len(lease))),
                miss=lease.reason,
            )
        return chain, cache, call

    def _store(self, chain: TokenChain, cache: Any, sequence: torch.Tensor) -> int:
        """Store the whole chunks of prompt and answer that are not stored yet. Trouble is counted, never raised."""
        try:
            tokens = cache.get_seq_length()
            layers = cache.layers
            self._check_cache(layers, tokens, len(sequence))
            if not self._guard.holds():
                raise Unsupported("the weights changed during the call")
            done = len(chain.keys) * chain.chunk_tokens
            chain.extend(sequence[done:tokens].cpu().numpy())
            return self.pipeline.store(chain.keys, lambda room: self._save(layers, room))
        except Exception:
            logger.warning("the KV of a call could not be stored", exc_info=True)
            self.counts["errors"] += 1
            return 0

    def _check_cache(self, layers: Sequence[Any], tokens: int, sequence_tokens: int) -> None:
        """Raise `Unsupported` unless the cache is the one this handle's layout describes."""
        g = self.geometry
        want = ((1, g.kv_heads, tokens, g.head_dim), g.dtype, g.device)
        found = {(tuple(t.shape), t.dtype, t.device) for layer in layers for t in (layer.keys, layer.values)}
        if found != {want} or len(layers) != g.num_layers or tokens > sequence_tokens:
            raise Unsupported(
                f"`generate` left {len(layers)} layers of KV {found} for {sequence_tokens} tokens; "
                f"expected {g.num_layers} layers of {want}"
            )

    # -- bytes -------------------------------------------------------------------------------------------------
    def _fill(self, cache: Any, lease: Lease) -> None:
        """Chunks of a lease -> new tensors in the cache's layers."""
        g, size = self.geometry, self.pipeline.layout.chunk_tokens
        shape = (1, g.kv_heads, len(lease) * size, g.head_dim)
        if self.paged:
            planes = [[torch.empty(shape, dtype=g.dtype) for _ in range(2)] for _ in range(g.num_layers)]
            self._pages(planes).scatter(np.arange(len(lease)), lease.addresses)
        else:
            whole = torch.empty((g.num_layers, 2, *shape), dtype=g.dtype, device=g.device)
            for i in range(len(lease)):
                staged = self._chunk(lease.view(i)).to(g.device, non_blocking=True)
                whole[:, :, 0, :, i * size : (i + 1) * size].copy_(staged.transpose(2, 3))
            _synchronize(g.device)
            planes = [[whole[i, 0], whole[i, 1]] for i in range(g.num_layers)]
        for layer, (keys, values) in zip(cache.layers, planes, strict=True):
            layer.dtype, layer.device = g.dtype, g.device
            layer.keys, layer.values = keys, values
            layer.is_initialized = True

    def _save(self, layers: Sequence[Any], room: Reservation) -> None:
        """The cache's layers -> reserved slots."""
        g, size = self.geometry, self.pipeline.layout.chunk_tokens
        if self.paged:
            planes = [[layer.keys.contiguous(), layer.values.contiguous()] for layer in layers]
            self._pages(planes).gather(room.positions, room.addresses)
            return
        for i, position in enumerate(room.positions):
            part = slice(position * size, (position + 1) * size)
            stacked = torch.stack([torch.stack((x.keys[0, :, part], x.values[0, :, part])) for x in layers])
            self._chunk(room.view(i)).copy_(stacked.transpose(2, 3), non_blocking=True)
        _synchronize(g.device)

    def _chunk(self, view: memoryview) -> torch.Tensor:
        """A slot's payload as `[layer, plane, token, head, dim]`."""
        g = self.geometry
        flat = torch.frombuffer(view, dtype=g.dtype)
        return flat.view(g.num_layers, 2, self.pipeline.layout.chunk_tokens, g.kv_heads, g.head_dim)

    def _pages(self, planes: Sequence[Sequence[torch.Tensor]]) -> PagedKV:
        """K and V of every layer, contiguous `[1, head, token, dim]` on this host, as pages of one chunk each."""
        layout = self.pipeline.layout
        length = planes[0][0].shape[2]
        bases = [[layer[plane].data_ptr() for layer in planes] for plane in range(2)]
        geometry = PageGeometry.sequence(layout, length)
        threads = torch.get_num_threads()
        return PagedKV(bases, geometry, length // layout.chunk_tokens, threads=threads, owner=planes)
