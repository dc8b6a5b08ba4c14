"""HTTP from within a machine's namespace, without a process for each request.

A socket belongs to the network namespace that its thread was in when it was made, and stays there: the calling thread
goes in, connects, and comes back. Only the calling thread does, so that others are never somewhere by accident.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

NAMESPACES = "/var/run/netns"
OURS = "/proc/thread-self/ns/net"
CLONE_NEWNET = 0x40000000
"""`<linux/sched.h>`: the kind of namespace for setns(2)."""

_libc = ctypes.CDLL(None, use_errno=True)


class Connection(http.client.HTTPConnection):
    """To a URL's server, as it is reached from `namespace`."""

    def __init__(self, namespace: str, url: str, timeout_s: float) -> None:
        super().__init__(urlsplit(url).netloc, timeout=timeout_s)
        self._namespace = namespace

    def connect(self) -> None:
        with _within(self._namespace):
            super().connect()


def request(namespace: str, url: str, body: bytes | None = None, timeout_s: float = 60.0) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST where there is something to send. Raises OSError when nobody answers."""
    connection = Connection(namespace, url, timeout_s)
    try:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET" if body is None else "POST", target, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error
    finally:
        connection.close()


def handshake_s(namespace: str, url: str) -> float:
    """Seconds that it takes to open a TCP connection."""
    connection = Connection(namespace, url, 60.0)
    started = time.monotonic()
    connection.connect()
    seconds = time.monotonic() - started
    connection.close()
    return seconds


@contextmanager
def _within(namespace: str) -> Iterator[None]:
    home = os.open(OURS, os.O_RDONLY)
    try:
        there = os.open(f"{NAMESPACES}/{namespace}", os.O_RDONLY)
        try:
            _enter(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(home)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")
