"""The fault matrix: whatever an origin does, no client gets a wrong byte, and no pull fails that the origin would serve."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rig.cluster import Cluster, at_once
from rig.containerd import Containerd, PullError
from rig.containerd2 import FORMS, containerd_of
from rig.faulty_origin import FAULTS, IMAGE, LATER, LAYER_BYTES, MODES, blobs
from rig.network import Machine
from rig.private_authority import PrivateAuthority
from rig.processes import wait_until
from rig.windlass import MIRROR, OBJECTS, Daemon

PORT, TLS_PORT = 5701, 5702
RIG = Path(__file__).parent / "rig"

# Shorter than the defaults, so that a stall takes seconds; their order is kept.
TIMEOUTS = """
origin_idle_timeout_ms = 4000
[object]
first_byte_timeout_ms = 12000
"""

FULL = bool(os.environ.get("WINDLASS_RIG_FULL"))
PULLED_BY = list(FORMS) if FULL else ["containerd 1.6", "2.x transfer, ranges"]
STRUCK = [f"{kind}/{mode}" for kind in ("manifest", "blob") for mode in (MODES if FULL else MODES[1:])] + [f"blob/{LATER}"]
"""What meets a fault when a real containerd pulls, and when. Each of its forms takes most of a minute, for the stalls."""

ELSEWHERE = {"refused": "http://{0}:1", "tls": f"https://{{0}}:{TLS_PORT}"}
"""Faults of the connection itself: each has a daemon whose origin is there."""

SMALL_CHUNKS = "[cache]\nchunk_bytes = 1048576\n"
"""For the daemon of what goes wrong `later`: layers of three chunks, and a bit."""

TOO_LATE = f"blob/{LATER}/corrupt"
"""A wrong byte is found when all of a blob is compared, and by then containerd has it: that pull it fails itself, as if
the registry had sent it, and the next one is not to meet it again."""

AT_A_TIME = 64
"""Downloads of one containerd: at its default of 3, pulls would wait for those that meet a stall."""


class Bench:
    """The faulty origin and a daemon for each place that it can be at."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.address = cluster.origin.address
        self.name = f"{self.address}:{PORT}"
        self.log = cluster.directory / "faults.jsonl"
        cluster.directory.mkdir(parents=True, exist_ok=True)
        certificate, key = PrivateAuthority(cluster.directory / "nobody").issue(self.address)
        arguments = [PORT, TLS_PORT, certificate, key, self.log]
        argv = [sys.executable, str(RIG / "faulty_origin.py"), *map(str, arguments)]
        self.process = cluster.origin.start(argv, cluster.logs / "faults.log")
        url = f"http://{self.name}/v2/"
        wait_until(lambda: bool(cluster.origin.get(url, check=False)), "the faulty origin answers", 30, self.process)
        places = {"": f"http://{self.name}", **{f: p.format(self.address) for f, p in ELSEWHERE.items()}}
        self.machines: dict[str, Machine] = {}
        self.daemons: dict[str, Daemon] = {}
        for fault, place in places.items():
            self.add(fault, place)
        self.add(LATER, places[""], SMALL_CHUNKS)
        at_once(*[daemon.start for daemon in self.daemons.values()])

    def add(self, fault: str, place: str, extra: str = "[cache]\n") -> None:
        machine = self.cluster.machine(f"node{fault or 'main'}")
        origin = (
            f'[[registry.origins]]\nname = "{self.name}"\nendpoint = "{place}"\n'
            "first_byte_timeout_ms = 3000\nprogress_timeout_ms = 3000\n"
        )
        settings = replace(
            self.cluster.settings(machine, [machine.address]),
            objects=f'{place}"\nfirst_byte_timeout_ms = 3000\nstall_timeout_ms = 3000\nregion = "us-east-1',
            extra=f"{origin}{extra}{TIMEOUTS}",
        )
        self.machines[fault] = machine
        self.daemons[fault] = self.cluster.daemon(machine, settings)

    def at(self, fault: str, mode: str = "") -> str:
        if fault in ELSEWHERE:
            return fault
        return mode if mode == LATER else ""

    def cells(self) -> dict[str, str]:
        """`KIND/MODE/FAULT` to what the client saw."""
        by_place: dict[str, list[str]] = {}
        for fault in FAULTS:
            by_place.setdefault(self.at(fault), []).append(fault)
        answers = at_once(*[lambda p=place, f=faults: self._ask(p, f) for place, faults in by_place.items()])
        return {cell: seen for answer in answers for cell, seen in answer.items()}

    def _ask(self, place: str, faults: list[str]) -> dict[str, str]:
        upstream = f"http://{self.name}"
        argv = [sys.executable, str(RIG / "fault_client.py"), MIRROR, self.name, upstream, OBJECTS, *faults]
        return json.loads(self.machines[place].run(argv).stdout)

    @contextmanager
    def containerds(self, form: str) -> Iterator[dict[str, Containerd]]:
        """One beside each daemon, by the place that its daemon's origin is at."""
        started: dict[str, Containerd] = {}
        logs = self.cluster.logs / slug(form)
        try:
            for place, machine in self.machines.items():
                directory = self.cluster.directory / f"{machine.name}-{slug(form)}"
                started[place] = containerd_of(form, machine, directory, logs, downloads=AT_A_TIME)
                started[place].ask(self.name, MIRROR)
            yield started
        finally:
            for one in started.values():
                one.close()

    def upstream_starts(self, repository: str) -> list[int]:
        """Where each of containerd's own requests to the origin for the faulty content began."""
        starts = []
        for record in map(json.loads, self.log.read_text().splitlines()):
            match = re.fullmatch(IMAGE, record["path"])
            if not match or match[1] != repository or record["method"] != "GET" or "windlass" in record["agent"]:
                continue
            _, kind, _, _, what, reference = match.groups()
            is_layer = len(blobs(repository).get(reference, b"")) >= LAYER_BYTES
            if what == "manifests" if kind == "manifest" else is_layer:
                starts.append(int((re.match(r"bytes=(\d+)-", record["range"]) or [0, 0])[1]))
        return sorted(starts)

    def close(self) -> None:
        self.process.terminate()


def slug(form: str) -> str:
    """A form's name as part of a path and of a repository."""
    return re.sub(r"[^a-z0-9]+", "-", form)


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n" + "\n".join(lines)


@pytest.fixture(scope="module")
def bench(cluster: Cluster) -> Iterator[Bench]:
    made = Bench(cluster)
    yield made
    made.close()


def test_what_clients_see(bench: Bench, figure: Callable[[str, object], None]) -> None:
    cells = bench.cells()
    columns = [f"{kind}/{mode}" for kind in ("manifest", "blob", "object") for mode in MODES]
    rows = [[fault, *[cells[f"{column}/{fault}"] for column in columns]] for fault in FAULTS]
    figure("fault matrix", table([["fault", *columns], *rows]))

    assert len(cells) == 6 * len(FAULTS)
    assert not [cell for cell, seen in cells.items() if "WRONG" in seen]
    # The origin serves containerd, so that whatever it did to the daemon is no reason to fail.
    assert not [f"{cell}: {seen}" for cell, seen in cells.items() if "FAILED" in seen]
    # An object has no second host. What strikes once is got over; a connection that never comes is not, and what the
    # origin says for good it says to the client.
    passing = [f for f in FAULTS if f not in (*ELSEWHERE, "403", "404", "416", "changed-etag", "redirect-loop",
                                              "redirect-metadata", "408", "ignores-range", "wrong-range", "corrupt")]  # fmt: skip
    wrong = {f: cells[f"object/once/{f}"] for f in passing if cells[f"object/once/{f}"] != "right"}
    assert not wrong


def test_the_metadata_service_is_never_asked(bench: Bench) -> None:
    """A redirect there is refused before anything is dialled."""
    log = bench.daemons[""].output()
    assert "169.254.169.254" in log and "may not be asked" in log


def pull(bench: Bench, containerd: Containerd, repository: str) -> str:
    """Who served the faulty content in the end, or how the pull failed: containerd checks every digest itself."""
    reference = f"{bench.name}/{repository}:v1"
    try:
        containerd.pull(reference)
    except PullError as error:
        return f"FAILED: {str(error)[-300:]}"
    if not containerd.is_unpacked(reference):
        return "FAILED: not unpacked"
    match bench.upstream_starts(repository):
        case []:
            return "mirror"
        case [0, *more]:
            return f"upstream, {1 + len(more)} requests" if more else "upstream"
        case [start, *_]:
            return f"mirror, upstream from {start}"


@pytest.mark.parametrize("form", PULLED_BY)
def test_a_real_containerd_pulls_whatever_happens(
    bench: Bench, form: str, figure: Callable[[str, object], None]
) -> None:
    with bench.containerds(form) as containerds:

        def attempt(cell: str) -> str:
            _, mode, fault = cell.split("/")
            return pull(bench, containerds[bench.at(fault, mode)], f"{slug(form)}/{cell}")

        cells = [f"{column}/{fault}" for fault in FAULTS for column in STRUCK]
        # All at the same time: a stall is seconds of waiting.
        seen = dict(zip(cells, at_once(*[lambda cell=cell: attempt(cell) for cell in cells]), strict=True))
        again = attempt(TOO_LATE)
    rows = [[fault, *[seen[f"{column}/{fault}"].split(":")[0] for column in STRUCK]] for fault in FAULTS]
    figure(f"{form}: who served what met a fault", table([["fault", *STRUCK], *rows]))
    figure(f"{form}: {TOO_LATE}, then pulled again", again)
    failed = {cell: said for cell, said in seen.items() if said.startswith("FAILED")}
    # Unless the layer was found to be wrong before containerd had read so far.
    assert "unexpected commit digest" in failed.pop(TOO_LATE, "unexpected commit digest")
    assert not failed
    assert not again.startswith("FAILED")
