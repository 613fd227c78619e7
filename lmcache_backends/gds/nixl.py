"""NIXL as a mover: a whole batch in one transfer, by its plugins POSIX (host memory) and GDS_MT or GDS (device memory).

NIXL 1.5 says of a transfer that failed neither how far it came nor whether all of its I/O has ended. So the first one
that fails ends the mover: closing the agent waits for what is under way.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from collections.abc import Iterator, Sequence
from time import sleep
from typing import Any, ClassVar

import numpy as np

from lmcache_backends.gds import cufile
from lmcache_backends.gds.mover import Failure, Mover, MoverError, Piece
from lmcache_core.protocols import Region

_POLL_S = 100e-6


class NixlMover(Mover):
    name: ClassVar[str] = "NIXL"

    def __init__(self) -> None:
        self._agent_name = f"lmcache-{secrets.token_hex(8)}"
        self._plugin_of: dict[bool, str] = {}
        """In use, by whether it is for device memory."""
        self._memory: list[tuple[Any, str]] = []
        self._failed: list[Any] = []
        """Transfers that others, who poll the same queue, may still meet the I/O of."""

    def start(self) -> str:
        try:
            with _said("importing it"):
                api = _load()
        except MoverError as error:
            raise MoverError(f"{error}: pip install lmcache-core[nixl], or use `mover: host`") from None
        with _said("starting an agent"):
            config = api.nixl_agent_config(
                enable_prog_thread=False, backends=[], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
            )
            self._agent = api.nixl_agent(self._agent_name, config)
        self._create("POSIX")
        self._plugin_of[False] = "POSIX"
        return "plugin POSIX"

    def register(self, region: Region) -> None:
        on_device = region.device is not None
        if on_device and True not in self._plugin_of:
            self._plugin_of[True] = self._device_plugin()
        plugin = self._plugin_of[on_device]
        with _said("registering memory"):
            description = [(region.address, region.nbytes, region.device or 0, "")]
            self._memory.append((self._agent.register_memory(description, _kind(region), [plugin]), plugin))

    def open(self, fd: int) -> tuple[int, dict[str, Any]]:
        files = {}
        for plugin in self._plugin_of.values():
            with _said("registering a file"):
                description = [(0, os.fstat(fd).st_size, fd, "")]
                files[plugin] = self._agent.register_memory(description, "FILE", [plugin])
        return fd, files

    def shut(self, file: tuple[int, dict[str, Any]]) -> None:
        for plugin, registered in file[1].items():
            self._deregister(registered, plugin)

    def move(self, pieces: Sequence[Piece], *, write: bool) -> list[Failure | None]:
        results: list[Failure | None] = [Failure("NIXL: no plugin for the memory of this GPU")] * len(pieces)
        for on_device, plugin in tuple(self._plugin_of.items()):
            mine = [i for i, piece in enumerate(pieces) if (piece.region.device is not None) == on_device]
            outcome = self._transfer(plugin, [pieces[i] for i in mine], write=write) if mine else None
            for i in mine:
                results[i] = outcome
        return results

    def close(self) -> None:
        self._failed.clear()
        for registered, plugin in self._memory:
            self._deregister(registered, plugin)
        self._memory.clear()
        del self._agent

    def _deregister(self, registered: Any, plugin: str) -> None:
        with contextlib.suppress(MoverError), _said("letting go"):  # the agent's end lets go of all that is left
            self._agent.deregister_memory(registered, [plugin])

    def _transfer(self, plugin: str, pieces: list[Piece], *, write: bool) -> Failure | None:
        agent = self._agent
        memory = [(piece.address, piece.nbytes, piece.region.device or 0) for piece in pieces]
        file = [(piece.offset, piece.nbytes, piece.file[0]) for piece in pieces]
        handle = None
        try:
            with _said(f"a transfer by {plugin}"):
                handle = agent.initialize_xfer(
                    "WRITE" if write else "READ",
                    agent.get_xfer_descs(np.array(memory, np.uint64), _kind(pieces[0].region)),
                    agent.get_xfer_descs(np.array(file, np.uint64), "FILE"),
                    self._agent_name,
                    b"",
                    [plugin],
                )
                state = agent.transfer(handle)
                while state == "PROC":
                    sleep(_POLL_S)
                    state = agent.check_xfer_state(handle)
                handle.release()
                if state != "DONE":
                    raise RuntimeError(f"it ended as {state}")
        except MoverError as error:
            if handle is not None:
                self._failed.append(handle)
            return Failure(str(error), lost=handle is not None)
        return None

    def _device_plugin(self) -> str:
        """GDS_MT, or GDS; both open the cuFile driver in this process, so that must have been seen to work."""
        cufile.probe(cufile.load())
        try:
            return self._create("GDS_MT")
        except MoverError:
            return self._create("GDS")

    def _create(self, plugin: str) -> str:
        with _said(f"starting plugin {plugin}"):
            self._agent.create_backend(plugin, {})
        return plugin


def _load() -> Any:
    """The API, from the package that chooses the one for this CUDA, or from the only one there is."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("nixl._api")
    with contextlib.suppress(ImportError):
        return importlib.import_module("nixl_cu13._api")
    return importlib.import_module("nixl_cu12._api")


def _kind(region: Region) -> str:
    return "DRAM" if region.device is None else "VRAM"


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Turn what NIXL raises, classes of its own below `Exception`, into a `MoverError`."""
    try:
        yield
    except Exception as error:
        raise MoverError(f"NIXL: {what}: {type(error).__name__}: {error}") from None
