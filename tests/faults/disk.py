"""What the disk tests share: sealed objects anybody can recompute, the disk's own figures, mounts to break."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmcache_backends.gds import GdsConfig
from lmcache_backends.gds.backend import DiskBackend
from lmcache_core import seal
from lmcache_core.errors import CorruptChunk
from lmcache_core.protocols import BuildContext, StorageBackend
from lmcache_core.testing.memory import aligned
from lmcache_core.types import HEADER_BYTES, ChunkKey, Got, round_up

LAYOUT_ID = b"layout-of-tests!"
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, the same number on xfs
_NO_LOG_FLUSH = 2


def key_of(number: int) -> ChunkKey:
    """The key of test object `number`: one identity, a chain digest."""
    return ChunkKey(b"identity-of-test" + hashlib.sha256(number.to_bytes(8, "little")).digest()[:16])


def payload_of(number: int, version: int, nbytes: int) -> np.ndarray:
    """Pseudo-random payload: a function of its arguments, so that no oracle has to store it."""
    seed = np.uint64(number << 32 | version)
    words = np.arange(-(-nbytes // 8), dtype=np.uint64) + (seed << np.uint64(20))
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    return words.view(np.uint8)[:nbytes]


def size_of(number: int, version: int, largest: int) -> int:
    """Payload bytes of that version: half of them `largest`, the rest anything from 1."""
    pick = int.from_bytes(hashlib.sha256(b"%d/%d" % (number, version)).digest()[:4], "little")
    return largest if pick % 2 else 1 + pick % largest


def put_object(obj: memoryview, number: int, version: int, nbytes: int) -> memoryview:
    """Fill a buffer with the sealed object of that version; return the object."""
    np.frombuffer(obj, np.uint8)[HEADER_BYTES : HEADER_BYTES + nbytes] = payload_of(number, version, nbytes)
    seal.seal(obj, key_of(number), LAYOUT_ID, seal.RAW_CODEC, nbytes, nbytes, version)
    return obj[: HEADER_BYTES + nbytes]


def new_object(number: int, version: int, nbytes: int) -> memoryview:
    """A fresh page-aligned buffer with the sealed object of that version."""
    return put_object(aligned(round_up(HEADER_BYTES + nbytes)), number, version, nbytes)


def open_object(obj: memoryview, number: int) -> int:
    """Verify an object that was read as the core does; return its version. Raise `CorruptChunk`.

    Raise `AssertionError` when it passes as genuine but is not what was stored under the key.
    """
    head = seal.read_header(obj)
    head = seal.unseal(obj, key_of(number), LAYOUT_ID, seal.RAW_CODEC, head.raw_bytes)
    stored = np.frombuffer(obj, np.uint8)[HEADER_BYTES:]
    assert np.array_equal(stored, payload_of(number, head.created, head.stored_bytes)), "wrong bytes were served"
    return head.created


def read_version(backend: StorageBackend, number: int, buffer: memoryview) -> int | Exception | None:
    """The version stored under test key `number`, None when absent, or why it cannot be read."""
    got: Got = backend.get_into([key_of(number)], [buffer])[0]
    if not isinstance(got, int):
        return got
    try:
        return open_object(buffer[:got], number)
    except CorruptChunk as error:
        return error


def build(path: Path, capacity: int, object_bytes: int, **options: object) -> DiskBackend:
    """A `gds` backend in that directory; no free-space floor unless given."""
    config = GdsConfig.model_validate({"path": path, "free_floor": 0, **options})
    return config.build(BuildContext(tier="disk", object_bytes=object_bytes, capacity=capacity, threads=2))


def du(path: Path) -> int:
    """Bytes the directory and everything in it occupy, by the disk's own count."""
    return 512 * sum(p.lstat().st_blocks for p in (path, *path.rglob("*")))


@contextlib.contextmanager
def tmpfs(where: Path, nbytes: int, inodes: int = 0) -> Iterator[Path]:
    """A tmpfs of that size at `where`."""
    where.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={nbytes},nr_inodes={inodes},mode=700", "none", str(where))
    try:
        yield where
    finally:
        _run("umount", "-l", str(where))  # lazily: what fails may leave files open


class Disk:
    """A file system in a file, mounted at `mnt`, that can lose its power."""

    def __init__(self, home: Path, kind: str, megabytes: int = 320, options: str = "") -> None:
        """`kind` is `ext4` or `xfs` (which needs 300 MB); `options` are mount options."""
        self.image = home / f"{kind}.img"
        self.mnt = home / "mnt"
        self._options = ",".join(filter(None, ["loop", options]))
        self.mnt.mkdir()
        with self.image.open("wb") as file:
            file.truncate(megabytes << 20)
        if kind == "ext4":
            _run("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=1", str(self.image))
        else:
            _run("mkfs.xfs", "-q", "-f", str(self.image))
        self.mount()
        (self.mnt / "kv").mkdir(mode=0o700)

    @property
    def store(self) -> Path:
        """A directory for a store on the disk."""
        return self.mnt / "kv"

    def mount(self) -> None:
        """Mount it, replaying its log."""
        _run("mount", "-o", self._options, str(self.image), str(self.mnt))

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount it; `lazy` while files are open."""
        _run("umount", *(["-l"] if lazy else []), str(self.mnt))

    def sync(self) -> None:
        """Bring everything to the medium."""
        _run("sync", "-f", str(self.mnt))

    def shutdown(self) -> None:
        """Lose everything not yet on the medium, log included, from now on; the mount answers EIO."""
        fd = os.open(self.mnt, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def cut_power(self) -> None:
        """Shut down, unmount, mount again. Nothing may be open any more."""
        self.shutdown()
        self.unmount()
        self.mount()


@contextlib.contextmanager
def disk(home: Path, kind: str, megabytes: int = 320, options: str = "") -> Iterator[Disk]:
    """A `Disk` that is unmounted in the end, whatever happens."""
    it = Disk(home, kind, megabytes, options)
    try:
        yield it
    finally:
        while os.path.ismount(it.mnt):
            it.unmount(lazy=True)
        it.image.unlink()


def cannot_mount() -> str:
    """Why this process cannot make the mounts above; empty when it can."""
    if os.geteuid() != 0:
        return "needs root to mount"
    if not os.path.exists("/dev/loop-control"):
        return "needs loop devices"
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
