"""A program: a cable between two interfaces on which every frame takes a while. For kernels without netem.

`python delay.py cable ONE OTHER SECONDS` passes frames both ways until it is ended; `python delay.py whole DEVICE` makes a
device send frames as they go over a wire, with their checksums and no longer than its MTU, for only these can be passed on.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import select
import socket
import struct
import sys
import time

EVERY_PROTOCOL = 0x0003
OUTGOING = 4
"""`PACKET_OUTGOING`: what we sent ourselves is shown to us too."""

FRAME_BYTES = 65_536
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17


def cable(one: str, other: str, delay_s: float) -> None:
    ends = [_raw(one), _raw(other)]
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        pause_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], pause_s)[0]:
            frame, address = end.recvfrom(FRAME_BYTES)
            if address[2] != OUTGOING:
                number += 1
                heapq.heappush(waiting, (time.monotonic() + delay_s, number, 1 - ends.index(end), frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, frame = heapq.heappop(waiting)
            try:
                ends[to].send(frame)
            except OSError:
                continue  # a full queue loses the frame, as a cable's switch does


def whole(device: str) -> None:
    """Without checksum offload there is no segmentation offload either."""
    value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP", device.encode(), ctypes.addressof(value)))


def _raw(device: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
    made.bind((device, 0))
    return made


def main() -> None:
    if sys.argv[1] == "cable":
        cable(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        whole(sys.argv[2])


if __name__ == "__main__":
    main()
