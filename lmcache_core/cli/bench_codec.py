"""`lmcachectl bench codec`: bytes and speed of the codec's levels, beside zstd and the incumbent's own codec."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lmcache_core import _native
from lmcache_core.cli import bench_common, codec_kv
from lmcache_core.cli.bench_common import CHUNK_TOKENS, Arm, interleave
from lmcache_core.cli.codec_kv import Reader
from lmcache_core.cli.console import OK, add_json, emit, table
from lmcache_core.cli.demo_common import Report
from lmcache_core.cli.layouts import preset
from lmcache_core.cli.model import default_directory, resolve
from lmcache_core.errors import LMCacheError
from lmcache_core.layout import KVLayout
from lmcache_core.protocols import SerdeConfig, SerdeContext
from lmcache_serde.cachegen import LEVELS, CacheGenConfig
from lmcache_serde.zstd import ZstdConfig

_DESCRIPTION = f"""\
Measure the codec on one core: chunks of {CHUNK_TOKENS} tokens are encoded and decoded, every serde in turn.

figures, for each level and for zstd-1 (with byte planes):
  ratio            bytes of the chunks / bytes of their encodings, everything counted
  encode_gb_s_core 10^9 bytes of chunks encoded in a second of one core's time (CPU time of the thread, statistics,
                   quantiser, entropy coder and checksums included): the median over the rounds
  decode_gb_s_core likewise
  simd             instruction set in use

`balanced` and `lossless` are measured once more with the processor's smaller instruction sets (`balanced@avx2`), and
`two_cores` is what two threads code in a second as a multiple of what one does (wall time).

LMCache's own CacheGen codes the same chunk on the CPU, once, where its Python is: --incumbent, or what `make
bench-peer` made. `times_incumbent` is the rate of `balanced` as a multiple of that.
"""

_INCUMBENT = """\
import json, sys, time
import numpy as np, torch
from types import SimpleNamespace
from lmcache.storage_backend.serde.cachegen_encoder import encode_function
from lmcache.v1.memory_management import BytesBufferMemoryObj
from lmcache.v1.storage_backend.naive_serde.cachegen_basics import CacheGenConfig
from lmcache.v1.storage_backend.naive_serde.cachegen_decoder import CacheGenDeserializer

torch.set_num_threads(1)
chunk = torch.from_numpy(np.load(sys.argv[1]).view(np.int16)).view(torch.bfloat16)
about = SimpleNamespace(model_name="meta-llama/Llama-3.1-8B-Instruct", kv_dtype=torch.bfloat16)
decoder = CacheGenDeserializer(SimpleNamespace(chunk_size=chunk.shape[2]), about)
decoder.key_bins, decoder.value_bins = decoder.key_bins[: len(chunk)], decoder.value_bins[: len(chunk)]
config = CacheGenConfig.from_model_name(about.model_name)
begun = time.process_time()
blob = encode_function(chunk, config, decoder.key_bins, decoder.value_bins, chunk.shape[2]).to_bytes()
middle = time.process_time()
decoder.deserialize(BytesBufferMemoryObj(blob))
print(json.dumps([len(blob), middle - begun, time.process_time() - middle]))
"""
"""LMCache 0.5's serialiser and deserialiser on one chunk `[layer][2][token][head][dim]`: bytes, and CPU seconds."""


INCUMBENT = "incumbent-cachegen"

_SETS = ("portable", "avx2", "avx512")
_REPEATS = 4

Chunk = NDArray[np.uint16]
"""`[layer][2][token][channel]` of bfloat16 bits."""


@dataclass(frozen=True, slots=True)
class Row:
    """One serde."""

    ratio: float
    encode_gb_s_core: float
    decode_gb_s_core: float
    simd: str


def register(kinds: Any) -> None:
    """Add `bench codec`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "codec",
        help="bytes and speed of the codec's levels on one core",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PATH|REPO", help="real KV of a model instead of made-up values")
    parser.add_argument(
        "--incumbent",
        type=Path,
        default=Path(".venv-peer/bin/python"),
        metavar="PYTHON",
        help="a Python in whose environment LMCache is (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: about ten seconds")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raise `LMCacheError` when something cannot be measured."""
    report = Report(Console(stderr=True))
    layout = preset("llama-3.1-8b", CHUNK_TOKENS)
    with report.step("making chunks") as say:
        if args.model:
            layout, chunks = _real(args.model, report)
        else:
            chunks = [made_up(layout, seed) for seed in range(2)]
        say("encoding and decoding")
        rounds = 5 if args.quick else 25
        rows = measure(layout, chunks, rounds)
        both = two_cores(layout, chunks, rounds)
        if args.incumbent.exists():
            say("the incumbent")
            rows[INCUMBENT] = incumbent(args.incumbent, layout, chunks[-1])
        else:
            report.note(f"{INCUMBENT} left out: there is no {args.incumbent} (make bench-peer, or --incumbent PYTHON)")
    result: dict[str, Any] = {
        "figures": {name: asdict(row) for name, row in rows.items()},
        "machine": bench_common.describe_machine(),
        "data": args.model or f"made-up values, {layout.chunk_bytes} bytes a chunk",
        "two_cores": both,
    }
    times = {}
    if INCUMBENT in rows:
        ours, theirs = rows["balanced"], rows[INCUMBENT]
        times = {
            "encode": round(ours.encode_gb_s_core / theirs.encode_gb_s_core, 1),
            "decode": round(ours.decode_gb_s_core / theirs.decode_gb_s_core, 1),
        }
        result["times_incumbent"] = times
    if args.json:
        emit(result)
    else:
        print(table([["", *Row.__slots__], *([name, *map(str, asdict(row).values())] for name, row in rows.items())]))
        print(f"balanced, two threads as a multiple of one: {both['encode']} encoding, {both['decode']} decoding")
        if times:
            print("balanced, times as fast as the incumbent: {encode} encoding, {decode} decoding".format(**times))
    return OK


def _real(model: str, report: Report) -> tuple[KVLayout, list[Chunk]]:
    """Two chunks of what a model keeps of a text."""
    reader = Reader.open(resolve(model, default_directory(), report))
    kv = reader.read(reader.tokens(codec_kv.texts(None)["constitution"], 2 * CHUNK_TOKENS))
    layers, planes, _, channels = kv.shape
    dims = channels // reader.heads
    layout = KVLayout("lknhd", "bfloat16", layers, planes, reader.heads, dims, CHUNK_TOKENS, CHUNK_TOKENS)
    return layout, codec_kv.chunked(kv, CHUNK_TOKENS)


def made_up(layout: KVLayout, seed: int) -> Chunk:
    """Values with what matters of a KV cache: channels of K with offset, spread and memory, tokens of V with a size.

    Of SmolLM2's own K, the prediction from the token before saves about as many bits as it does here.
    """
    random = np.random.default_rng(seed)
    channels = layout.kv_heads * layout.head_dim
    values = random.standard_normal((layout.num_layers, 2, layout.chunk_tokens, channels), np.float32)
    for token in range(1, layout.chunk_tokens):
        values[:, 0, token] = 0.55 * values[:, 0, token - 1] + np.float32(0.835) * values[:, 0, token]
    values[:, 0] *= np.exp(0.5 * random.standard_normal((layout.num_layers, 1, channels), np.float32))
    values[:, 0] += 2 * random.standard_normal((layout.num_layers, 1, channels), np.float32)
    values[:, 1] *= np.exp(0.3 * random.standard_normal((layout.num_layers, layout.chunk_tokens, 1), np.float32)) / 4
    return codec_kv.bfloat16(values)


def measure(layout: KVLayout, chunks: Sequence[Chunk], rounds: int) -> dict[str, Row]:
    """Every level of the codec, and Zstandard."""
    configs: dict[str, SerdeConfig] = {level: CacheGenConfig(level=level) for level in LEVELS}
    configs["zstd-1"] = ZstdConfig()
    context = SerdeContext(layout, layout.chunk_bytes)
    serdes = {name: config.build(context) for name, config in configs.items()}
    best = _native.simd()
    sets = dict.fromkeys(serdes, best)
    for smaller in _SETS[: _SETS.index(best.partition("+")[0])] if best != "none" else ():
        for level in ("balanced", "lossless"):
            serdes[f"{level}@{smaller}"] = serdes[level]
            sets[f"{level}@{smaller}"] = smaller
    sources = [memoryview(chunk.view(np.uint8).reshape(-1).data) for chunk in chunks]
    back = memoryview(bytearray(layout.chunk_bytes))
    rooms = {name: [memoryview(bytearray(serde.bound())) for _ in chunks] for name, serde in serdes.items()}
    blobs: dict[str, list[memoryview]] = {}
    for name, serde in serdes.items():
        sizes = serde.encode(sources, rooms[name], [-1] * len(chunks))
        blobs[name] = [room[:size] for room, size in zip(rooms[name], sizes, strict=True)]

    def timed(name: str, work: Callable[[], object]) -> float:
        if sets[name] == best:
            return _rate(layout, work)
        _native.limit_simd(sets[name])
        try:
            return _rate(layout, work)
        finally:
            _native.limit_simd(best)

    def encoder(name: str) -> Arm:
        serde, room = serdes[name], memoryview(bytearray(serdes[name].bound()))
        return lambda turn: timed(name, lambda: serde.encode([sources[turn % len(chunks)]], [room], [-1]))

    def decoder(name: str) -> Arm:
        serde = serdes[name]
        return lambda turn: timed(name, lambda: serde.decode([blobs[name][turn % len(chunks)]], [back]))

    arms = {("encode", name): encoder(name) for name in serdes} | {("decode", name): decoder(name) for name in serdes}
    rates = interleave({" ".join(key): arm for key, arm in arms.items()}, rounds)
    return {
        name: Row(
            ratio=round(layout.chunk_bytes * len(chunks) / sum(map(len, blobs[name])), 3),
            encode_gb_s_core=round(statistics.median(rates[f"encode {name}"]) / 1e9, 3),
            decode_gb_s_core=round(statistics.median(rates[f"decode {name}"]) / 1e9, 3),
            simd=sets[name],
        )
        for name in serdes
    }


def two_cores(layout: KVLayout, chunks: Sequence[Chunk], rounds: int) -> dict[str, float]:
    """What two threads code at `balanced` as a multiple of one, by the wall clock: the median over the rounds."""
    context = SerdeContext(layout, layout.chunk_bytes)
    source = memoryview(chunks[0].view(np.uint8).reshape(-1).data)
    serdes = [CacheGenConfig(level="balanced").build(context) for _ in range(2)]
    rooms = [memoryview(bytearray(serde.bound())) for serde in serdes]
    backs = [memoryview(bytearray(layout.chunk_bytes)) for _ in serdes]
    sizes = [serde.encode([source], [room], [-1])[0] for serde, room in zip(serdes, rooms, strict=True)]

    def encode(thread: int) -> None:
        for _ in range(_REPEATS):
            serdes[thread].encode([source], [rooms[thread]], [-1])

    def decode(thread: int) -> None:
        for _ in range(_REPEATS):
            serdes[thread].decode([rooms[thread][: sizes[thread]]], [backs[thread]])

    found: dict[str, float] = {}
    with ThreadPoolExecutor(2) as pool:

        def arm(work: Callable[[int], None], threads: int) -> Arm:
            def turn(_: int) -> float:
                begun = perf_counter()
                list(pool.map(work, range(threads)))
                return threads / (perf_counter() - begun)

            return turn

        for name, work in (("encode", encode), ("decode", decode)):
            rates = interleave({"one": arm(work, 1), "two": arm(work, 2)}, rounds)
            ratios = [two / one for one, two in zip(rates["one"], rates["two"], strict=True)]
            found[name] = round(statistics.median(ratios), 3)
    return found


def _rate(layout: KVLayout, work: Callable[[], object]) -> float:
    begun = thread_time()
    work()
    return layout.chunk_bytes / max(thread_time() - begun, 1e-9)


def incumbent(python: Path, layout: KVLayout, chunk: Chunk) -> Row:
    """LMCache's codec on the CPU, in an environment of its own. Raise `LMCacheError` when it does not work there."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "chunk.npy"
        np.save(file, chunk.reshape(*chunk.shape[:3], layout.kv_heads, layout.head_dim))
        command = [str(python), "-W", "ignore", "-c", _INCUMBENT, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    try:
        size, encode, decode = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise LMCacheError(f"LMCache's codec did not run with {python}: {done.stderr.strip()[-500:]}") from error
    nbytes = layout.chunk_bytes
    return Row(round(nbytes / size, 3), round(nbytes / encode / 1e9, 6), round(nbytes / decode / 1e9, 6), "torch")
