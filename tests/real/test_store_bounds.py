"""A small disk and much to carry through it: neither the budget nor the floor is crossed, and no pull fails."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rig.cluster import Cluster
from rig.disks import LoopDisk, MemoryDisk
from rig.images import MIB
from rig.object_store import call_s3
from rig.windlass import OBJECTS, Daemon

GIB = 1024 * MIB
DISK_BYTES = GIB
BUDGET_BYTES = 600 * MIB
FLOOR_BYTES = 200 * MIB
WINDOW_BYTES = 128 * MIB
"""`swarm.inflight_bytes`: what may be in the air beyond what is counted as stored."""

CONTENT_BYTES = 80 * MIB + 4_321
CONTENTS = 64 if os.environ.get("WINDLASS_RIG_FULL") else 16
"""5 GiB of different contents in a release's run, twice the budget in every other."""


@pytest.fixture(scope="module")
def disk(cluster: Cluster) -> Iterator[LoopDisk]:
    made = LoopDisk("ext4", cluster.directory / "disk.img", cluster.directory / "disk", DISK_BYTES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def elsewhere(cluster: Cluster) -> Iterator[MemoryDisk]:
    made = MemoryDisk(cluster.directory / "memory", GIB)
    yield made
    made.close()


@pytest.fixture(scope="module")
def daemon(cluster: Cluster, disk: LoopDisk, elsewhere: MemoryDisk) -> Iterator[Daemon]:
    # It has a mount namespace of its own, in which what is mounted later is not seen.
    machine = cluster.machine("node1")
    settings = cluster.settings(machine, [machine.address])
    made = cluster.daemon(
        machine, replace(settings, data_dir=disk.root / "store", budget=f"{BUDGET_BYTES} B", free_floor=f"{FLOOR_BYTES} B")
    )
    yield made.start()
    made.close()


class Watch:
    """Looks at the disk ten times a second, and remembers the worst."""

    def __init__(self, disk: LoopDisk) -> None:
        self._disk = disk
        self._ended = threading.Event()
        self.empty_bytes = disk.used_bytes()
        self.most_used_bytes = 0
        self.least_free_bytes = DISK_BYTES
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            status = os.statvfs(self._disk.root)
            used = (status.f_blocks - status.f_bfree) * status.f_frsize - self.empty_bytes
            self.most_used_bytes = max(self.most_used_bytes, used)
            self.least_free_bytes = min(self.least_free_bytes, status.f_bavail * status.f_frsize)


def test_five_gibibytes_through_a_disk_of_one(
    cluster: Cluster, daemon: Daemon, disk: LoopDisk, elsewhere: MemoryDisk, figure: Callable[[str, object], None]
) -> None:
    moved = 0
    with Watch(disk) as watch:
        for number in range(CONTENTS):
            key = f"large/{number}"
            sha256 = cluster.objects.upload("models", {key: CONTENT_BYTES})[key]
            if number % 2:
                destination = elsewhere.root / "file"
                status, output = daemon.fetch(f"s3://models/{key}", str(destination))
                assert status == 0, output
                assert hashlib.sha256(destination.read_bytes()).hexdigest() == sha256
                destination.unlink()
            else:
                got = call_s3(daemon.machine, OBJECTS, "get", "models", key, f"bytes=0-{CONTENT_BYTES - 1}")
                assert got == {"length": CONTENT_BYTES, "sha256": sha256}
            call_s3(cluster.origin, cluster.objects.endpoint, "delete", "models", key)
            moved += CONTENT_BYTES
    figure("through a disk of 1 GiB with a budget of 600 MiB: MiB moved", moved // MIB)
    figure("most used of that disk: MiB", watch.most_used_bytes // MIB)
    figure("least free of that disk (floor 200 MiB): MiB", watch.least_free_bytes // MIB)
    figure("chunks passed through without being stored", int(daemon.metric("windlass_store_pass_throughs_total")))
    assert daemon.metric("windlass_store_evictions_total") > 0
    assert watch.most_used_bytes <= BUDGET_BYTES + WINDOW_BYTES
    assert watch.least_free_bytes >= FLOOR_BYTES


def test_somebody_else_fills_the_disk(
    cluster: Cluster, daemon: Daemon, disk: LoopDisk, figure: Callable[[str, object], None]
) -> None:
    """The floor cannot be kept by evicting any more: what is asked for passes through, and a warning says why."""
    sizes = {f"beyond/{number}": 48 * MIB + number for number in range(4)}
    expected = cluster.objects.upload("models", sizes)
    ballast = []
    for key, size in sizes.items():
        # Each time the daemon gives way, somebody else takes that room too.
        ballast.append(disk.root / f"ballast-{len(ballast)}")
        with ballast[-1].open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(disk.free_bytes() - 16 * MIB, MIB))
        got = call_s3(daemon.machine, OBJECTS, "get", "models", key, f"bytes=0-{size - 1}")
        assert got == {"length": size, "sha256": expected[key]}
    passed = daemon.metric("windlass_store_pass_throughs_total")
    figure("with a disk that others filled: chunks passed through", int(passed))
    assert passed > 0
    assert "passed through without being stored" in daemon.output()
    for file in ballast:
        file.unlink()


def test_pins_keep_what_evictions_would_take(cluster: Cluster, daemon: Daemon, elsewhere: MemoryDisk) -> None:
    sizes = {f"kept/{number}": 32 * MIB for number in range(2)}
    expected = cluster.objects.upload("models", sizes)
    status, output = daemon.fetch("s3://models/kept/0", f"{elsewhere.root}/", "--pin-for", "1h")
    assert status == 0, output
    status, output = daemon.fetch("s3://models/kept/1", f"{elsewhere.root}/")
    assert status == 0, output
    status, output = daemon.command("pin", "s3://models/kept/1")
    assert status == 0 and "yes" in output, output
    status, output = daemon.command("pin", "s3://models/nobody/knows")
    assert status == 1 and "nothing stored on this node" in output, output
    for number in range(10):
        key = f"pressing/{number}"
        cluster.objects.upload("models", {key: 80 * MIB})
        got = call_s3(daemon.machine, OBJECTS, "get", "models", key, f"bytes=0-{80 * MIB - 1}")
        assert got["length"] == 80 * MIB
    held = {content["name"]: content for content in daemon.contents()}
    for key, size in sizes.items():
        assert held[f"s3://models/{key}"]["have_bytes"] == size
    assert held["s3://models/kept/0"]["pinned_seconds"] < 3600
    status, output = daemon.command("unpin", "--json", "s3://models/kept/")
    assert status == 0 and '"pinned": false' in output, output
    assert hashlib.sha256((elsewhere.root / "0").read_bytes()).hexdigest() == expected["kept/0"]
