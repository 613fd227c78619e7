"""Hugging Face Transformers: `attach(model)` makes `model.generate()` reuse KV across calls, processes and restarts.

`generate` is wrapped on the instance. The longest stored prefix of the prompt is loaded into an empty cache, `generate`
computes the rest, and the new whole chunks (prompt and answer) are stored. What the caller passes and gets back is
untouched. A call that cannot be served exactly is passed through uncached, with a counted reason; a model that cannot
be served exactly is refused by `attach`.

A batch has one number of columns in its cache, and a row's tokens begin after its padding. So all rows reuse as many
columns as the row with the fewest: the least of padding + stored prefix. Positions count from a row's first token, as
`generate` makes them from the mask, which makes a row's KV the KV of its sequence alone.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MethodType
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from lmcache_core.adapters._transformers_cache import (
    Mover,
    Row,
    is_gpu,
    new_cache,
    record,
    synchronize,
    unrecord,
    usable,
)
from lmcache_core.adapters._transformers_model import Bypass, Geometry, Guard, probe, state_refusal
from lmcache_core.build import build
from lmcache_core.config import PipelineConfig, load
from lmcache_core.errors import Unsupported
from lmcache_core.identity import Identity
from lmcache_core.keys import TokenChain
from lmcache_core.pipeline import Pipeline
from lmcache_core.types import COMPUTED

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

MEASURED_TOKENS = 128
"""A prefill of fewer tokens says nothing about the speed of long ones."""


@dataclass(frozen=True, slots=True)
class Call:
    """Where the KV of one `generate` call came from."""

    bypass: Bypass | None = None
    """Why the cache was not used at all; then everything else is empty."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    sources: tuple[str, ...] = ()
    """For each whole chunk of the prompt the tier that served it, or `COMPUTED`; of a batch, row by row."""
    miss: str | None = None
    """Why the first chunk that was looked up and not served is missing, a `MissReason`; None when all were served."""
    stored_chunks: int = 0
    load_s: float = 0.0
    """Seconds spent before `generate` proper: keys, lookup, reads and copies."""
    store_s: float = 0.0
    """Seconds spent after it: copies into memory slots. Slower tiers are written in the background."""
    chunk_tokens: int = 0
    """What is reused and stored is whole chunks of so many tokens."""

    def __str__(self) -> str:
        if self.bypass is not None:
            return f"passed through uncached: {self.bypass}"
        if not self.sources:
            return f"nothing to reuse: {self.prompt_tokens} tokens are less than a chunk of {self.chunk_tokens}"
        chunks = ", ".join(f"{count} {source}" for source, count in Counter(self.sources).items())
        why = f" ({self.miss})" if self.miss is not None else ""
        return (
            f"{self.reused_tokens} of {self.prompt_tokens} prompt tokens reused; "
            f"chunks of {self.chunk_tokens}: {chunks}{why}; "
            f"{1e3 * self.load_s:.0f} ms to load, {1e3 * self.store_s:.0f} ms to store {self.stored_chunks}"
        )


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
        if pipeline.mirror is not None and not is_gpu(geometry.device, pipeline.mirror.device):
            raise Unsupported(
                f"tier {pipeline.mirror.name} is on GPU {pipeline.mirror.device}, the model on {geometry.device}: "
                "set the backend's `device`, move the model, or remove the tier"
            )
        self.mover = Mover(geometry, pipeline.layout, pipeline.mirror)
        if pipeline.mirror is not None and not self.mover.paged:
            raise Unsupported(f"tier {pipeline.mirror.name}: K and V of this model differ in size; remove the tier")
        self.tenant = tenant
        """Whose the next calls are, where the configuration has `tenancy`; without one they are not cached."""
        self.last = Call()
        """The most recent call."""
        self.counts: Counter[str] = Counter()
        """`calls`, `bypass.<reason>`, `miss.<reason>`, `prompt_tokens`, `reused_tokens`, `stored_chunks`, `errors`."""
        self._lock = threading.Lock()
        self._static_tokens = 0
        self._guard = Guard(model)
        self._home = (model.device, model.dtype)
        self._salt = salt
        self._tokenizer_digest = tokenizer_digest
        self.original = model.generate
        self._signature = inspect.signature(self.original)
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        """Whether positions can count from the first token that is no padding."""
        self._known = {
            "input_ids",
            "attention_mask",
            "past_key_values",
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
        rows, cache, call, trailing = prepared
        call = replace(call, load_s=perf_counter() - begun)
        if kwargs.get("cache_implementation") is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
        with self._measured(call):
            result = self.original(*args, **{**kwargs, "past_key_values": cache})
        begun = perf_counter()
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        stored = self._store(rows, cache, sequences, trailing)
        self._count(replace(call, stored_chunks=stored, store_s=perf_counter() - begun))
        return result

    @contextmanager
    def _measured(self, call: Call) -> Iterator[None]:
        """Time the first forward pass of this thread, a prefill without reuse, where the cost rule wants to know."""
        if not self.pipeline.recompute.measure or call.reused_tokens or call.prompt_tokens < MEASURED_TOKENS:
            yield
            return
        begun, me = perf_counter(), threading.get_ident()

        def first(*_: object) -> None:
            if threading.get_ident() == me:
                hook.remove()
                synchronize(self.geometry.device)
                self.pipeline.note_prefill(call.prompt_tokens, perf_counter() - begun)

        hook = self.model.register_forward_hook(first)
        try:
            yield
        finally:
            hook.remove()

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

    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Row], Any, Call, int | None] | Bypass:
        """Load what is stored of the prompt, or say why not. Trouble with the cache is a bypass, never an error."""
        try:
            bound = self._signature.bind(*args, **kwargs).arguments
        except TypeError:
            return Bypass.INPUTS  # `generate` itself says what is wrong
        arguments = {**bound.pop("kwargs", {}), **bound}
        own = arguments.get("past_key_values")
        try:
            option = self._options(arguments)
            ids: Any = arguments["inputs"] if arguments.get("inputs") is not None else arguments.get("input_ids")
            refusal = self._refusal(arguments, ids, option)
            if refusal is not None:
                return refusal
            pads = self._padding(ids, arguments.get("attention_mask"), option)
            cache = self._cache(own, ids.shape[1], arguments, option)
            if isinstance(pads, Bypass) or isinstance(cache, Bypass):
                return pads if isinstance(pads, Bypass) else cache
            loaded = self._load(ids, pads, cache)
        except Exception:
            logger.warning("the KV cache could not be read; the call is computed without it", exc_info=True)
            self.counts["errors"] += 1
            return Bypass.ERROR
        if isinstance(loaded, Bypass):
            return loaded
        eos, pad = option("eos_token_id"), option("pad_token_id")
        trailing = pad if pad is not None else eos[0] if isinstance(eos, list | tuple) else eos
        return *loaded, None if len(ids) == 1 else trailing

    def _options(self, arguments: dict[str, Any]) -> Callable[[str], Any]:
        """What `generate` will take an option to be."""
        given = arguments.get("generation_config")
        defaults = [vars(config) for config in (given, self.model.generation_config) if config is not None]
        return lambda name: next((o[name] for o in (arguments, *defaults) if o.get(name) is not None), None)

    def _cache(self, own: Any, columns: int, arguments: dict[str, Any], option: Callable[[str], Any]) -> Any | Bypass:
        """The empty cache to fill: the caller's own, or one as `generate` would make it."""
        if own is not None:
            return usable(own, self.geometry, columns)
        kind = arguments.get("cache_implementation")
        # Where it is not an argument, it cannot be taken back. "hybrid" in a model's defaults is as good as none.
        default = self._options({"generation_config": arguments.get("generation_config")})("cache_implementation")
        if default not in (None, "hybrid") or kind not in (None, "dynamic", "static"):
            return Bypass.CACHE_KIND
        if kind != "static":
            return new_cache(self.geometry, self.model.config)
        new, limit = option("max_new_tokens"), option("max_length")
        if new is None and limit is None:
            return Bypass.CACHE_KIND
        # Never shorter than before: a compiled model is compiled again for every length.
        self._static_tokens = max(self._static_tokens, columns + new if new is not None else limit)
        return new_cache(self.geometry, self.model.config, self._static_tokens)

    def _refusal(self, arguments: dict[str, Any], ids: Any, option: Callable[[str], Any]) -> Bypass | None:
        """Why this call cannot be served exactly, or None."""
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            return Bypass.INPUTS
        if any(value is not None for name, value in arguments.items() if name not in self._known):
            return Bypass.INPUTS
        if option("use_cache") is False:
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

    def _padding(self, ids: torch.Tensor, mask: Any, option: Callable[[str], Any]) -> list[int] | Bypass:
        """Columns of padding before each row, by the caller's mask or the one `generate` infers. Any other padding is
        refused: `generate` itself continues such rows after the padding."""
        if mask is None:
            pad, eos = option("pad_token_id"), option("eos_token_id")
            if pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos]):
                return [0] * len(ids)
            mask = ids != pad
        if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
            return Bypass.PADDING
        pads: list[int] = (mask == 0).sum(dim=1).tolist()
        columns = torch.arange(ids.shape[1], device=mask.device)
        left = bool(((columns >= torch.tensor(pads, device=mask.device)[:, None]) == (mask == 1)).all())
        if not left or max(pads) == ids.shape[1] or (any(pads) and not self._positions):
            return Bypass.PADDING
        return pads

    def _load(self, ids: torch.Tensor, pads: list[int], cache: Any) -> tuple[list[Row], Any, Call] | Bypass:
        """Fill the cache with the longest stored prefix that all rows have, at least one token short of each."""
        identity = self.pipeline.tenant_identity(self.identity(), self.tenant)
        if identity is None:
            return Bypass.TENANT
        record(cache)
        rows: list[Row] = []
        for tokens, pad in zip(ids.cpu().numpy(), pads, strict=True):
            rows.append(Row(TokenChain(identity), pad))
            rows[-1].chain.extend(tokens[pad:])
        size, lengths = self.pipeline.layout.chunk_tokens, [ids.shape[1] - pad for pad in pads]
        wanted = [row.chain.keys[: (length - 1) // size] for row, length in zip(rows, lengths, strict=True)]
        # If one row must be computed from its beginning, what is stored of the others is of no use.
        if not all(row.pad or keys for row, keys in zip(rows, wanted, strict=True)):
            wanted = []
        with ExitStack() as held:
            transfers = [self.pipeline.fetch(keys) for keys in wanted]
            for transfer in transfers:
                held.callback(transfer.cancel)
            leases = [held.enter_context(transfer.result()) for transfer in transfers]
            columns = min((row.pad + len(lease) * size for row, lease in zip(rows, leases, strict=False)), default=0)
            reused = [max(0, columns - pad) for pad in pads]
            if any(reused):
                self.mover.fill(cache, rows, leases, columns)
            sources: list[str] = []
            for i, row in enumerate(rows):
                served = leases[i].sources[: -(-reused[i] // size)] if reused[i] else []
                sources += [*served, *[COMPUTED] * (len(row.chain.keys) - len(served))]
            miss = next((lease.reason for lease in leases if lease.reason is not None), None)
        return (
            rows,
            cache,
            Call(
                prompt_tokens=sum(lengths),
                reused_tokens=sum(reused),
                sources=tuple(sources),
                miss=miss,
                chunk_tokens=size,
            ),
        )

    def _store(self, rows: Sequence[Row], cache: Any, sequences: torch.Tensor, trailing: int | None) -> int:
        """Store the whole chunks of prompts and answers that are not stored yet. Trouble is counted, never raised.

        `trailing`: the token that `generate` appends to rows which ended early.
        """
        try:
            columns = self.mover.tokens(cache, len(sequences))
            if columns > sequences.shape[1]:
                raise Unsupported(f"`generate` left {columns} tokens of KV for {sequences.shape[1]} tokens")
            if not self._guard.holds():
                raise Unsupported("the weights changed during the call")
            stored = 0
            for r, row in enumerate(rows):
                tokens = sequences[r, row.pad : columns].cpu().numpy()
                done = len(row.chain.keys) * row.chain.chunk_tokens
                if trailing is not None:
                    ended = np.flatnonzero(tokens[done:] != trailing)
                    tokens = tokens[: done + (int(ended[-1]) + 1 if ended.size else 0)]
                row.chain.extend(tokens[done:])
                stored += self.pipeline.store(row.chain.keys, partial(self.mover.save, cache, r, row.pad))
            return stored
        except Exception:
            logger.warning("the KV of a call could not be stored", exc_info=True)
            self.counts["errors"] += 1
            return 0
        finally:
            unrecord(cache)
