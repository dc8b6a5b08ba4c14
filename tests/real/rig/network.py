"""Machines as network namespaces on one bridge, which has a namespace of its own.

Invariant: no interface, address or route of the host is created, changed or used; a veth pair is born with both ends
inside. Addresses are 10.77.0.N. Names begin with the rig's prefix, so that `tests/run` can sweep them after a crash.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

from rig import inside
from rig.processes import Process, run

DELAY = Path(__file__).parent / "delay.py"

MTU_BYTES = 9001
"""A VPC's jumbo frame: the path MTU that peers find on EC2."""


BURST_BYTES = 128 << 10
"""Two whole GSO batches: a shaper with less room than one drops what it should delay."""

NOBODYS_CARD = "02:00:00:00:00:01"
"""A locally administered address (IEEE 802) that no interface here has: the bridge floods the frame, all ignore it."""

QUEUE_S = 0.05
"""What waits at a link before packets are dropped. Deep enough for a few batches at the lowest rate."""


def prefix() -> str:
    """What every namespace of this rig begins with. `tests/run` sets it so that it can sweep after us."""
    return os.environ.get("WINDLASS_RIG_PREFIX", f"wl{os.getpid()}")


class Machine:
    """One network namespace with an address on the bridge."""

    def __init__(self, namespace: str, name: str, address: str, bridge: str, port: str) -> None:
        self.namespace = namespace
        self.name = name
        self.address = address
        self._bridge = bridge
        self._port = port

    def argv(self, argv: Sequence[str]) -> list[str]:
        # `ip netns exec` gives the command a mount namespace too: what containerd mounts ends with containerd.
        return ["ip", "netns", "exec", self.namespace, *map(str, argv)]

    def start(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Process:
        return Process(self.argv(argv), log, env)

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float = 300.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        **options,
    ) -> subprocess.CompletedProcess:
        return run(self.argv(argv), timeout_s, check, env=env, **options)

    def get(self, url: str, check: bool = True) -> bytes:
        """The body of a GET made on this machine; without `check` also an error's, and nothing when nobody answers."""
        try:
            status, body = inside.request(self.namespace, url)
        except OSError:
            if check:
                raise
            return b""
        if check and status >= HTTPStatus.BAD_REQUEST:
            raise RuntimeError(f"{url}: {status} {body[:400]!r}")
        return body

    def answers(self, url: str) -> bool:
        """Whether a GET made on this machine finds what it asks for."""
        try:
            return inside.request(self.namespace, url)[0] == HTTPStatus.OK
        except OSError:
            return False

    def post(self, url: str, body: bytes) -> bytes:
        """What a POST made on this machine is answered."""
        status, answer = inside.request(self.namespace, url, body)
        if status != HTTPStatus.OK:
            raise RuntimeError(f"{url}: {status} {answer[:400]!r}")
        return answer

    def limit_egress(self, mbit_per_s: int) -> None:
        """Slows what this machine sends, so that a transfer lasts long enough to be interrupted."""
        # A burst of a quarter MiB holds several whole GSO batches; smaller ones would be dropped, not delayed.
        shape = ["rate", f"{mbit_per_s}mbit", "burst", "256k", "latency", "100ms"]
        run(["tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape])

    def unlimit_egress(self) -> None:
        run(["tc", "-n", self.namespace, "qdisc", "del", "dev", "eth0", "root"], check=False)

    def shape(self, up_mbit: float, down_mbit: float) -> None:
        """A link of these rates: what the machine sends waits at its own end, what it receives at the bridge's."""
        _shape(self.namespace, "eth0", up_mbit)
        _shape(self._bridge, self._port, down_mbit)

    def shape_towards(self, rates_mbit: Mapping[str, float], total_mbit: float) -> None:
        """Caps what this machine sends to each address, and to all of them together."""
        _shape(self.namespace, "eth0", total_mbit)
        # What a class is assured of it may send although its parent has sent all it may: no more than its share.
        share = total_mbit / len(rates_mbit)
        for number, (address, rate) in enumerate(rates_mbit.items(), start=16):
            _add_class(self.namespace, "eth0", "1:1", f"1:{number:x}", rate, assured_mbit=min(rate, share))
            match = ["u32", "match", "ip", "dst", f"{address}/32", "flowid", f"1:{number:x}"]
            here = ["tc", "-n", self.namespace, "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip"]
            run([*here, "prio", "1", *match])

    def lose_the_way_to(self, addresses: Sequence[str]) -> None:
        """Loses every packet to `addresses`, without a word to either side: it is sent to a card that nobody has."""
        for address in addresses:
            self._neighbour("replace", address, "lladdr", NOBODYS_CARD, "nud", "permanent")

    def find_the_way_to(self, addresses: Sequence[str]) -> None:
        for address in addresses:
            self._neighbour("delete", address)

    def _neighbour(self, verb: str, address: str, *rest: str) -> None:
        run(["ip", "-n", self.namespace, "neighbour", verb, address, "dev", "eth0", *rest])

    def send_whole_frames(self) -> None:
        """No offloads: what leaves is as it would be on a wire."""
        self.run([sys.executable, str(DELAY), "whole", "eth0"])

    def lengthen_cable(self, delay_s: float, log: Path) -> Process:
        """Every frame to and from this machine takes so much longer, until the process ends and with it the link.

        All who talk to it must `send_whole_frames`.
        """
        here = ["ip", "-n", self._bridge, "link"]
        near, far = f"near-{self._port}", f"far-{self._port}"
        run([*here, "add", near, "mtu", str(MTU_BYTES), "type", "veth", "peer", "name", far, "mtu", str(MTU_BYTES)])
        run([*here, "set", far, "master", "br0", "up"])
        run([*here, "set", near, "up"])
        run([*here, "set", self._port, "nomaster"])
        cable = [sys.executable, str(DELAY), "cable", self._port, near, str(delay_s)]
        return Process(["ip", "netns", "exec", self._bridge, *cable], log)

    def round_trip_s(self, url: str) -> float:
        """The median of ten TCP handshakes with the server of `url`."""
        return statistics.median(inside.handshake_s(self.namespace, url) for _ in range(10))


class Network:
    """The bridge and the machines on it."""

    def __init__(self, tag: str) -> None:
        self._tag = f"{prefix()}-{tag}"
        self._namespaces: list[str] = []
        self._machines = 0
        self._bridge = self._add_namespace("bridge")
        run(["ip", "-n", self._bridge, "link", "add", "br0", "mtu", str(MTU_BYTES), "type", "bridge"])
        run(["ip", "-n", self._bridge, "link", "set", "br0", "up"])

    def machine(self, name: str) -> Machine:
        self._machines += 1
        address = f"10.77.0.{self._machines}"
        namespace = self._add_namespace(name)
        port = f"port{self._machines}"
        far_end = ["peer", "name", "eth0", "netns", namespace, "mtu", str(MTU_BYTES)]
        run(["ip", "-n", self._bridge, "link", "add", port, "mtu", str(MTU_BYTES), "type", "veth", *far_end])
        run(["ip", "-n", self._bridge, "link", "set", port, "master", "br0", "up"])
        run(["ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0"])
        run(["ip", "-n", namespace, "link", "set", "eth0", "up"])
        return Machine(namespace, name, address, self._bridge, port)

    def close(self) -> None:
        for namespace in reversed(self._namespaces):
            # An interrupt may have come between a start and its owner's hearing of it.
            for pid in run(["ip", "netns", "pids", namespace], check=False).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run(["ip", "netns", "delete", namespace], check=False)
        self._namespaces.clear()

    def _add_namespace(self, name: str) -> str:
        namespace = f"{self._tag}-{name}"
        run(["ip", "netns", "add", namespace])
        self._namespaces.append(namespace)
        run(["ip", "-n", namespace, "link", "set", "lo", "up"])
        return namespace


def _shape(namespace: str, device: str, mbit: float) -> None:
    run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], check=False)
    run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "handle", "1:", "htb", "default", "2"])
    run(["tc", "-n", namespace, "class", "add", "dev", device, "parent", "1:", *_class("1:1", mbit)])
    _add_class(namespace, device, "1:1", "1:2", mbit)


def _add_class(
    namespace: str, device: str, parent: str, classid: str, mbit: float, assured_mbit: float | None = None
) -> None:
    here = ["tc", "-n", namespace]
    run([*here, "class", "add", "dev", device, "parent", parent, *_class(classid, mbit, assured_mbit)])
    # A queue counted in packets would hold a thousand batches.
    limit = max(int(mbit * 1e6 / 8 * QUEUE_S), 4 * BURST_BYTES)
    run([*here, "qdisc", "add", "dev", device, "parent", classid, "bfifo", "limit", str(limit)])


def _class(classid: str, mbit: float, assured_mbit: float | None = None) -> list[str]:
    rate = f"{(assured_mbit or mbit) * 1000:.0f}kbit"
    burst = ["burst", str(BURST_BYTES), "cburst", str(BURST_BYTES), "quantum", "65536"]
    return ["classid", classid, "htb", "rate", rate, "ceil", f"{mbit * 1000:.0f}kbit", *burst]
