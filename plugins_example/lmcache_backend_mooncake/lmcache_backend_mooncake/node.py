"""A storage node for rigs, `python -m lmcache_backend_mooncake.node MASTER BYTES`: offers memory until it is killed.

It says `ready` when it has joined, and ends when its standard input does.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Join, contribute, wait. The exit status is 1 where joining failed."""
    from mooncake.store import MooncakeDistributedStore

    master, nbytes = sys.argv[1], int(sys.argv[2])
    store = MooncakeDistributedStore()
    if store.setup(master.rpartition(":")[0], "P2PHANDSHAKE", nbytes, 0, "tcp", "", master):
        return 1
    print("ready", flush=True)
    sys.stdin.read()
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
