"""Machines as network namespaces on one bridge, which has a namespace of its own.

Invariant: no interface, address or route of the host is created, changed or used; a veth pair is born with both ends
inside. Addresses are 10.77.0.N. Names begin with the rig's prefix, so that `tests/run` can sweep them after a crash.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from rig.processes import Process, run

MTU_BYTES = 9001
"""A VPC's jumbo frame: the path MTU that peers find on EC2."""


def prefix() -> str:
    """What every namespace of this rig begins with. `tests/run` sets it so that it can sweep after us."""
    return os.environ.get("WINDLASS_RIG_PREFIX", f"wl{os.getpid()}")


class Machine:
    """One network namespace with an address on the bridge."""

    def __init__(self, namespace: str, name: str, address: str) -> None:
        self.namespace = namespace
        self.name = name
        self.address = address

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

    def get(self, url: str, *curl_options: str, check: bool = True) -> bytes:
        """The body of a GET made on this machine."""
        silent = ["curl", "-sS", "--noproxy", "*", "--max-time", "60"]
        return self.run([*silent, *(["-f"] if check else []), *curl_options, url], check=check).stdout

    def limit_egress(self, mbit_per_s: int) -> None:
        """Slows what this machine sends, so that a transfer lasts long enough to be interrupted."""
        # A burst of a quarter MiB holds several whole GSO batches; smaller ones would be dropped, not delayed.
        shape = ["rate", f"{mbit_per_s}mbit", "burst", "256k", "latency", "100ms"]
        run(["tc", "-n", self.namespace, "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape])

    def unlimit_egress(self) -> None:
        run(["tc", "-n", self.namespace, "qdisc", "del", "dev", "eth0", "root"], check=False)


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
        return Machine(namespace, name, address)

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
