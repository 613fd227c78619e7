"""Which directories lie on file systems that can hang: told from the mount table, without touching them."""

from __future__ import annotations

import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "fuse",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "pvfs2",
        "smb3",
        "smbfs",
        "virtiofs",
        "wekafs",
    ]
)


def network_file_system(path: Path, table: Path = _MOUNTS) -> str | None:
    """Type of the network (or FUSE) file system that `path` lies on, such as `nfs4`; None where it is local or unknown.

    `path` is absolute and is not resolved: even looking at a link on a dead file system would hang.
    """
    try:
        lines = table.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    wanted = os.path.normpath(path)
    best, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, described = left.split(" "), right.split(" ")
        if len(fields) < 5 or not described[0]:
            continue
        # Spaces and their like stand as \\040 in the table.
        point = fields[4].encode("latin-1", "surrogateescape").decode("unicode_escape")
        inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), described[0]
    return kind if kind.partition(".")[0] in _NETWORK else None
