"""Nodes that pull one content together over shaped links, from an origin that counts.

The links are hundreds of times slower than a cluster's, and the content and its chunks smaller with them: what stays
is the ratio of the origin's rate to a link's, the number of chunks, and the number of chunks in the air. A chunk takes
four times as long as 8 MiB at 25 Gbit/s on links of 100 Mbit/s, and longer on slower ones. The one wait of a daemon
that is shorter than what a queue of such a link holds, that for a home's answer, grows with it below 100 Mbit/s; all
others are the shipped ones, and so weigh more here than in a cluster.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rig.blob_origin import Pace
from rig.cluster import Cluster, at_once
from rig.links import Links
from rig.network import Machine
from rig.object_store import Request
from rig.origin import Origin
from rig.processes import Process, wait_until
from rig.windlass import ADMIN, MIRROR, Daemon, Settings

HERE = Path(__file__).parent
KIB, MIB = 1 << 10, 1 << 20
CHUNKS_IN_THE_AIR = 16
"""What `swarm.inflight_bytes` holds of the usual chunks of 8 MiB."""

WANT_TIMEOUT_MS, USUAL_MBIT = 500, 100.0
"""The shipped patience with a home, and the rate from which on it is long enough."""

SETTLE_TIMEOUT_S = 60.0
PULL_TIMEOUT_S = 180.0
READY_S = 0.6
"""For a puller to start and to read the manifest, and a little more for each that starts beside it."""

TCP_PORT = 7000
CALIBRATION_S = 3.0

CONTENTS_KEPT = 3
"""Contents that fit a daemon's store: the ones of earlier repetitions leave it."""


@dataclass(frozen=True)
class Pull:
    """One node's pull. Times are seconds after it asked for the layer, `joined_s` after the first could."""

    node: str
    joined_s: float
    seconds: float | None
    first_byte_s: float | None
    longest_stall_s: float
    error: str | None
    read: int
    samples: list[tuple[float, int, int]]
    """Seconds, bytes read in order, bytes held in any."""

    def held_all_s(self, size: int) -> float | None:
        """When the daemon was first seen with the whole, in whatever order it came."""
        return next((at for at, _, held in self.samples if held >= size), None)


@dataclass(frozen=True)
class Run:
    """What came of one content."""

    digest: str
    size: int
    pulls: list[Pull]
    requests: list[Request]
    """The origin's log of this content."""
    idle: float
    """The share of the machine's CPU time that nobody, or only a niced process, had."""
    counters: dict[str, float] = field(default_factory=dict)
    """What `counters` tells of all nodes that live, as it grew in this run."""

    def origin_bytes(self) -> int:
        return sum(request.object_bytes() for request in self.requests)

    def origin_ratio(self) -> float:
        return self.origin_bytes() / self.size

    def asked_twice(self) -> dict[str, list[Request]]:
        """The ranges that the origin was asked for more than once, and by whom."""
        ranges: dict[str, list[Request]] = {}
        for request in self.requests:
            ranges.setdefault(request.range or "", []).append(request)
        return {asked: requests for asked, requests in ranges.items() if len(requests) > 1}

    def last_s(self, nodes: Sequence[str] | None = None) -> float:
        """Seconds from the first start to the end of the last of `nodes`, of all by default."""
        ends = [pull.joined_s + pull.seconds for pull in self.pulls if pull.seconds and (not nodes or pull.node in nodes)]
        return max(ends, default=float("nan"))

    def failures(self, but: Sequence[str] = ()) -> list[str]:
        return [f"{pull.node}: {pull.error}" for pull in self.pulls if pull.error and pull.node not in but]


@dataclass(frozen=True)
class Goodput:
    """What one transfer alone gets over these links, in Mbit/s."""

    tcp: float
    quic: float
    origin: float

    def links(self, set_to: Links) -> Links:
        """The links as they are to a content: peers send it over QUIC, the origin over TCP."""
        total = set_to.origin_total * self.origin / set_to.origin_node
        return Links(self.quic, self.quic, self.origin, total)


class CpuClock:
    """The share of all CPUs' time since the clock was made that no ordinary process had."""

    def __init__(self) -> None:
        self._at = self._read()

    def idle(self) -> float:
        spent = [now - then for now, then in zip(self._read(), self._at, strict=True)]
        _user, nice, _system, idle, waiting, *_ = spent
        return (nice + idle + waiting) / max(sum(spent), 1)

    @staticmethod
    def _read() -> list[int]:
        # The last two, of guests, are in user and nice too.
        return [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


class Swarm:
    """`nodes` daemons with shaped links on a cluster's network, and their origin."""

    def __init__(self, cluster: Cluster, nodes: int, links: Links, size: int, chunk_bytes: int) -> None:
        self.size = size
        self.chunk_bytes = chunk_bytes
        self.chunks = -(-size // chunk_bytes)
        self._cluster = cluster
        self._made = 0
        self._digests: dict[str, str] = {}
        """Of each image's first layer."""
        self.origin = Origin(cluster.origin, cluster.directory / "origin", cluster.logs)
        cluster.on_close(self.origin.close)
        self.machines = [cluster.machine(f"node{number}") for number in range(1, nodes + 1)]
        addresses = [machine.address for machine in self.machines]
        self.links = links
        self.daemons = [cluster.daemon(machine, self._settings(machine, addresses)) for machine in self.machines]
        self.shape(links)
        at_once(*[daemon.start for daemon in self.daemons])
        self.wait_until_settled()

    @property
    def names(self) -> list[str]:
        return [machine.name for machine in self.machines]

    def shape(self, links: Links, slow: Sequence[str] = (), slow_by: float = 1.0) -> None:
        """Sets every link; those of the nodes in `slow` to a `slow_by`th."""
        self.links = links
        for machine in self.machines:
            by = slow_by if machine.name in slow else 1.0
            machine.shape(links.up / by, links.down / by)
        each = {machine.address: links.origin_node for machine in self.machines}
        total = links.origin_total or links.origin_node * len(self.machines) * 1.05
        self._cluster.origin.shape_towards(each, total)

    def wait_until_settled(self) -> None:
        """Until every daemon that runs trusts every other with claims."""
        running = [daemon for daemon in self.daemons if daemon.process.running()]
        for daemon in running:
            wait_until(
                lambda daemon=daemon: settled(daemon) >= len(running) - 1,
                f"{daemon.machine.name} trusts {len(running) - 1} peers",
                SETTLE_TIMEOUT_S,
                daemon.process,
            )

    def daemon(self, name: str) -> Daemon:
        return self.daemons[self.names.index(name)]

    def restart(self, *names: str) -> None:
        """Starts what was killed."""
        at_once(*[self.daemon(name).start for name in names])
        self.wait_until_settled()

    def tell_capacity(self, names: Sequence[str], capacity: int) -> None:
        """Starts these daemons anew with another `node.capacity`, where 10 is a usual node."""
        for name in names:
            self.daemon(name).process.terminate()
            self.daemon(name).settings.environment["WINDLASS_NODE__CAPACITY"] = str(capacity)
        self.restart(*names)

    def homes(self) -> dict[str, int]:
        """How many stripes each node is home of and knows something about."""
        return {daemon.machine.name: int(counters(daemon).get("home_stripes", 0)) for daemon in self.daemons}

    def warm(self, name: str) -> str:
        """Makes a content and has it pulled by one node, sooner than its link would allow. Returns its image's name."""
        image, _ = self._make()
        self._cluster.origin.unlimit_egress()
        pull = self._pull(self.machines[self.names.index(name)], image, time.monotonic() + READY_S, 0.0, 0.0)
        self.shape(self.links)
        assert pull.error is None, pull
        return image

    def run(
        self,
        joins_s: Sequence[float] | None = None,
        image: str | None = None,
        pulling: Sequence[str] | None = None,
        during: Callable[[], None] | None = None,
        sample_s: float = 0.2,
    ) -> Run:
        """One content to the nodes in `pulling` (all by default), each at its time after the first (all at once).

        `image` was made before; `during` is called when the first pull starts and may do whatever happens to a
        cluster. With `sample_s` 0 the daemons are not asked how far they are.
        """
        image, digest = (image, self._digests[image]) if image else self._make()
        machines = [machine for machine in self.machines if not pulling or machine.name in pulling]
        joins = joins_s or [0.0] * len(machines)
        before, counted = len(self.origin.requests(digest)), self._counters()
        start = time.monotonic() + READY_S + 0.1 * len(machines)
        with ThreadPoolExecutor(len(machines) + 2) as pool:
            pulls = [
                pool.submit(self._pull, machine, image, start + join, join, sample_s)
                for machine, join in zip(machines, joins, strict=True)
            ]
            time.sleep(max(0.0, start - time.monotonic()))
            clock = CpuClock()
            happening = pool.submit(during) if during else None
            done = [pull.result() for pull in pulls]
            idle = clock.idle()
            if happening:
                happening.result()
        requests = self._settled_requests(digest)[before:]
        self.origin.forget(image)
        return Run(digest, self.size, done, requests, idle, self._grown(counted))

    def goodput(self) -> Goodput:
        """Measures it between the first two nodes."""
        first, second = self.machines[:2]
        tcp = between(first, second, int(self.links.up * 1e6 / 8 * CALIBRATION_S))
        image = self.make([int(self.links.origin_node * 1e6 / 8 * CALIBRATION_S)])
        pull = self._pull(first, image, 0.0, 0.0, 0.0, mirror=f"http://{self.origin.host}")
        assert pull.seconds and pull.first_byte_s, pull
        origin = pull.read * 8 / 1e6 / (pull.seconds - pull.first_byte_s)
        warm = self.run(image=self.warm(first.name), pulling=[second.name], sample_s=0.02)
        return Goodput(tcp=tcp, quic=steady_mbit(warm.pulls[0], self.size), origin=origin)

    def first_bytes_s(
        self, image: str, layers: Sequence[int], machine: Machine, mirror: str = MIRROR
    ) -> list[float]:
        """Seconds to the first byte of these layers of an image in turn, through `mirror` (a URL)."""
        found = []
        for layer in layers:
            pull = self._pull(machine, image, 0.0, 0.0, 0.0, layer, mirror)
            assert pull.first_byte_s is not None, pull
            found.append(pull.first_byte_s)
        return found

    def lengthen_cable(self, name: str, delay_s: float) -> Process:
        """Every frame to and from one node takes so much longer, for the rest of this swarm's life."""
        for machine in [*self.machines, self._cluster.origin]:
            machine.send_whole_frames()
        cable = self.machines[self.names.index(name)].lengthen_cable(delay_s, self._cluster.logs / "cable.log")
        time.sleep(1.0)  # the bridge learns anew who is where
        return cable

    def make(self, sizes: Sequence[int]) -> str:
        """Makes an image of these layers. Returns its name."""
        self._made += 1
        image = f"rig/{self._made}-{time.monotonic_ns()}"
        self._digests[image] = self.origin.make(image, sizes)[0]
        return image

    def pace(self, pace: Pace) -> None:
        self.origin.pace(pace)

    def _make(self) -> tuple[str, str]:
        image = self.make([self.size])
        return image, self._digests[image]

    def _pull(
        self,
        machine: Machine,
        image: str,
        at: float,
        joined_s: float,
        sample_s: float,
        layer: int = 0,
        mirror: str = MIRROR,
    ) -> Pull:
        wanted = {"mirror": mirror, "registry": self.origin.host if mirror == MIRROR else "", "repository": image}
        wanted |= {"layer": layer, "at": at, "admin": ADMIN if sample_s else None, "sample_s": sample_s}
        argv = [sys.executable, str(HERE / "puller.py"), json.dumps(wanted)]
        told = json.loads(machine.run(argv, PULL_TIMEOUT_S).stdout)
        return Pull(node=machine.name, joined_s=joined_s, **told)

    def _settled_requests(self, digest: str) -> list[Request]:
        """The log once nothing is added to it any more: a line follows its last byte."""
        seen = self.origin.requests(digest)
        while True:
            time.sleep(0.3)
            again = self.origin.requests(digest)
            if len(again) == len(seen):
                return again
            seen = again

    def _counters(self) -> dict[str, dict[str, float]]:
        return {daemon.machine.name: counters(daemon) for daemon in self.daemons if daemon.process.running()}

    def _grown(self, before: dict[str, dict[str, float]]) -> dict[str, float]:
        """By how much each counter grew since, over the nodes that still run."""
        sums: dict[str, float] = {}
        for node, now in self._counters().items():
            for kind, value in now.items():
                sums[kind] = sums.get(kind, 0) + value - before.get(node, {}).get(kind, 0)
        return sums

    def _settings(self, machine: Machine, peers: Sequence[str]) -> Settings:
        scaled = {
            "WINDLASS_CACHE__CHUNK_BYTES": str(self.chunk_bytes),
            "WINDLASS_SWARM__INFLIGHT_BYTES": str(CHUNKS_IN_THE_AIR * self.chunk_bytes),
            # A whole window at once would wait for seconds in the queue of a link as slow as these.
            "WINDLASS_TRANSPORT__INITIAL_WINDOW_BYTES": "65536",
            "WINDLASS_SWARM__WANT_TIMEOUT_MS": f"{WANT_TIMEOUT_MS * max(1.0, USUAL_MBIT / self.links.up):.0f}",
            # A pull begins when its layer is asked for.
            "WINDLASS_REGISTRY__PREFETCH_LAYERS": "0",
        }
        return Settings(
            peers=peers,
            registry=self.origin.host,
            objects=f"http://{self.origin.host}",
            data_dir=self._cluster.directory / machine.name / "store",
            certificates=self._cluster.authority.issue(machine.name),
            budget=f"{CONTENTS_KEPT * self.size + 64 * MIB} B",
            environment=scaled,
        )


def between(sender: Machine, receiver: Machine, size: int) -> float:
    """Mbit/s of one TCP connection."""
    program = [sys.executable, str(HERE / "tcp.py")]
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(receiver.run, [*program, "listen", str(TCP_PORT), str(size)])
        connected = sender.run([*program, "send", receiver.address, str(TCP_PORT), str(size)], check=False)
        assert connected.returncode == 0, connected
        return float(listening.result().stdout)


def steady_mbit(pull: Pull, size: int) -> float:
    """The rate at which a node came to hold the middle of a content."""
    middle = [(at, held) for at, _, held in pull.samples if size // 4 <= held <= size * 9 // 10]
    (begun, had), (ended, has) = middle[0], middle[-1]
    return (has - had) * 8 / 1e6 / (ended - begun)


def settled(daemon: Daemon) -> int:
    """Peers that it trusts with claims."""
    answer = daemon.machine.get(f"{ADMIN}/v1/stats", check=False)
    return json.loads(answer)["peers"]["settled"] if answer else 0


def counters(daemon: Daemon) -> dict[str, float]:
    """`windlass_swarm` by kind, and the `second_requests` that an origin which brought nothing was sent."""
    found = {"second_requests": 0.0}
    for line in daemon.metrics_text().decode().splitlines():
        if line.startswith("windlass_origin_hedges_total{"):
            found["second_requests"] += float(line.rsplit(" ", 1)[1])
        if line.startswith("windlass_swarm{"):
            label, value = line.rsplit(" ", 1)
            found[label.split('kind="')[1].split('"')[0]] = float(value)
    return found
