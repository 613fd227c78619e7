"""`lmcachectl codec`: make what the codec can use of a model."""

from __future__ import annotations

import argparse
import difflib
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lmcache_core.cli import codec_kv
from lmcache_core.cli.codec_kv import Reader
from lmcache_core.cli.console import OK, add_json, emit
from lmcache_core.cli.demo_common import Report
from lmcache_core.cli.model import default_directory, resolve
from lmcache_core.errors import LMCacheError
from lmcache_core.units import format_bytes
from lmcache_serde.cachegen.profile import Profile, calibrate

_DESCRIPTION = """\
Read texts with a model and write a profile: the directions in which its K and V vary. With it the codec needs about a
sixth less for the same quality at level balanced, and less still below. Takes minutes on a CPU, once for each model.

  serde: {type: cachegen, level: balanced, profile: FILE}
"""


def add(subparsers: Any) -> None:
    """Register the sub-command."""
    parser: argparse.ArgumentParser = subparsers.add_parser("codec", help="calibrate the KV codec for a model")
    kinds = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    make: argparse.ArgumentParser = kinds.add_parser(
        "calibrate",
        help="write a profile of a model's KV",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument("model", nargs="?", metavar="MODEL", help="path or hub repository (default: the small model)")
    make.add_argument("--to", type=Path, default=Path("cachegen.profile"), metavar="FILE", help="(%(default)s)")
    make.add_argument("--text", type=Path, action="append", metavar="FILE", help="read this text (several times)")
    make.add_argument("--tokens", type=int, default=2048, metavar="N", help="of each text (default: %(default)s)")
    add_json(make)
    make.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the profile. Raise `LMCacheError` when it cannot be made."""
    report = Report(Console(stderr=True))
    reader = Reader.open(resolve(args.model, default_directory(), report))
    given = {name: text for file in args.text or () for name, text in codec_kv.texts(file).items()}
    texts = given or _texts()
    with report.step("reading") as say:
        samples = []
        for name, text in texts.items():
            say(f"reading {args.tokens} tokens of {name}")
            samples.append(codec_kv.float32(reader.read(reader.tokens(text, args.tokens))))
        say("finding the directions")
        profile = profile_of(reader, samples)
    try:
        profile.save(args.to)
    except OSError as error:
        raise LMCacheError(f"--to {args.to}: {error.strerror}") from error
    size = args.to.stat().st_size
    if args.json:
        emit({"path": str(args.to), "bytes": size, "profile": profile.id, "texts": list(texts)})
    else:
        print(f"{args.to}: profile {profile.id}, {format_bytes(size)}")
    return OK


def profile_of(reader: Reader, samples: list[codec_kv.Values]) -> Profile:
    """The profile of a model from its KV of some texts, `[layer][2][token][channel]` each."""
    frequencies = next((m.inv_freq for m in reader.model.modules() if hasattr(m, "inv_freq")), None)
    turns = np.zeros(0) if frequencies is None else frequencies.double().numpy() / (2 * np.pi)
    return calibrate(samples, reader.heads, turns)


def _texts() -> dict[str, str]:
    """Texts that are on every machine and that `bench codec-quality` does not judge by."""
    return {
        "manual": codec_kv.manual(1),
        "statistics": Path(statistics.__file__).read_text(encoding="utf-8"),
        "difflib": Path(difflib.__file__).read_text(encoding="utf-8"),
    }
