"""`lmcachectl bench codec-quality`: what each level of the codec costs in bytes and in a real model's predictions."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lmcache_core.cli import codec_kv
from lmcache_core.cli.bench_common import CHUNK_TOKENS, describe_machine
from lmcache_core.cli.codec_kv import Judgement, Reader
from lmcache_core.cli.console import OK, add_json, emit, table
from lmcache_core.cli.demo_common import Report
from lmcache_core.cli.model import default_directory, resolve
from lmcache_core.errors import LMCacheError
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import SerdeContext
from lmcache_serde.cachegen import LEVELS, CacheGenConfig

INCUMBENT = "incumbent-cachegen"

Bits = NDArray[np.uint16]
Scheme = Callable[[Bits, int], tuple[int, Bits]]
"""A chunk `[layer][plane][token][channel]` of bfloat16 and its first token's position -> bytes, what comes back."""

_DESCRIPTION = f"""\
Measure every level of the codec on the KV of a real model: each chunk of {CHUNK_TOKENS} tokens of the context is
encoded and decoded, and the model predicts the tokens that follow the context from the result.

figures, for each level (means over the texts, of each text over its windows):
  bits_per_value   bits of the encoded chunks, everything counted, for each value of K and V
  ratio            16 / bits_per_value: how much smaller than bfloat16
  kl               mean KL divergence of the predictions from those with the exact KV, nats per token
  top1             percent of tokens where both hold the same token for the most likely
  dppl_percent     change of the text's perplexity
  dppl_error       standard error of that change: 512 tokens tell little, --windows 8 tells three times as much

`{INCUMBENT}` is the quantiser and the table layout of LMCache's CacheGen with its default bins, its payload counted
at the entropy of its own symbols: a little less than its coder needs.
"""


def register(kinds: Any) -> None:
    """Add `bench codec-quality`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "codec-quality",
        help="bytes and quality of each level of the codec on a real model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PATH|REPO", help="a model instead of the small default one")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text instead of the three built-in ones")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of context (default 4096; 2048 with --quick)")
    parser.add_argument("--continue", type=int, dest="follow", default=512, metavar="N", help="tokens predicted (512)")
    parser.add_argument(
        "--windows",
        type=int,
        default=1,
        metavar="N",
        help="most pieces of each text, each with a context of its own (1)",
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="a calibrated profile: rows of its own")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (SVG) of the result")
    parser.add_argument("--quick", action="store_true", help="a shorter context: about two minutes on two cores")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raise `LMCacheError` when something cannot be measured."""
    report = Report(Console(stderr=True))
    reader = Reader.open(resolve(args.model, default_directory(), report))
    context = args.tokens or (2048 if args.quick else 4096)
    context -= context % CHUNK_TOKENS
    if args.windows < 1 or args.follow < 2:
        raise LMCacheError(
            f"--windows {args.windows} --continue {args.follow}: at least 1 window and 2 tokens are needed"
        )
    by_text: dict[str, dict[str, dict[str, float]]] = {}
    with report.step("reading") as say:
        for name, text in codec_kv.texts(args.text).items():
            size = context + args.follow
            ids = reader.tokens(text, size, size * args.windows)
            found: dict[str, list[tuple[float, Judgement]]] = {}
            windows = len(ids) // size
            for window in range(windows):
                say(f"{name}: window {window + 1} of {windows}, {context} tokens")
                measured = measure(reader, ids[window * size :][:size], context, args.profile)
                for level, row in measured.items():
                    found.setdefault(level, []).append(row)
            by_text[name] = {level: record(rows) for level, rows in found.items()}
    figures = {level: over([rows[level] for rows in by_text.values()]) for level in next(iter(by_text.values()))}
    result = {
        "figures": figures,
        "texts": by_text,
        "machine": describe_machine(),
        "options": {
            "model": args.model,
            "tokens": context,
            "continue": args.follow,
            "windows": args.windows,
            "chunk_tokens": CHUNK_TOKENS,
        },
    }
    if args.plot:
        args.plot.write_text(plot(figures), encoding="utf-8")
    if args.json:
        emit(result)
    else:
        print(render(figures))
    return OK


def measure(
    reader: Reader,
    ids: Sequence[int],
    context: int,
    profile: Path | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, tuple[float, Judgement]]:
    """Bits for each value and the judgement, of each level and of the incumbent."""
    kv = reader.read(ids[:context])
    rest = ids[context:]
    reference = reader.predict(kv, rest)
    found = {}
    for name, scheme in schemes(kv.shape, reader.heads, profile, chunk_tokens).items():
        done = [scheme(chunk, at * chunk_tokens) for at, chunk in enumerate(codec_kv.chunked(kv, chunk_tokens))]
        bits = 8 * sum(size for size, _ in done) / kv.size
        altered = np.concatenate([chunk for _, chunk in done], axis=2)
        found[name] = bits, reader.judge(reference, reader.predict(altered, rest), rest)
    return found


def record(rows: Sequence[tuple[float, Judgement]]) -> dict[str, float]:
    """The figures of one level, from the bits and the judgement of each window."""
    means = codec_kv.mean([judgement for _, judgement in rows])
    return over([{"bits_per_value": float(np.mean([bits for bits, _ in rows])), **means}])


def over(texts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of one level over several texts, from those of each."""
    means = {name: float(np.mean([text[name] for text in texts])) for name in texts[0]}
    error = math.hypot(*(text["dppl_error"] for text in texts)) / len(texts)
    rounded = {name: float(f"{value:.4g}") for name, value in {**means, "dppl_error": error}.items()}
    return rounded | {"ratio": round(16 / means["bits_per_value"], 3)}


def schemes(shape: tuple[int, ...], heads: int, profile: Path | None, chunk_tokens: int) -> dict[str, Scheme]:
    """What is measured."""
    layers, planes, _, channels = shape
    layout = KVLayout("lknhd", "bfloat16", layers, planes, heads, channels // heads, chunk_tokens, chunk_tokens)
    found: dict[str, Scheme] = {level: _ours(CacheGenConfig(level=level), layout) for level in LEVELS}
    if profile is not None:
        for level in ("balanced", "small", "tiny"):
            found[f"{level}+profile"] = _ours(CacheGenConfig(level=level, profile=profile), layout)
    return found | {INCUMBENT: incumbent}


def _ours(config: CacheGenConfig, layout: KVLayout) -> Scheme:
    serde = config.build(SerdeContext(layout, layout.chunk_bytes))
    room = bytearray(serde.bound())

    def scheme(chunk: Bits, start: int) -> tuple[int, Bits]:
        (size,) = serde.encode([chunk.view(np.uint8).data.cast("B")], [memoryview(room)], [start])
        back = np.empty_like(chunk)
        serde.decode([memoryview(room)[:size]], [back.view(np.uint8).data.cast("B")])
        return size, back

    return scheme


def incumbent(chunk: Bits, start: int) -> tuple[int, Bits]:
    """LMCache's CacheGen at its defaults: every token of a layer's K or V has one scale, the largest magnitude over all
    heads; 32 bins in the first 10 layers of K and the first 2 of V, else 16; for every channel the 33 16-bit entries of
    its distribution and a 32-bit length; a bfloat16 scale for every token."""
    values = codec_kv.float32(chunk)
    layers, planes, tokens, channels = values.shape
    fine = np.arange(layers)[:, None] < np.array([10, 2])[:planes]
    most = np.where(fine, 15, 7).astype(np.float32)[:, :, None, None]
    scale = codec_kv.float32(codec_kv.bfloat16(np.abs(values).max(-1, keepdims=True)))
    safe = np.where(scale == 0, 1, scale)
    symbols = np.rint(values / safe * most).clip(-most, most)
    entropy = 0.0
    for symbol in range(-15, 16):
        share = (symbols == symbol).mean(2)
        entropy -= tokens * float((share * np.log2(np.where(share > 0, share, 1))).sum())
    side = layers * planes * (channels * (33 * 2 + 4) + tokens * 2)
    return math.ceil(entropy / 8) + side, codec_kv.bfloat16(symbols / most * scale)


def render(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The result for people."""
    names = ("bits_per_value", "ratio", "kl", "top1", "dppl_percent", "dppl_error")
    rows = [["level", *names]]
    return table(rows + [[level, *(f"{row[name]:g}" for name in names)] for level, row in figures.items()])


def plot(figures: Mapping[str, Mapping[str, float]]) -> str:
    """A picture (SVG) of quality over size: bits for each value to the right, divergence upwards on a log scale."""
    points = {level: (row["bits_per_value"], math.log10(row["kl"])) for level, row in figures.items() if row["kl"] > 0}
    low, high = math.floor(min(y for _, y in points.values())), math.ceil(max(y for _, y in points.values()) + 1e-9)
    right = math.ceil(max(x for x, _ in points.values()))

    def place(x: float, y: float) -> tuple[float, float]:
        return 70 + 560 * x / right, 370 - 340 * (y - low) / (high - low)

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="680" height="420" font-family="sans-serif" font-size="12">',
        '<rect width="680" height="420" fill="white"/>',
    ]
    for bits in range(right + 1):
        at, _ = place(bits, low)
        lines.append(f'<path d="M{at:.0f} 30V370" stroke="#ddd"/><text x="{at:.0f}" y="388">{bits}</text>')
    for power in range(low, high + 1):
        _, at = place(0, power)
        lines.append(f'<path d="M70 {at:.0f}H630" stroke="#ddd"/><text x="26" y="{at + 4:.0f}">1e{power}</text>')
    for level, point in points.items():
        x, y = place(*point)
        colour = "#c33" if level == INCUMBENT else "#36c"
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}">{level}</text>')
    lines.append('<text x="300" y="410">bits per value</text><text x="10" y="20">KL, nats per token</text></svg>')
    return "\n".join(lines) + "\n"
