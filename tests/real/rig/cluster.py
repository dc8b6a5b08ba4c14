"""The whole: a network, an origin machine with a registry and an object store, and nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rig.containerd import Containerd
from rig.network import Machine, Network
from rig.object_store import ObjectStore
from rig.registry import Registry
from rig.windlass import MIRROR, Authority, Daemon, Settings, wait_until_joined

NOWHERE = "http://127.0.0.1:9"


@dataclass
class Node:
    """A GPU node: a machine with a windlass and, where images are pulled, a containerd that asks it first."""

    machine: Machine
    daemon: Daemon
    containerd: Containerd | None


class Cluster:
    """Starts parts when they are first needed and ends all of them in reverse order."""

    def __init__(self, tag: str, directory: Path, logs: Path) -> None:
        self.directory = directory
        self.logs = logs
        self._ends = ExitStack()
        logs.mkdir(parents=True, exist_ok=True)
        # What an earlier run left under --keep-logs would be counted as this one's.
        for old in logs.glob("*.log"):
            old.unlink()
        self.network = Network(tag)
        self._ends.callback(self.network.close)
        try:
            self.origin = self.network.machine("origin")
            self._registry: Registry | None = None
            self._objects: ObjectStore | None = None
            self._objects_endpoint = ""
            self._authority: Authority | None = None
            self._joined: list[Daemon] = []
        except BaseException:
            self.close()
            raise

    @property
    def registry(self) -> Registry:
        if self._registry is None:
            self._registry = Registry(self.origin, self.directory / "registry", self.logs)
            self._ends.callback(self._registry.close)
        return self._registry

    @property
    def objects(self) -> ObjectStore:
        if self._objects is None:
            self._objects = ObjectStore(self.origin, self.directory / "objects", self.logs)
            self._ends.callback(self._objects.close)
        return self._objects

    def without_objects(self) -> None:
        """Daemons are told of an object store that is not there."""
        assert self._objects is None, "there is one already"
        self._objects_endpoint = NOWHERE

    def machine(self, name: str) -> Machine:
        return self.network.machine(name)

    def containerd(self, machine: Machine) -> Containerd:
        started = Containerd(machine, self.directory / machine.name, self.logs)
        self._ends.callback(started.close)
        return started

    @property
    def authority(self) -> Authority:
        """The certificate authority of the cluster's daemons."""
        if self._authority is None:
            self._authority = Authority(self.directory / "certs")
        return self._authority

    def nodes(self, count: int, containerd: bool = True, extra: str = "") -> list[Node]:
        """Starts `count` nodes whose daemons know each other, with `extra` added to their configuration."""
        machines = [self.machine(f"node{number}") for number in range(1, count + 1)]
        addresses = [machine.address for machine in machines]
        settings = [replace(self.settings(machine, addresses), extra=extra) for machine in machines]
        daemons = [self.daemon(machine, chosen) for machine, chosen in zip(machines, settings, strict=True)]
        at_once(*[daemon.start for daemon in daemons])
        self._joined = daemons
        self.wait_until_joined()
        return [
            Node(machine, daemon, self._mirrored(machine) if containerd else None)
            for machine, daemon in zip(machines, daemons, strict=True)
        ]

    def settings(self, machine: Machine, peers: Sequence[str]) -> Settings:
        """What a daemon on `machine` is started with."""
        return Settings(
            peers=peers,
            registry=self.registry.host,
            objects=self._objects_endpoint or self.objects.endpoint,
            data_dir=self.directory / machine.name / "store",
            certificates=self.authority.issue(machine.name),
        )

    def daemon(self, machine: Machine, settings: Settings) -> Daemon:
        """A daemon that is not started yet, and that ends with the cluster."""
        made = Daemon(machine, self.directory / machine.name, self.logs, settings)
        self._ends.callback(made.close)
        return made

    def on_close(self, end: Callable[[], object]) -> None:
        """Has `end` called before what was started earlier ends."""
        self._ends.callback(end)

    def wait_until_joined(self) -> None:
        wait_until_joined(self._joined)

    def _mirrored(self, machine: Machine) -> Containerd:
        containerd = self.containerd(machine)
        containerd.ask(self.registry.host, MIRROR)
        return containerd

    def close(self) -> None:
        self._ends.close()


def at_once(*calls: Callable[[], object]) -> list:
    """Starts all the calls at the same moment; returns their results or raises the first failure."""
    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(call) for call in calls]
    return [call.result() for call in running]
