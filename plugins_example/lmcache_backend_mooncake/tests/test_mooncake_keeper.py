"""The keeper of the client waits on descriptors of any number."""

from __future__ import annotations

import os
import resource
import socket

from lmcache_backend_mooncake.client import Client


def test_the_keeper_waits_on_descriptors_of_any_number() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1030)]
    try:
        client = Client.__new__(Client)
        client._wake, client._waker = socket.socketpair()
        sock, master = socket.socketpair()
        client._waker.send(b"\0")
        assert client._sleep(sock, 1.0) is False
        master.close()
        assert client._sleep(sock, 1.0) is True
        for end in (client._wake, client._waker, sock):
            end.close()
    finally:
        for fd in many:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
