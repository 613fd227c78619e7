"""Long runs of the codec on damaged blobs: the native decoder must end as the reference does, value or error.

    cd tests && python -m faults.soak_codec --seconds 600

For memory errors, preload the sanitizer's runtime and put a library built with it in place of the installed one.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from codec_cases import any_case, any_turned, tampered

from lmcache_core import _native
from lmcache_serde.cachegen import native, reference
from lmcache_serde.cachegen.format import AUX, CodecError
from lmcache_serde.cachegen.profile import Profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    blobs = refused = 0
    until = time.monotonic() + options.seconds
    while time.monotonic() < until:
        profile: Profile | None = None
        start = -1
        if blobs % 3:
            shape, how, data = any_case(rng)
        else:
            shape, how, data, profile, start = any_turned(rng)
        room = np.zeros(shape.bound + AUX, np.uint8)
        (size,), _ = native.encode(shape, how, [data], [room], profile, [start])
        if size > 60_000:
            continue
        for _ in range(20):
            bad = tampered(rng, room[:size], shape, profile)
            try:
                expected = reference.decode(shape, bad, profile=profile)
            except CodecError:
                expected = None
            for level in ("portable", "avx2", "avx512"):
                _native.limit_simd(level + "+sha")
                out = np.zeros(shape.nbytes, np.uint8)
                try:
                    native.decode(shape, [bad], [out], profile=profile)
                except CodecError:
                    out = None
                if (out is None) != (expected is None) or not (out is None or np.array_equal(out, expected)):
                    bad.tofile("codec-differs.blob")
                    raise SystemExit(f"{level} and the reference differ on codec-differs.blob, {shape}")
            blobs += 1
            refused += expected is None
    print(f"{blobs} damaged blobs, {refused} refused, the others decoded alike everywhere")


if __name__ == "__main__":
    main()
