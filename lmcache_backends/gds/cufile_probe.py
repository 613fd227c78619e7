"""Opens the cuFile driver and tells what came of it: `python cufile_probe.py LIBRARY`, in a process that may hang.

`cuFileDriverOpen` is known to spin for ever where /proc/modules is missing, and to close descriptor 0 on its way out of
an error. This file imports nothing of the project, so that it starts in no time.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys


class Status(ctypes.Structure):
    """`CUfileError_t` of cufile.h: a cuFile error (0 for none) and, with some, one of the CUDA driver."""

    _fields_ = (("err", ctypes.c_int), ("cu_err", ctypes.c_int))


class _Properties(ctypes.Structure):
    """`CUfileDrvProps_t` of cufile.h, as far as it is read."""

    _fields_ = (("nvfs_major", ctypes.c_uint), ("nvfs_minor", ctypes.c_uint), ("rest", ctypes.c_uint64 * 16))


def main() -> None:
    """Print `{"err", "cu_err"}`, and with err 0 `{"nvfs"}`: the version of nvidia-fs, 0.0 where it is not loaded."""
    library = ctypes.CDLL(sys.argv[1])
    for name in ("cuFileDriverOpen", "cuFileDriverGetProperties"):
        getattr(library, name).restype = Status
    status = library.cuFileDriverOpen()
    said: dict[str, object] = {"err": status.err, "cu_err": status.cu_err}
    properties = _Properties()
    if status.err == 0 and library.cuFileDriverGetProperties(ctypes.byref(properties)).err == 0:
        said["nvfs"] = f"{properties.nvfs_major}.{properties.nvfs_minor}"
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the library's own ending has nothing to tell us


if __name__ == "__main__":
    main()
