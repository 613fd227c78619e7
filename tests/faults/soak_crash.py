"""The long runs: kill -9 by the ten thousand, power cuts by the hundred.

    cd tests; python -m faults.soak_crash kills --cycles 10000
    cd tests; python -m faults.soak_crash cuts --cycles 600      (needs root, loop devices, mkfs.ext4 and mkfs.xfs)

Ends with status 1 and the options of the cycle at the first wrong byte, lost object or wrong count.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from faults.crash import MODES, Crashes, Cuts, killpoints
from faults.disk import cannot_mount, disk

FILE_SYSTEMS = (("ext4", "", 2), ("ext4", "nodelalloc,data=writeback", 1), ("xfs", "", 1))
"""Kind, mount options, share of the cuts."""


def kills(home: Path, cycles: int, seed: int, show: bool) -> Counter[str]:
    """Two thirds die at a random time, the others at the named point where fewest have died."""
    crashes = Crashes(home, seed)
    deaths = {mode: dict.fromkeys(killpoints(mode), 0) for mode in MODES}
    for cycle in range(cycles):
        mode = MODES[cycle % 2]
        point = min(deaths[mode], key=deaths[mode].__getitem__) if cycle % 3 == 2 else ""
        died = crashes.cycle(mode, point)
        if point:
            # A point that is hard to reach is tried more often than others, but not for ever.
            deaths[mode][point] += 4 if died else 3
        _progress(show, cycle, cycles, crashes.counts)
    return crashes.counts


def cuts(home: Path, cycles: int, seed: int, show: bool) -> Counter[str]:
    """Half of the cuts on ext4, a quarter each on ext4 with the weakest ordering and on xfs."""
    if cannot_mount():
        raise SystemExit(f"power cuts: {cannot_mount()}")
    counts: Counter[str] = Counter()
    for kind, options, share in FILE_SYSTEMS:
        with disk(home, kind, options=options) as medium:
            run = Cuts(medium, seed, stale_blocks="data=writeback" in options)
            for cycle in range(cycles * share // 4):
                run.cycle(MODES[cycle % 2])
                _progress(show, cycle, cycles * share // 4, run.counts)
        if not run.counts["torn"]:
            raise AssertionError(f"{kind} {options}: no torn object was seen, so nothing was tested")
        counts += run.counts
        counts[f"torn on {kind} {options}".strip()] = run.counts["torn"]
        medium.mnt.rmdir()
    return counts


def _progress(show: bool, cycle: int, cycles: int, counts: Counter[str]) -> None:
    if show and (cycle + 1) % 50 == 0:
        print(f"\r{cycle + 1}/{cycles} {dict(counts)}", end="", file=sys.stderr, flush=True)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "cuts"])
    parser.add_argument("--cycles", type=int, default=0, help="10,000 kills or 600 cuts unless given")
    parser.add_argument("--seed", type=int, default=0, help="0 draws one, and prints it")
    parser.add_argument("--home", type=Path, help="where to work; a temporary directory unless given")
    parser.add_argument("--json", action="store_true", help="only the counts, as JSON")
    options = parser.parse_args()
    seed = options.seed or random.SystemRandom().getrandbits(31)
    cycles = options.cycles or {"kills": 10_000, "cuts": 600}[options.what]
    with tempfile.TemporaryDirectory(dir=options.home) as home:
        try:
            counts = {"kills": kills, "cuts": cuts}[options.what](Path(home), cycles, seed, not options.json)
        except AssertionError as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            return 1
    print(json.dumps({"seed": seed, **counts}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
