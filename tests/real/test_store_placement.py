"""`windlass fetch` onto the file systems of real nodes: one copy where the file system can, and it says how."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rig.cluster import Cluster
from rig.disks import LoopDisk, MemoryDisk
from rig.images import MIB
from rig.windlass import Daemon

SHARD_BYTES = 64 * MIB
SHARDS = 32 if os.environ.get("WINDLASS_RIG_FULL") else 4
"""2 GiB in a release's run. moto reads the whole of an object for each of its ranges: larger ones would take it minutes."""

DISK_BYTES = 2 * SHARDS * SHARD_BYTES + 512 * MIB


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def placed_on(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[tuple[str, LoopDisk, Daemon]]:
    kind = request.param
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"there is no mkfs.{kind} here")
    root = cluster.directory / kind
    disk = LoopDisk(kind, cluster.directory / f"{kind}.img", root, DISK_BYTES)
    machine = cluster.machine(kind)
    settings = cluster.settings(machine, [machine.address])
    daemon = cluster.daemon(machine, replace(settings, data_dir=root / "store"))
    yield kind, disk, daemon.start()
    daemon.close()
    disk.close()


def checkpoint(cluster: Cluster, prefix: str) -> dict[str, str]:
    sizes = {f"{prefix}/shard-{number}": SHARD_BYTES + number for number in range(SHARDS)}
    return cluster.objects.upload("models", sizes)


def methods(output: str) -> set[str]:
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {event["method"] for event in events if event["event"] == "file"}


def hashes_of(destination: Path, prefix: str) -> dict[str, str]:
    return {
        f"{prefix}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in destination.iterdir()
        if file.name.startswith("shard-")
    }


def test_a_checkpoint_takes_its_room_once(
    cluster: Cluster, placed_on: tuple[str, LoopDisk, Daemon], figure: Callable[[str, object], None]
) -> None:
    kind, disk, daemon = placed_on
    expected = checkpoint(cluster, kind)
    before = disk.used_bytes()
    destination = disk.root / "models"
    status, output = daemon.fetch(f"s3://models/{kind}/", str(destination), "--json")
    assert status == 0, output
    method = {"xfs": "reflink", "ext4": "hard-link"}[kind]
    assert methods(output) == {method}
    ratio = (disk.used_bytes() - before) / (SHARDS * SHARD_BYTES)
    figure(f"{kind}, {method}: disk used ÷ size of the checkpoint", ratio)
    assert ratio <= 1.02
    assert hashes_of(destination, kind) == expected
    writable = stat.S_IWUSR if kind == "xfs" else 0
    assert all(file.stat().st_mode & stat.S_IWUSR == writable for file in destination.glob("shard-*"))


def test_a_copy_where_it_is_asked_for(cluster: Cluster, placed_on: tuple[str, LoopDisk, Daemon]) -> None:
    kind, disk, daemon = placed_on
    expected = cluster.objects.upload("models", {f"own-{kind}/shard-0": 5 * MIB})
    destination = disk.root / "own"
    asked = ["--no-hard-link", "--mode", "640", "--owner", "1234:2345"]
    status, output = daemon.fetch(f"s3://models/own-{kind}/", str(destination), "--json", *asked)
    assert status == 0, output
    assert methods(output) == {"reflink" if kind == "xfs" else "kernel-copy"}
    placed = (destination / "shard-0").stat()
    assert (stat.S_IMODE(placed.st_mode), placed.st_uid, placed.st_gid) == (0o640, 1234, 2345)
    assert hashes_of(destination, f"own-{kind}") == expected


def test_another_file_system_gets_a_copy_or_a_reason(
    cluster: Cluster, placed_on: tuple[str, LoopDisk, Daemon], figure: Callable[[str, object], None]
) -> None:
    kind, _, daemon = placed_on
    expected = cluster.objects.upload("models", {f"far-{kind}/shard-0": 20 * MIB})
    # The daemon has a mount namespace of its own: what is mounted later it does not see. /dev/shm it does.
    there = Path("/dev/shm") / f"wl-{os.getpid()}-{kind}"
    sent = cluster.objects.object_bytes()
    try:
        status, output = daemon.fetch(f"s3://models/far-{kind}/", str(there), "--json")
        assert status == 0, output
        assert methods(output) <= {"copy", "kernel-copy"}
        figure(f"{kind} to tmpfs", methods(output))
        assert hashes_of(there, f"far-{kind}") == expected
    finally:
        shutil.rmtree(there, ignore_errors=True)
    sent = cluster.objects.object_bytes()
    for destination, says in {
        "/proc/windlass/": "/proc/windlass",
        "/sys/windlass/": "/sys/windlass",
        "/etc/hostname/below/": "/etc/hostname",
    }.items():
        status, output = daemon.fetch(f"s3://models/far-{kind}/", destination)
        assert status == 1 and says in output, output
    assert cluster.objects.object_bytes() == sent, "refused before a byte was fetched"


def test_the_files_do_not_need_the_store(cluster: Cluster, placed_on: tuple[str, LoopDisk, Daemon]) -> None:
    kind, disk, daemon = placed_on
    expected = cluster.objects.upload("models", {f"last-{kind}/shard-0": 9 * MIB})
    destination = disk.root / "last"
    status, output = daemon.fetch(f"s3://models/last-{kind}/", str(destination))
    assert status == 0, output
    daemon.close()
    shutil.rmtree(disk.root / "store")
    assert hashes_of(destination, f"last-{kind}") == expected


def test_a_destination_that_is_too_small_is_refused_before_a_byte_is_fetched(cluster: Cluster) -> None:
    small = MemoryDisk(cluster.directory / "tight", 4 * MIB)
    try:
        machine = cluster.machine("roomy")
        daemon = cluster.daemon(machine, cluster.settings(machine, [machine.address])).start()
        cluster.objects.upload("models", {"toolarge/a": 12 * MIB})
        sent = cluster.objects.object_bytes()
        status, output = daemon.fetch("s3://models/toolarge/", str(small.root / "m"))
        assert status == 1 and "free some space" in output, output
        assert cluster.objects.object_bytes() == sent
        daemon.close()
    finally:
        small.close()
