"""The `cachegen` bitstream: tables, header, row table and checks (docs/codec.md). Reads and refuses; codes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import xxhash

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC: Final = 0x564B434C
VERSION: Final = 1
DTYPES: Final = {"bfloat16": 0, "float16": 1, "float32": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}
ITEM_BYTES: Final = (2, 2, 4, 1, 1)
RAW, ANCHORED, PER_TOKEN, LOSSLESS = range(4)
MAX_TOKENS, MAX_CHANNELS, MAX_LAYERS, MAX_RAW = 1024, 16384, 1024, 16
AUTO: Final = -1
"""`Coding.n_raw`: decide from the data whether the chunk begins a sequence."""
GROUP: Final = 64
LANES: Final = 32
BASE_RANGE: Final = (-88, 32)
AUX: Final = 16
"""Bytes of the auxiliary section of a blob with a transform: u64 position of the first token, u64 0."""
MOST_START: Final = (1 << 48) - 1
_WEIGHT: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


class CodecError(ValueError):
    """A blob that is not what it should be: truncated, damaged, of another version, shape or profile."""


def align16(value: int) -> int:
    return (value + 15) & ~15


@dataclass(frozen=True, slots=True)
class Shape:
    """What a chunk is: `[layer][plane][token][channel]` of `dtype`, a key of `DTYPES`."""

    dtype: str
    layers: int
    planes: int
    tokens: int
    channels: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} cannot be coded; one of {', '.join(DTYPES)}")
        for name, least, most in (
            ("layers", 1, MAX_LAYERS),
            ("planes", 1, 2),
            ("tokens", 1, MAX_TOKENS),
            ("channels", 1, MAX_CHANNELS),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be {least} to {most}, not {getattr(self, name)}")
        if self.bound >= 1 << 32:
            raise ValueError(f"a chunk of {self.nbytes} bytes is too large to code: fewer tokens in a chunk")

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[DTYPES[self.dtype]]

    @property
    def rows(self) -> int:
        return self.layers * self.planes

    @property
    def groups(self) -> int:
        return -(-self.channels // GROUP)

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.channels * self.item

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def bound(self) -> int:
        """Most bytes a blob without transform can take: every row falls back to its raw form. With one, `AUX` more."""
        return 64 + align16(4 * self.rows) + self.rows * (16 + align16(self.row_bytes))


class Named(Protocol):
    """A profile, as far as a header is concerned."""

    @property
    def number(self) -> int: ...


@dataclass(frozen=True, eq=False, slots=True)
class Coding:
    """How a chunk is to be coded; nothing a decoder needs to be told."""

    level: int
    """Number written to the header, for people."""
    modes: NDArray[np.uint8]
    """Mode of each row (`layer * planes + plane`): `ANCHORED`, `PER_TOKEN`, `LOSSLESS` or `RAW`."""
    offsets: NDArray[np.int16]
    """Of each row: log2 of (quantiser step / root mean square) in 1/16, -160 to 32."""
    n_raw: int = 0
    """First tokens kept as they are, 0 to 16, or `AUTO`."""
    tile_tokens: int = 256
    """Tokens of one entropy-coded tile: what token ranges can be decoded alone."""

    def checked(self, shape: Shape) -> Coding:
        """Self, with contiguous arrays. Raise `ValueError` when it does not fit `shape`."""
        modes = np.ascontiguousarray(self.modes, np.uint8)
        offsets = np.ascontiguousarray(self.offsets, np.int16)
        if modes.shape != (shape.rows,) or offsets.shape != (shape.rows,):
            raise ValueError(f"modes {modes.shape} and offsets {offsets.shape} for {shape.rows} rows")
        if modes.max() > LOSSLESS or offsets.min() < -160 or offsets.max() > 32:
            raise ValueError("modes must be 0 to 3 and offsets -160 to 32")
        if not (self.n_raw == AUTO or 0 <= self.n_raw <= MAX_RAW):
            raise ValueError(f"n_raw must be 0 to {MAX_RAW} or AUTO, not {self.n_raw}")
        if not 1 <= self.tile_tokens <= MAX_TOKENS or not 0 <= self.level <= 255:
            raise ValueError(f"tile_tokens must be 1 to {MAX_TOKENS}, level 0 to 255")
        return Coding(self.level, modes, offsets, self.n_raw, self.tile_tokens)


@dataclass(frozen=True, eq=False, slots=True)
class Tables:
    """The static models: `freq[table, symbol]` (of 2048), and the thresholds by which an encoder chooses."""

    lossy: list[NDArray[np.int64]]
    """Frequencies of symbols -S..S."""
    lossless: list[NDArray[np.int64]]
    """Frequencies of symbols 0..N-1."""
    variance: NDArray[np.int64]
    """Thresholds of variance between lossy tables, in 1/256."""
    mean: NDArray[np.int64]
    """Thresholds of mean between lossless tables, in 1/16."""
    id: int
    support: NDArray[np.int64] = field(init=False)
    """S of each lossy table."""
    length: NDArray[np.int64] = field(init=False)
    """N of each lossless table."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "support", np.array([t.size // 2 for t in self.lossy]))
        object.__setattr__(self, "length", np.array([t.size for t in self.lossless]))


def _tables() -> Tables:
    text = Path(__file__).with_name("tables.inc").read_text(encoding="ascii")
    numbers = np.array([int(word) for word in text.replace(",", " ").split()])
    identity = xxhash.xxh3_64_intdigest(numbers.astype("<u2").tobytes())
    at = 2
    lossy, lossless = [], []
    for _ in range(numbers[0]):
        half = numbers[at + 1 : at + 2 + numbers[at]]
        at += 1 + half.size
        lossy.append(np.concatenate([half[:0:-1], half]))
    for _ in range(numbers[1]):
        lossless.append(numbers[at + 1 : at + 1 + numbers[at]])
        at += 1 + lossless[-1].size
    variance, mean = numbers[at : at + len(lossy) - 1], numbers[at + len(lossy) - 1 :]
    return Tables(lossy, lossless, variance, mean, identity)


TABLES: Final = _tables()

HEADER: Final = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "u1"),
        ("dtype", "u1"),
        ("level", "u1"),
        ("planes", "u1"),
        ("layers", "<u2"),
        ("tokens", "<u2"),
        ("channels", "<u4"),
        ("tile_tokens", "<u2"),
        ("n_raw", "u1"),
        ("transform", "u1"),
        ("total", "<u4"),
        ("tables", "<u8"),
        ("profile", "<u8"),
        ("aux", "<u4"),
        ("reserved", "<u4", 3),
        ("check", "<u8"),
    ]
)
ROW: Final = np.dtype(
    [("check", "<u8"), ("row", "<u2"), ("mode", "u1"), ("code", "u1"), ("base", "<i2"), ("reserved", "<u2")]
)


def check64(*parts: NDArray[np.uint8]) -> int:
    """Position-weighted sum of the parts' 32-bit words, one part following the other (docs/codec.md)."""
    words = np.concatenate([part.view("<u4") for part in parts]).astype(np.uint64)
    plain = int(words.sum(dtype=np.uint64))
    weighted = int((words * np.arange(1, words.size + 1, dtype=np.uint64)).sum(dtype=np.uint64))
    return (plain + weighted * _WEIGHT) & _MASK


@dataclass(frozen=True, eq=False, slots=True)
class Parsed:
    """A header that was found valid, and where the rows lie."""

    level: int
    n_raw: int
    tile_tokens: int
    start: int
    """Position of the first token in its sequence; -1 without a transform."""
    starts: NDArray[np.int64]
    """Blob offset of each row, then of the end."""


def parse(blob: NDArray[np.uint8], shape: Shape, profile: Named | None = None) -> Parsed:
    """Read and verify header and row table of a blob of `shape`. Raise `CodecError` saying what is wrong."""
    if blob.size < 64 + align16(4 * shape.rows) + 16 * shape.rows:
        raise CodecError(f"{blob.size} bytes are too few for {shape.rows} rows")
    head: Any = blob[:64].view(HEADER)[0]
    turned = profile is not None and head["transform"] == 1
    expected = {
        "magic": MAGIC,
        "version": VERSION,
        "dtype": DTYPES[shape.dtype],
        "planes": shape.planes,
        "layers": shape.layers,
        "tokens": shape.tokens,
        "channels": shape.channels,
        "transform": int(turned),
        "total": blob.size,
        "tables": TABLES.id,
        "profile": profile.number if profile is not None and turned else 0,
        "aux": AUX if turned else 0,
    }
    for name, value in expected.items():
        if int(head[name]) != value:
            raise CodecError(f"{name} is {int(head[name])}, expected {value}")
    table_end = 64 + align16(4 * shape.rows)
    rows_at = table_end + int(head["aux"])
    if blob.size < rows_at + 16 * shape.rows:
        raise CodecError(f"{blob.size} bytes are too few for {shape.rows} rows")
    if int(head["check"]) != check64(blob[:56], blob[64:rows_at]):
        raise CodecError("the header's check does not match")
    tile_tokens, n_raw = int(head["tile_tokens"]), int(head["n_raw"])
    if head["reserved"].any() or not 1 <= tile_tokens <= MAX_TOKENS or n_raw > min(MAX_RAW, shape.tokens):
        raise CodecError(f"tile_tokens {tile_tokens}, n_raw {n_raw} or a reserved field is out of range")
    start = -1
    if turned:
        start, reserved = (int(number) for number in blob[table_end:rows_at].view("<u8"))
        if start > MOST_START or reserved:
            raise CodecError(f"a chunk cannot start at token {start}, or a reserved field is not 0")
    ends = blob[64 : 64 + 4 * shape.rows].view("<u4").astype(np.int64)
    starts = np.concatenate([[rows_at], ends])
    if (
        (np.diff(starts) < 16).any()
        or (starts % 16).any()
        or starts[-1] != blob.size
        or blob[64 + 4 * shape.rows : table_end].any()
    ):
        raise CodecError("the row table is out of order")
    return Parsed(int(head["level"]), n_raw, tile_tokens, start, starts)


def header(
    shape: Shape, level: int, n_raw: int, tile_tokens: int, lengths: Sequence[int], profile: Named | None, start: int
) -> NDArray[np.uint8]:
    """What comes before the rows, which take `lengths` bytes: header, row table, auxiliary section."""
    table_end = 64 + align16(4 * shape.rows)
    out = np.zeros(table_end + (AUX if profile is not None else 0), np.uint8)
    ends = out.size + np.cumsum(lengths)
    head: Any = out[:64].view(HEADER)[0]
    head["magic"], head["version"], head["dtype"], head["level"] = MAGIC, VERSION, DTYPES[shape.dtype], level
    head["planes"], head["layers"], head["tokens"], head["channels"] = (
        shape.planes,
        shape.layers,
        shape.tokens,
        shape.channels,
    )
    head["tile_tokens"], head["n_raw"], head["total"], head["tables"] = tile_tokens, n_raw, ends[-1], TABLES.id
    if profile is not None:
        head["transform"], head["profile"], head["aux"] = 1, profile.number, AUX
        out[table_end:].view("<u8")[0] = start
    out[64 : 64 + 4 * shape.rows].view("<u4")[:] = ends
    head["check"] = check64(out[:56], out[64:])
    return out
