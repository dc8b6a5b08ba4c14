"""A program: what one TCP connection carries from one machine to another.

`python tcp.py listen PORT BYTES` takes one connection and prints its goodput in Mbit/s, the first quarter left out;
`python tcp.py send ADDRESS PORT BYTES` is the other end.
"""

from __future__ import annotations

import socket
import sys
import time

BLOCK = bytes(64 << 10)


def listen(port: int, size: int) -> float:
    with socket.create_server(("0.0.0.0", port)) as server:
        connection, _ = server.accept()
    with connection:
        read, counted_from, started = 0, 0, time.monotonic()
        while read < size and (block := connection.recv(256 << 10)):
            read += len(block)
            if not counted_from and read >= size // 4:
                counted_from, started = read, time.monotonic()
        return (read - counted_from) * 8 / 1e6 / (time.monotonic() - started)


def send(address: str, port: int, size: int) -> None:
    with connect(address, port) as connection:
        for _ in range(0, size, len(BLOCK)):
            connection.sendall(BLOCK)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def connect(address: str, port: int) -> socket.socket:
    """Tries until the other end listens."""
    for _ in range(100):
        try:
            return socket.create_connection((address, port), timeout=30)
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError(f"nobody listens at {address}:{port}")


def main() -> None:
    role, *arguments = sys.argv[1:]
    if role == "listen":
        print(listen(int(arguments[0]), int(arguments[1])))
    else:
        send(arguments[0], int(arguments[1]), int(arguments[2]))


if __name__ == "__main__":
    main()
