"""A checkpoint of three times the memory passes through: what the node's other programs work on stays in it.

Only in a release's run: it needs a memory control group, and some minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig.cluster import Cluster
from rig.images import MIB
from rig.processes import run
from rig.windlass import Daemon

LIMIT_BYTES = 512 * MIB
WORKING_SET_BYTES = 200 * MIB
SHARD_BYTES = 64 * MIB
SHARDS = 24

GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def memory_group(name: str) -> Iterator[Path]:
    """The `cgroup.procs` of a group that may have LIMIT_BYTES of memory, page cache and all."""
    first = (GROUPS / "memory").is_dir()
    group = GROUPS / "memory" / name if first else GROUPS / name
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(LIMIT_BYTES))
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def resident(path: Path) -> float:
    """Which part of a file is in the page cache."""
    shown = json.loads(run(["fincore", "--json", "--bytes", str(path)]).stdout)["fincore"][0]
    return int(shown["res"]) / int(shown["size"])


def in_group(procs: Path) -> list[str]:
    return ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh"]


if os.environ.get("WINDLASS_RIG_FULL"):

    def test_a_checkpoint_evicts_nobodys_working_set(
        cluster: Cluster, figure: Callable[[str, object], None]
    ) -> None:
        machine = cluster.machine("node")
        working_set = cluster.directory / "working-set"
        sizes = {f"large/{number}": SHARD_BYTES for number in range(SHARDS)}
        cluster.objects.upload("models", sizes)
        with memory_group(f"wl-{os.getpid()}") as procs:
            daemon: Daemon = cluster.daemon(machine, cluster.settings(machine, [machine.address]))
            daemon.start()
            procs.write_text(str(daemon.process.pid))
            # Written past the cache, and read three times: pages that are in use.
            run(["dd", "if=/dev/urandom", f"of={working_set}", "bs=1M", f"count={WORKING_SET_BYTES // MIB}", "oflag=direct"])
            for _ in range(3):
                run([*in_group(procs), "cat", str(working_set)])
            before = resident(working_set)
            status, output = daemon.fetch("s3://models/large/", str(cluster.directory / "fetched"), timeout_s=600)
            assert status == 0, output
            after = resident(working_set)
            daemon.close()
        moved = sum(sizes.values()) // MIB
        figure(f"working set in memory before and after {moved} MiB in {LIMIT_BYTES // MIB} MiB", (before, after))
        assert before == pytest.approx(1.0) and after > 0.9
