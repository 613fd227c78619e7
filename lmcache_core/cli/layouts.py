"""Chunk layouts of models: a few presets, or what a model's `config.json` says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lmcache_core.errors import LMCacheError
from lmcache_core.layout import DTYPE_BYTES, KVLayout
from lmcache_core.spelling import closest

PRESETS: dict[str, tuple[str, int, int, int, int]] = {
    "smollm2-135m": ("bfloat16", 30, 2, 3, 64),
    "qwen2.5-7b": ("bfloat16", 28, 2, 4, 128),
    "llama-3.1-8b": ("bfloat16", 32, 2, 8, 128),
    "llama-3.1-70b": ("bfloat16", 80, 2, 8, 128),
    "deepseek-v3": ("bfloat16", 61, 1, 1, 576),
}
"""dtype, layers, planes (1 for MLA), KV heads, elements per head."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option that chooses a layout."""
    parser.add_argument(
        "--model",
        metavar="DIR|PRESET",
        help=f"a model directory (its config.json is read) or one of {', '.join(PRESETS)}",
    )


def preset(name: str, chunk_tokens: int) -> KVLayout:
    """The layout of a preset, all ranks together."""
    dtype, layers, planes, heads, dim = PRESETS[name]
    return KVLayout("lknhd", dtype, layers, planes, heads, dim, chunk_tokens, chunk_tokens)


def flat(token_bytes: int, chunk_tokens: int) -> KVLayout:
    """A layout with `token_bytes` bytes per token and no further structure."""
    return KVLayout("lknhd", "uint8", 1, 1, 1, token_bytes, chunk_tokens, chunk_tokens)


def of_model(model: str, chunk_tokens: int) -> KVLayout:
    """The layout of a preset or of a model directory. Raise `LMCacheError` with the likely fix."""
    if model in PRESETS:
        return preset(model, chunk_tokens)
    try:
        file = Path(model).expanduser() / "config.json"
    except RuntimeError:  # no such home
        file = Path(model) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = closest(model, PRESETS)
        hint = f"did you mean `{near}`? " if near else ""
        raise LMCacheError(
            f"--model {model}: no directory with a config.json, and no preset; {hint}presets: {', '.join(PRESETS)}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise LMCacheError(f"--model {model}: cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise LMCacheError(f"--model {model}: {file} does not hold a model configuration")
    try:
        return _of_config(config, file, chunk_tokens)
    except ValueError as error:
        raise LMCacheError(f"--model {model}: {file}: {error}") from error


def _of_config(config: dict[str, Any], file: Path, chunk_tokens: int) -> KVLayout:
    text = config.get("text_config")
    if "num_hidden_layers" not in config and isinstance(text, dict):
        config = {**config, **text}
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    layers = _count(config, file, "num_hidden_layers")
    if dtype not in DTYPE_BYTES:
        raise LMCacheError(f"{file}: dtype `{dtype}` is not one of {', '.join(DTYPE_BYTES)}")
    if config.get("kv_lora_rank"):
        latent = _count(config, file, "kv_lora_rank") + _count(config, file, "qk_rope_head_dim")
        return KVLayout("lknhd", dtype, layers, 1, 1, latent, chunk_tokens, chunk_tokens)
    heads = _count(config, file, "num_attention_heads")
    kv_heads = _count(config, file, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    dim = _count(config, file, "head_dim") if config.get("head_dim") else _count(config, file, "hidden_size") // heads
    return KVLayout("lknhd", dtype, layers, 2, kv_heads, dim, chunk_tokens, chunk_tokens)


def _count(config: dict[str, Any], file: Path, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LMCacheError(f"{file}: `{name}` must be a positive whole number, not {value!r}")
    return value
