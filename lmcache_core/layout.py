"""What the raw bytes of a chunk mean: an explicit, versioned descriptor, never guessed from shapes.

A chunk holds `chunk_tokens` tokens of every layer of one KV group of one rank. Two orders exist:

* `"lknhd"`: canonical and portable. `[layer][plane][token][head][dim]`, row-major, elements of `dtype`.
  `planes` is 2 (K, then V) or 1 (MLA latent). Any code that must understand K and V asks for this one.
* `"pages"`: the engine's pages as they are. `[layer][block][page bytes]`; `packing` names what is inside a
  page (engine, format, CPU instruction set). Opaque: only an engine with the same `packing` can use it.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Literal

from lmcache_core import canonical

LAYOUT_VERSION = 1

DTYPE_BYTES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "int8": 1,
}


_COUNTS = ("num_layers", "kv_heads", "head_dim", "chunk_tokens", "block_tokens")


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Geometry of one chunk. Sizes in elements unless the name says bytes."""

    order: Literal["lknhd", "pages"]
    dtype: str
    """Element type by its torch name, a key of `DTYPE_BYTES`."""
    num_layers: int
    planes: int
    """2 for separate or packed K and V, 1 for an MLA latent."""
    kv_heads: int
    """KV heads held by this rank."""
    head_dim: int
    """Elements of one head of one plane."""
    chunk_tokens: int
    block_tokens: int
    """Tokens in one engine block; `chunk_tokens` where the engine has no blocks."""
    packing: str = ""
    """For `order="pages"`: format of a page, e.g. `vllm-cpu/1/amx`."""
    page_bytes: int = 0
    """For `order="pages"`: bytes of one block in one layer; 0 means blocks are unpadded."""
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not supported; one of {', '.join(DTYPE_BYTES)}")
        for name in ("planes", "page_bytes", "version", *_COUNTS):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an int, not {getattr(self, name)!r}: True == 1, but not in a digest")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.planes not in (1, 2):
            raise ValueError(f"planes must be 1 (MLA) or 2 (K and V), not {self.planes}")
        if self.chunk_tokens % self.block_tokens:
            raise ValueError(
                f"chunk_tokens {self.chunk_tokens} must be a multiple of the engine's block, {self.block_tokens} tokens"
            )
        if self.order == "pages" and not self.packing:
            raise ValueError("order 'pages' needs `packing`: opaque pages without a named format could be misread")

    @property
    def blocks(self) -> int:
        """Engine blocks in one chunk."""
        return self.chunk_tokens // self.block_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer as stored in the chunk."""
        dense = self.planes * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype] * self.block_tokens
        return self.page_bytes or dense

    @property
    def chunk_bytes(self) -> int:
        """Raw bytes of one chunk."""
        return self.num_layers * self.blocks * self.block_bytes

    @property
    def token_bytes(self) -> int:
        """Raw bytes of one token over all layers (rounded down for padded pages)."""
        return self.chunk_bytes // self.chunk_tokens

    @property
    def id(self) -> bytes:
        """16-byte digest of every field: stored in each object and compared on load."""
        return _id(self)


@functools.lru_cache(maxsize=256)
def _id(layout: KVLayout) -> bytes:
    return canonical.digest(asdict(layout))[:16]
