"""Who a chunk belongs to: everything that decides whether stored bytes are right for a request.

Two runs may share KV only if every field here is equal. The digest of the whole identity is the first half
of every key and is the seed of the token chain, so a difference in any single field is a miss in every tier.
"""

from __future__ import annotations

import functools
import hmac
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lmcache_core import canonical
from lmcache_core.layout import KVLayout
from lmcache_core.types import IDENTITY_BYTES


@dataclass(frozen=True, slots=True)
class Identity:
    """The complete identity of a KV cache. Names are data here, never paths.

    Every field takes part in the digest: a new field needs no other change (a test flips each one by reflection).
    """

    model: str
    """Model name as the operator writes it."""
    weights: str
    """Fingerprint of the weights (see `fingerprint_weights`), hex."""
    layout: KVLayout
    """Geometry and byte order of a chunk, dtype, chunk size and engine packing."""
    revision: str = ""
    """Model revision, or the epoch of an online weight update."""
    lora: str = ""
    """LoRA name and content id, empty without an adapter."""
    rope: str = ""
    """Rope parameters as canonical text: base, scaling, original length."""
    tokenizer: str = ""
    """Digest of the tokenizer, hex; empty when the engine is fed token ids."""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    kv_group: int = 0
    """Index of the KV cache group for models with several."""
    engine: str = ""
    """Engine and attention numerics when they change the stored bytes, e.g. `vllm-cpu`."""
    salt: str | None = None
    """Tenant salt; requests with different salts never share. None and "" differ."""
    fidelity: str = ""
    """Lossy encodings the bytes may have been through (`Pipeline.fidelity`), so that they never pass for exact ones;
    empty where all bytes are as they were computed."""

    def __post_init__(self) -> None:
        for name in ("tp_rank", "tp_size", "pp_rank", "pp_size", "kv_group"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an int, not {getattr(self, name)!r}: True == 1, but not in a digest")

    def with_request(self, *, lora: str | None = None, salt: str | None = None) -> Identity:
        """The identity of one request: this one with its adapter and tenant salt, where it has its own."""
        return replace(self, lora=self.lora if lora is None else lora, salt=self.salt if salt is None else salt)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical encoding, 32 bytes."""
        return _digest(self)

    @property
    def prefix(self) -> bytes:
        """First half of every key of this identity."""
        return self.digest[:IDENTITY_BYTES]


@functools.lru_cache(maxsize=4096)
def _digest(identity: Identity) -> bytes:
    """Remembered: adapters ask for it with every request."""
    record: dict[str, canonical.Canonical] = {"kind": "lmcache-identity", "version": 1}
    for field in fields(identity):
        value = getattr(identity, field.name)
        if field.name == "fidelity" and not value:
            continue  # younger than version 1: exact chunks keep the keys they have always had
        record["." + field.name] = value.id if isinstance(value, KVLayout) else value
    return canonical.digest(record)


def fingerprint_weights(path: Path, sample_bytes: int = 1 << 20) -> str:
    """Digest of a model directory's weights, hex, in milliseconds.

    Covers the name, size, first and last `sample_bytes` and 16 samples between of every weight file, and the
    whole of `config.json` (and adapter config) beside them. Raise `FileNotFoundError` when there are no weights.
    """
    suffixes = {".safetensors", ".bin", ".gguf", ".pt", ".pth"}
    files = sorted(p for p in path.iterdir() if p.suffix in suffixes and p.is_file()) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no weight files ({', '.join(sorted(suffixes))}) in {path}")
    parts: list[canonical.Canonical] = []
    for extra in ("config.json", "adapter_config.json"):
        config = path / extra
        parts.append(config.read_bytes() if path.is_dir() and config.is_file() else None)
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            samples: list[bytes] = [stream.read(sample_bytes)]
            for i in range(1, 17):
                stream.seek(size * i // 17)
                samples.append(stream.read(4096))
            stream.seek(max(0, size - sample_bytes))
            samples.append(stream.read(sample_bytes))
        parts.append((file.name, size, canonical.digest(tuple(samples))))
    return canonical.digest(tuple(parts)).hex()


def tenant_salt(master: bytes, tenant: str) -> str:
    """A tenant's salt, made on the server so that none can be guessed: HMAC-SHA256(master, tenant), hex (RFC 2104)."""
    return hmac.digest(master, canonical.encode(tenant), "sha256").hex()
