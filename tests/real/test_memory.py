"""A daemon's resident memory does not grow with what it moves."""

from __future__ import annotations

import os
from collections.abc import Callable

from rig.cluster import Cluster, at_once
from rig.images import MIB

OBJECT_BYTES = 64 * MIB
OBJECTS = 64 if os.environ.get("WINDLASS_RIG_FULL") else 16
LIMIT_BYTES = 256 * MIB


def test_resident_memory_stays_within_its_limit(cluster: Cluster, figure: Callable[[str, object], None]) -> None:
    nodes = cluster.nodes(2, containerd=False)
    cluster.objects.upload("models", {f"big/{number}": OBJECT_BYTES for number in range(OBJECTS)})
    ends = at_once(
        *[
            lambda node=node: node.daemon.fetch("s3://models/big/", str(cluster.directory / node.machine.name / "big"))
            for node in nodes
        ]
    )
    assert [status for status, _ in ends] == [0, 0], ends
    peaks = [node.daemon.process.peak_resident_bytes() for node in nodes]
    moved_mib = OBJECTS * OBJECT_BYTES // MIB
    figure(f"{moved_mib} MiB fetched on each of 2 nodes: peak resident MiB", [peak // MIB for peak in peaks])
    assert max(peaks) <= LIMIT_BYTES
