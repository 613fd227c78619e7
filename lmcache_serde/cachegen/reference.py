"""The `cachegen` codec in NumPy: the plain form of docs/codec.md, which the native ones must equal byte for byte.

Oracle of the tests, and what runs where no compiler was at hand. A function here takes whole rows or all tiles of a
chunk at once; nothing is tuned beyond that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lmcache_serde.cachegen.format import (
    ANCHORED,
    AUTO,
    BASE_RANGE,
    DTYPES,
    GROUP,
    ITEM_BYTES,
    LANES,
    LOSSLESS,
    PER_TOKEN,
    RAW,
    ROW,
    TABLES,
    CodecError,
    Coding,
    Parsed,
    Shape,
    align16,
    check64,
    header,
    parse,
)
from lmcache_serde.cachegen.transform import HIGHEST, MOST, exponents, transform, untransform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lmcache_serde.cachegen.profile import Profile

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

LOW: Final = 1 << 15
"""rANS: every state is at least this between steps."""
_STEP: Final = np.array(
    [0x3F800000, 0x3F8B95C2, 0x3F9837F0, 0x3FA5FED7, 0x3FB504F3, 0x3FC5672A, 0x3FD744FD, 0x3FEAC0C7], np.uint32
).view(np.float32)
_INVERSE: Final = np.array(
    [0x3F800000, 0x3F6AC0C7, 0x3F5744FD, 0x3F45672A, 0x3F3504F3, 0x3F25FED7, 0x3F1837F0, 0x3F0B95C2], np.uint32
).view(np.float32)
_UNSIGNED: Final[dict[int, np.dtype[Any]]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
_BITS: Final = {
    "bfloat16": (8, 7),
    "float16": (5, 10),
    "float32": (8, 23),
    "float8_e4m3fn": (4, 3),
    "float8_e5m2": (5, 2),
}
"""Exponent and mantissa bits."""


def _log_thresholds() -> Ints:
    """ceil(2^(31 + k/32)) for k = 1..31: the smallest integer whose 32nd power reaches 2^(992 + k)."""
    found = []
    for k in range(1, 32):
        low, high = 1 << 31, 1 << 32
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if middle**32 >= 1 << (992 + k) else (middle + 1, high)
        found.append(low)
    return np.array(found)


_LOG: Final = _log_thresholds()


def lg(value: int) -> int:
    """32 * log2 of an integer >= 1, rounded down."""
    power = value.bit_length() - 1
    scaled = value << (31 - power) if power <= 31 else value >> (power - 31)
    return 32 * power + int((scaled >= _LOG).sum())


def _eight_bits(dtype: str) -> Floats:
    """Values of the 128 non-negative codes; NaN where they are no number."""
    exponent_bits, mantissa_bits = _BITS[dtype]
    bias = (1 << (exponent_bits - 1)) - 1
    codes = np.arange(128)
    exponent, mantissa = codes >> mantissa_bits, (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    values[127 if dtype == "float8_e4m3fn" else 124 :] = np.nan
    if dtype == "float8_e5m2":
        values[124] = np.inf
    return values.astype(np.float32)


def to_float(bits: NDArray[Any], dtype: str) -> Floats:
    """fp32 values of elements given as unsigned integers."""
    if dtype == "float32":
        return np.asarray(bits.view(np.float32))
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    values = _eight_bits(dtype)
    return np.asarray(np.concatenate([values, -values])[bits], np.float32)


def from_float(values: Floats, dtype: str) -> NDArray[Any]:
    """Elements as unsigned integers, rounded as docs/codec.md says; `values` are finite."""
    word = values.view(np.uint32)
    if dtype == "float32":
        return word
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16
    if dtype == "bfloat16":
        return rounded.astype(np.uint16)
    grid = _eight_bits(dtype)
    grid = grid[np.isfinite(grid)]
    size = np.minimum(np.abs((rounded << 16).view(np.float32)), grid[-1])
    above = np.searchsorted(grid, size).clip(1)
    low, high = grid[above - 1], grid[above]
    up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    return np.asarray(above - 1 + up + (word >> 31 << 7), np.uint8)


def _scale(table: Floats, code: Any, power: Any) -> Floats:
    return np.asarray(np.ldexp(table[np.asarray(code) & 7], power), np.float32)


@dataclass(eq=False, slots=True)
class _Row:
    """A row on its way to (or from) its bytes: symbols `[tokens][64 G]` and what goes before them."""

    mode: int
    tables: Ints
    symbols: Ints
    side: list[Bytes]
    code: int = 0
    base: int = 0
    remainder: NDArray[np.uint32] | None = None
    gain: Ints | None = None


def _step_code(ratio: int, offset: int, exponent: int, base: int) -> int:
    rms = (ratio + 2) >> 2
    return min(255, max(0, ((rms + offset + 16 * (exponent - 13) + 1) >> 1) - 8 * base))


def _token_codes(x: Floats, offset: int, base: int) -> Ints:
    most = exponents(x).max(1)
    least = base + 28 - 40
    fixed = np.rint(x * np.ldexp(np.float32(1), 13 - most.clip(least))[:, None]).astype(np.int64)
    sums, width = (fixed * fixed).sum(1), lg(x.shape[1])
    return np.array(
        [
            _step_code(lg(int(v)) - width, offset, int(e), base) if e >= least else 0
            for v, e in zip(sums, most, strict=True)
        ]
    )


def _row_exponent(x: Floats, dtype: str) -> int | None:
    """E of docs/codec.md, or None where the row must stay raw."""
    exponent = int(exponents(x).max())
    if exponent == -1000:
        return 0
    return exponent if -60 <= exponent <= HIGHEST[dtype] else None


def _predict(
    q: Ints, anchor: Ints, shift: Ints, reach: Ints, moment: Ints, needed: Ints, several: bool
) -> tuple[Ints, Ints, Ints]:
    """Gain of each channel, with the moment and the support it needs."""
    n = len(q)
    step = np.diff(q, axis=0)
    energy, widest = (step * step).sum(0), np.abs(step).max(0, initial=0)
    first = reach if several else np.abs(q[0] - anchor)
    moments = [moment, (2 * moment + 4 * n * energy + n * n) >> 3, n * energy]
    needs = [needed, np.maximum(first, (reach + widest + 1) >> 1), np.maximum(first, widest)]
    gain = np.zeros_like(shift)
    for g in (1, 2):
        better = (shift == 0) & (needs[g] <= 127) & (moments[g] < moment)
        moment, needed = np.where(better, moments[g], moment), np.where(better, needs[g], needed)
        gain = np.where(better, g, gain)
    return moment, needed, gain


def _quantise(x: Floats, mode: int, offset: int, dtype: str, spans: int, most: int = 32767) -> _Row | None:
    """Modes 1 and 2, quantised to at most `most`; None where the row must stay raw."""
    n, channels = x.shape
    exponent = _row_exponent(x, dtype)
    if exponent is None:
        return None
    base = exponent - 28
    if mode == ANCHORED:
        fixed = np.rint(x * np.ldexp(np.float32(1), 13 - exponent)).astype(np.int64)
        total = int((n * (fixed * fixed).sum(0) - fixed.sum(0) ** 2).sum())
        codes = np.array([_step_code(lg(total) - lg(n * n * channels), offset, exponent, base) if total else 0])
    else:
        codes = _token_codes(x, offset, base)
    inverse = _scale(_INVERSE, codes, -((codes >> 3) + base))[:, None]
    q = np.rint(x * inverse).astype(np.int64)
    if np.abs(q).max() > most:
        return None
    q1, q2 = q.sum(0), (q * q).sum(0)
    anchor = (2 * q1 + n) // (2 * n) if mode == ANCHORED else np.zeros_like(q1)
    reach = np.maximum(q.max(0) - anchor, anchor - q.min(0))
    if reach.max() > 125 << 3:
        return None
    shift = np.where(reach <= 127, 0, 1 + (reach > 250) + (reach > 500))
    moment, needed = n * q2 - (q1 * q1 if mode == ANCHORED else 0), np.where(shift > 0, (reach >> shift) + 2, reach)
    gain = np.zeros_like(shift)
    if mode == ANCHORED:
        moment, needed, gain = _predict(q, anchor, shift, reach, moment, needed, spans > 1)
    tables = ((moment << 8)[:, None] > TABLES.variance * n * n << 2 * shift[:, None]).sum(1)
    while (short := TABLES.support[tables] < needed).any():
        tables = tables + short
    anchor = np.where(shift > 0, (anchor + (1 << shift >> 1)) >> shift, anchor)
    symbols = np.rint(x * np.ldexp(inverse, -shift)).astype(np.int64) - anchor
    padding = -channels % GROUP
    kinds = np.where(shift > 0, shift + 2, gain)
    tables, kinds, anchor = (np.pad(values, (0, padding)) for values in (tables, kinds, anchor))
    head = anchor.astype("<i2") if mode == ANCHORED else codes.astype(np.uint8)
    side = [head.view(np.uint8), (tables | kinds << 5).astype(np.uint8)]
    row = _Row(mode, tables, np.pad(symbols, ((0, 0), (0, padding))), side, base=base)
    row.gain = np.pad(gain, (0, padding))
    row.code = int(codes[0]) if mode == ANCHORED else 0
    return row


def _lossless(bits: NDArray[Any], dtype: str) -> _Row:
    n, channels = bits.shape
    exponent_bits, mantissa_bits = _BITS[dtype]
    fields = (bits >> mantissa_bits).astype(np.int64) & ((1 << exponent_bits) - 1)
    top = fields.max(0)
    symbols = top - fields
    tables = (16 * symbols.sum(0)[:, None] > TABLES.mean * n).sum(1)
    tables = np.where(TABLES.length[tables] <= symbols.max(0), TABLES.length.size - 1, tables)
    sign = bits >> (exponent_bits + mantissa_bits)
    remainder = (sign.astype(np.uint32) << mantissa_bits) | (bits & ((1 << mantissa_bits) - 1))
    padding = ((0, 0), (0, -channels % GROUP))
    tables, top = np.pad(tables, padding[1]), np.pad(top, padding[1])
    side = [top.astype(np.uint8), tables.astype(np.uint8)]
    return _Row(LOSSLESS, tables, np.pad(symbols, padding), side, remainder=np.pad(remainder, padding))


def _pack_remainder(remainder: NDArray[np.uint32], dtype: str) -> Bytes:
    """Byte planes, then bit planes, of one tile `[tokens][64]`."""
    width = _BITS[dtype][1] + 1
    planes = [(remainder >> 8 * k & 255).astype(np.uint8) for k in range(width >> 3)]
    bits = [
        np.packbits((remainder >> k & 1).astype(np.uint8), axis=1, bitorder="little") for k in range(width & ~7, width)
    ]
    packed = np.concatenate([plane.ravel() for plane in planes + bits])
    return np.pad(packed, (0, -packed.size % 16))


def _unpack_remainder(packed: Bytes, tokens: int, dtype: str) -> NDArray[np.uint32]:
    width = _BITS[dtype][1] + 1
    remainder = np.zeros((tokens, GROUP), np.uint32)
    size, at = tokens * GROUP, 0
    for k in range(width >> 3):
        remainder |= packed[at : at + size].reshape(tokens, GROUP).astype(np.uint32) << 8 * k
        at += size
    for k in range(width & ~7, width):
        plane = np.unpackbits(packed[at : at + size // 8].reshape(tokens, 8), axis=1, bitorder="little")
        remainder |= plane.astype(np.uint32) << k
        at += size // 8
    return remainder


def _remainder_bytes(tokens: int, dtype: str) -> int:
    width = _BITS[dtype][1] + 1
    return align16(tokens * (GROUP * (width >> 3) + 8 * (width & 7)))


def _model(lossless: bool) -> tuple[Ints, Ints, Ints]:
    """Frequencies and cumulative ones `[table][symbol + 128]`, and the symbol + 128 of each slot `[table][2048]`."""
    tables = TABLES.lossless if lossless else TABLES.lossy
    freq, cum = np.zeros((2, 64, 384), np.int64)
    symbol = np.zeros((64, 2048), np.int64)
    for i, table in enumerate(tables):
        first = 128 if lossless else 128 - table.size // 2
        freq[i, first : first + table.size] = table
        cum[i, first : first + table.size] = np.cumsum(table) - table
        symbol[i] = np.repeat(np.arange(first, first + table.size), table)
    return freq, cum, symbol


_MODELS: Final = (_model(False), _model(True))


def rans_encode(symbols: Ints, tables: Ints, lossless: bool) -> list[Bytes]:
    """States, then words, of tiles `[tile][token][64]` with `tables[tile][64]`; unpadded."""
    freqs, cums, _ = _MODELS[lossless]
    tiles, tokens, _ = symbols.shape
    x = np.full((tiles, LANES), LOW)
    emitted = np.zeros((tiles, 2 * tokens, LANES), bool)
    words = np.zeros((tiles, 2 * tokens, LANES), np.uint16)
    for step in reversed(range(2 * tokens)):
        table = tables[:, step & 1 :: 2]
        symbol = symbols[:, step >> 1, step & 1 :: 2] + 128
        freq = freqs[table, symbol]
        emit = x >= freq << 20
        emitted[:, step], words[:, step] = emit, x & 0xFFFF
        x = np.where(emit, x >> 16, x)
        x = (x // freq << 11) + x % freq + cums[table, symbol]
    states = x.astype("<u4")
    return [
        np.concatenate([states[i].view(np.uint8), words[i][emitted[i]].astype("<u2").view(np.uint8)])
        for i in range(tiles)
    ]


def rans_decode(states: Ints, words: Sequence[NDArray[np.uint16]], tokens: int, tables: Ints, lossless: bool) -> Ints:
    """Inverse of `rans_encode`: symbols `[tile][token][64]`. Raise `CodecError` if a tile does not end as it must."""
    freqs, cums, slots = _MODELS[lossless]
    tiles = len(words)
    count = np.array([w.size for w in words])
    stream = np.zeros((tiles, int(count.max()) + 1), np.int64)
    for i, w in enumerate(words):
        stream[i, : w.size] = w
    symbols = np.zeros((tiles, tokens, GROUP), np.int64)
    x, at, lines = states.copy(), np.zeros(tiles, np.int64), np.arange(tiles)[:, None]
    for step in range(2 * tokens):
        table = tables[:, step & 1 :: 2]
        slot = x & 2047
        symbol = slots[table, slot]
        x = freqs[table, symbol] * (x >> 11) + slot - cums[table, symbol]
        symbols[:, step >> 1, step & 1 :: 2] = symbol - 128
        low = x < LOW
        order = at[:, None] + np.cumsum(low, 1) - 1
        x = np.where(low, x << 16 | stream[lines, order.clip(0, stream.shape[1] - 1)], x)
        at += low.sum(1)
    if (x != LOW).any() or (at > count).any() or (count - at >= 8).any():
        raise CodecError("a tile does not end in its initial states")
    if any(w[end:].any() for w, end in zip(words, at, strict=True)):
        raise CodecError("the padding of a tile is not zero")
    return symbols


def _spans(coded: int, tile_tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + tile_tokens, coded)) for start in range(0, coded, tile_tokens)]


def _padded(parts: Iterable[Bytes]) -> Bytes:
    return np.concatenate([np.pad(part, (0, -part.size % 16)) for part in parts])


def _residual(row: _Row, first: int, last: int, part: slice) -> Ints:
    """Symbols of one tile: what remains after the prediction from the token before."""
    symbols = row.symbols[first:last, part]
    if row.gain is None:
        return symbols
    before = np.concatenate([np.zeros((1, GROUP), np.int64), symbols[:-1]])
    return np.asarray(symbols - ((row.gain[part] * before + 1) >> 1))


def _sink_tokens(bits: NDArray[Any], shape: Shape, coding: Coding) -> int:
    """What `n_raw = AUTO` comes to."""
    if shape.planes != 2 or shape.tokens < 32:
        return 0
    votes = np.zeros(4, np.int64)
    for row in range(1, shape.rows, 2):
        if coding.modes[row] != PER_TOKEN:
            continue
        x = to_float(bits[row], shape.dtype)
        yes = exponents(x[:4]).max(1) == -1000
        exponent = _row_exponent(x, shape.dtype)
        if exponent is not None:
            codes = _token_codes(x[:24], 0, exponent - 28)
            yes |= 16 * codes[:4] + 16 * 8 <= codes[8:].sum()
        votes += yes
    flagged = np.flatnonzero(2 * votes >= shape.layers)
    return int(flagged[-1]) + 1 if flagged.size else 0


def encode(shape: Shape, coding: Coding, chunk: Bytes, profile: Profile | None = None, start: int = 0) -> Bytes:
    """The blob of one chunk, given as its bytes; with a profile, its first token is at position `start`."""
    coding = coding.checked(shape)
    bits = chunk.view(_UNSIGNED[shape.item]).reshape(shape.rows, shape.tokens, shape.channels)
    n_raw = _sink_tokens(bits, shape, coding) if coding.n_raw == AUTO else min(coding.n_raw, shape.tokens)
    spans = _spans(shape.tokens - n_raw, coding.tile_tokens)
    rows: list[_Row | None] = []
    for number in range(shape.rows):
        coded, mode = bits[number, n_raw:], int(coding.modes[number])
        row = None
        if len(coded) and mode == LOSSLESS:
            row = _lossless(coded, shape.dtype)
        elif len(coded) and mode != RAW:
            x, offset = to_float(coded, shape.dtype), int(coding.offsets[number])
            if profile is None:
                row = _quantise(x, mode, offset, shape.dtype, len(spans))
            else:
                components = transform(profile, number, x, start + n_raw, HIGHEST[shape.dtype])
                if components is not None:
                    row = _quantise(components, mode, offset, "float32", len(spans), MOST)
        rows.append(row)
    tiles: dict[tuple[int, int, int], Bytes] = {}
    for lossless in (False, True):
        for first, last in spans:
            places, symbols, tables = [], [], []
            for number, row in enumerate(rows):
                if row is not None and (row.mode == LOSSLESS) is lossless:
                    for group in range(shape.groups):
                        part = slice(group * GROUP, (group + 1) * GROUP)
                        places.append((number, first, group))
                        symbols.append(_residual(row, first, last, part))
                        tables.append(row.tables[part])
            if places:
                tiles.update(zip(places, rans_encode(np.stack(symbols), np.stack(tables), lossless), strict=True))
    parts = []
    for number, row in enumerate(rows):
        plain = bits[number].reshape(-1).view(np.uint8)
        body, mode, code, base = plain, RAW, 0, 0
        if row is not None:
            sections = [bits[number, :n_raw].reshape(-1).view(np.uint8), *row.side]
            packed: list[Bytes] = []
            for first, last in spans:
                for group in range(shape.groups):
                    tile = tiles[number, first, group]
                    if row.remainder is not None:
                        rest = _pack_remainder(
                            row.remainder[first:last, group * GROUP : (group + 1) * GROUP], shape.dtype
                        )
                        tile = np.concatenate([tile[:128], rest, tile[128:]])
                    packed.append(tile)
            table = align16(4 * len(packed))
            before = 16 + sum(align16(section.size) for section in sections) + table
            tile_ends = before + np.cumsum([align16(tile.size) for tile in packed])
            if tile_ends[-1] <= 16 + align16(plain.size):
                body = _padded([*sections, tile_ends.astype("<u4").view(np.uint8), *packed])
                mode, code, base = row.mode, row.code, row.base
        body = np.pad(body, (0, -body.size % 16))
        out = np.concatenate([np.zeros(16, np.uint8), body])
        head: Any = out[:16].view(ROW)[0]
        head["row"], head["mode"], head["code"], head["base"] = number, mode, code, base
        head["check"] = check64(out[8:])
        parts.append(out)
    lengths = [part.size for part in parts]
    return np.concatenate([header(shape, coding.level, n_raw, coding.tile_tokens, lengths, profile, start), *parts])


class _Reader:
    """Cuts a row into its sections, and refuses to go past its end."""

    def __init__(self, row: Bytes) -> None:
        self.row, self.at = row, 16

    def take(self, nbytes: int) -> Bytes:
        part, padding = self.row[self.at : self.at + nbytes], self.row[self.at + nbytes : self.at + align16(nbytes)]
        self.at += align16(nbytes)
        if self.at > self.row.size or padding.any():
            raise CodecError(f"a section of {nbytes} bytes does not fit a row of {self.row.size}")
        return part


@dataclass(eq=False, slots=True)
class _Opened:
    """A coded row whose side information was read and found valid."""

    number: int
    mode: int
    code: int
    base: int
    side: Bytes
    record: Ints
    tiles: list[Bytes]


def decode(
    shape: Shape, blob: Bytes, first_layer: int = 0, layers: int | None = None, profile: Profile | None = None
) -> Bytes:
    """Bytes of `layers` layers (by default all from `first_layer` on). Raise `CodecError` for a damaged blob."""
    info = parse(blob, shape, profile)
    count = shape.layers - first_layer if layers is None else layers
    begin, end = first_layer * shape.planes, (first_layer + count) * shape.planes
    out = np.zeros((end - begin, shape.tokens, shape.channels), _UNSIGNED[shape.item])
    rows = []
    for number in range(begin, end):
        row = _open_row(shape, info, number, blob[info.starts[number] : info.starts[number + 1]], out[number - begin])
        if row is not None:
            rows.append(row)
    coded, width = shape.tokens - info.n_raw, GROUP * shape.groups
    for lossless in (False, True):
        chosen = [row for row in rows if (row.mode == LOSSLESS) is lossless]
        if not chosen:
            continue
        symbols = np.zeros((len(chosen), coded, width), np.int64)
        remainder = np.zeros((len(chosen), coded, width), np.uint32)
        tables = np.stack([row.record & 31 for row in chosen]).reshape(-1, GROUP)
        for i, (first, last) in enumerate(_spans(coded, info.tile_tokens)):
            tiles = [tile for row in chosen for tile in row.tiles[i * shape.groups : (i + 1) * shape.groups]]
            skip = 128 + (_remainder_bytes(last - first, shape.dtype) if lossless else 0)
            if any(tile.size < skip for tile in tiles):
                raise CodecError(f"a tile is shorter than {skip} bytes")
            states = np.stack([tile[:128].view("<u4") for tile in tiles]).astype(np.int64)
            words = [tile[skip:].view("<u2") for tile in tiles]
            symbols[:, first:last] = _tokens_first(rans_decode(states, words, last - first, tables, lossless), width)
            if lossless:
                rest = np.stack([_unpack_remainder(tile[128:skip], last - first, shape.dtype) for tile in tiles])
                remainder[:, first:last] = _tokens_first(rest, width)
        for j, row in enumerate(chosen):
            if row.mode == LOSSLESS:
                bits = _join(row, symbols[j], remainder[j], shape.dtype)
            else:
                bits = from_float(_restore(row, symbols[j], shape, info, profile), shape.dtype)
            out[row.number - begin, info.n_raw :] = bits[:, : shape.channels]
    return out.reshape(-1).view(np.uint8)


def _tokens_first(tiles: NDArray[Any], width: int) -> NDArray[Any]:
    """`[row * group][token][64]` to `[row][token][64 G]`."""
    tokens = tiles.shape[1]
    return tiles.reshape(-1, width // GROUP, tokens, GROUP).transpose(0, 2, 1, 3).reshape(-1, tokens, width)


def _open_row(shape: Shape, info: Parsed, number: int, row: Bytes, out: NDArray[Any]) -> _Opened | None:
    """Read a row's side information and write its raw tokens; None when it held nothing else."""
    head: Any = row[:16].view(ROW)[0]
    mode, code, base = int(head["mode"]), int(head["code"]), int(head["base"])
    if int(head["check"]) != check64(row[8:]):
        raise CodecError(f"the check of row {number} does not match")
    if int(head["row"]) != number or mode > LOSSLESS or head["reserved"]:
        raise CodecError(f"row {number} says it is row {head['row']} of mode {mode}")
    quantised = mode in (ANCHORED, PER_TOKEN)
    if (code and mode != ANCHORED) or (base and not quantised) or not BASE_RANGE[0] <= base <= BASE_RANGE[1]:
        raise CodecError(f"row {number} has step code {code} and base {base} in mode {mode}")
    reader = _Reader(row)
    kind = _UNSIGNED[shape.item]
    coded, width = shape.tokens - info.n_raw, GROUP * shape.groups
    if mode == RAW:
        out[:] = reader.take(shape.row_bytes).view(kind).reshape(out.shape)
        if reader.at != row.size:
            raise CodecError(f"row {number} is longer than its elements")
        return None
    if not coded:
        raise CodecError(f"row {number} codes no token")
    raw = out[: info.n_raw]
    raw[:] = reader.take(raw.nbytes).view(kind).reshape(raw.shape)
    side = reader.take({ANCHORED: 2 * width, PER_TOKEN: coded, LOSSLESS: width}[mode])
    record = reader.take(width).astype(np.int64)
    kinds = {ANCHORED: {*range(6)}, PER_TOKEN: {0, 3, 4, 5}, LOSSLESS: {0}}[mode]
    known = len(TABLES.lossy if quantised else TABLES.lossless)
    if (record & 31).max() >= known or not kinds.issuperset((record >> 5).tolist()):
        raise CodecError(f"row {number} has a channel of a table or kind that does not exist")
    ends = reader.take(4 * len(_spans(coded, info.tile_tokens)) * shape.groups).view("<u4").astype(np.int64)
    starts = np.concatenate([[reader.at], ends])
    if (np.diff(starts) < 128).any() or (starts % 16).any() or starts[-1] != row.size:
        raise CodecError(f"the tiles of row {number} are out of order")
    return _Opened(number, mode, code, base, side, record, [row[a:b] for a, b in pairwise(starts)])


def _join(row: _Opened, symbols: Ints, remainder: NDArray[np.uint32], dtype: str) -> NDArray[Any]:
    """Elements of the coded tokens of a lossless row, padding channels included."""
    exponent_bits, mantissa_bits = _BITS[dtype]
    fields = (row.side - symbols) & ((1 << exponent_bits) - 1)
    sign, mantissa = remainder >> mantissa_bits, remainder & ((1 << mantissa_bits) - 1)
    bits = sign.astype(np.int64) << (exponent_bits + mantissa_bits) | fields << mantissa_bits | mantissa
    return bits.astype(_UNSIGNED[ITEM_BYTES[DTYPES[dtype]]])


def _restore(row: _Opened, symbols: Ints, shape: Shape, info: Parsed, profile: Profile | None) -> Floats:
    """Values of the coded tokens, padding channels included where there is no transform."""
    kind = row.record >> 5
    shift, gain = np.where(kind > 2, kind - 2, 0), np.where(kind < 3, kind, 0)
    if gain.any():
        for t in range(len(symbols)):
            if t % info.tile_tokens:
                symbols[t] += (gain * symbols[t - 1] + 1) >> 1
    anchor = row.side.view("<i2").astype(np.int64) if row.mode == ANCHORED else 0
    codes = np.array([row.code]) if row.mode == ANCHORED else row.side.astype(np.int64)
    steps = _scale(_STEP, codes, (codes >> 3) + row.base)[:, None]
    if profile is not None and info.start >= 0:
        q = ((symbols + anchor) << shift)[:, : shape.channels]
        return untransform(profile, row.number, q, steps, info.start + info.n_raw)
    return np.asarray((symbols + anchor).astype(np.float32) * np.ldexp(steps, shift))
