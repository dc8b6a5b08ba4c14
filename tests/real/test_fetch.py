"""Checkpoints: `windlass fetch` on three nodes takes each byte out of S3 once, resumes, and shows what it does."""

from __future__ import annotations

import hashlib
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from rig.cluster import Cluster, Node, at_once
from rig.images import MIB
from rig.object_store import call_s3
from rig.processes import Process, run, wait_until
from rig.windlass import environment

NODES = 3
SHARDS = 8
SHARD_BYTES = 64 * MIB + 12_345
"""Not a whole number of chunks: the last chunk of each object is short."""

RESUMED_SHARD_BYTES = 24 * MIB + 7
ORIGIN_MBIT_PER_S = 240

JOURNAL = ".windlass-fetch.jsonl"


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> list[Node]:
    return cluster.nodes(NODES, containerd=False)


@pytest.fixture
def slow_origin(cluster: Cluster) -> Iterator[None]:
    cluster.origin.limit_egress(ORIGIN_MBIT_PER_S)
    yield
    cluster.origin.unlimit_egress()


def checkpoint(prefix: str, shard_bytes: int) -> dict[str, int]:
    """Keys and sizes as Hugging Face lays a model out."""
    names = [f"model-{number:05}-of-{SHARDS:05}.safetensors" for number in range(1, SHARDS + 1)]
    small = {"config.json": 1_234, "tokenizer/tokenizer.json": 70_001, "empty.txt": 0}
    return {f"{prefix}/{name}": size for name, size in {**dict.fromkeys(names, shard_bytes), **small}.items()}


def hashes_below(directory: Path, prefix: str) -> dict[str, str]:
    """Key to sha256 of what lies below `directory`, as if it had been fetched from `prefix`; without fetch's journal."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_file() and path.name != JOURNAL:
            with path.open("rb") as file:
                found[f"{prefix}/{path.relative_to(directory)}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def test_three_nodes_fetch_a_checkpoint_and_s3_sends_it_once(
    cluster: Cluster, nodes: list[Node], figure: Callable[[str, object], None]
) -> None:
    sizes = checkpoint("llama", SHARD_BYTES)
    expected = cluster.objects.upload("models", sizes)
    before = cluster.objects.object_bytes()
    destinations = [cluster.directory / f"{node.machine.name}-llama" for node in nodes]

    started = time.monotonic()
    ends = at_once(
        *[
            lambda node=node, to=to: node.daemon.fetch("s3://models/llama/", str(to), "--json")
            for node, to in zip(nodes, destinations, strict=True)
        ]
    )
    figure("checkpoint of 513 MiB to 3 nodes: seconds", round(time.monotonic() - started, 1))

    assert [status for status, _ in ends] == [0] * NODES, ends
    for destination in destinations:
        assert hashes_below(destination, "llama") == expected
    sent = cluster.objects.object_bytes() - before
    figure("checkpoint to 3 nodes: S3 GET bytes ÷ size", sent / sum(sizes.values()))
    figure("checkpoint to 3 nodes: S3 GETs", sum(1 for request in cluster.objects.requests() if request.object_bytes()))
    assert sent == sum(sizes.values())


def test_a_fetch_again_asks_s3_for_no_byte(cluster: Cluster, nodes: list[Node]) -> None:
    before = cluster.objects.object_bytes()
    status, output = nodes[0].daemon.fetch("s3://models/llama/", str(cluster.directory / "again"))
    assert status == 0, output
    assert cluster.objects.object_bytes() == before


def test_one_object_and_filters(cluster: Cluster, nodes: list[Node]) -> None:
    expected = cluster.objects.upload("models", checkpoint("small", 300_000))
    one = cluster.directory / "one"
    status, output = nodes[0].daemon.fetch("s3://models/small/config.json", str(one))
    assert status == 0, output
    assert hashlib.sha256(one.read_bytes()).hexdigest() == expected["small/config.json"]

    some = cluster.directory / "some"
    status, output = nodes[1].daemon.fetch(
        "s3://models/small/", str(some), "--include", "*.safetensors", "--exclude", "model-00001-*"
    )
    assert status == 0, output
    wanted = {k: v for k, v in expected.items() if k.endswith(".safetensors") and "model-00001" not in k}
    assert hashes_below(some, "small") == wanted


@pytest.mark.parametrize("also_the_daemon", [False, True], ids=["the command", "command and daemon"])
def test_killed_half_way_it_fetches_only_the_rest(
    cluster: Cluster, nodes: list[Node], slow_origin: None, also_the_daemon: bool, figure: Callable[[str, object], None]
) -> None:
    prefix = "killed-both" if also_the_daemon else "killed-one"
    sizes = checkpoint(prefix, RESUMED_SHARD_BYTES)
    total = sum(sizes.values())
    expected = cluster.objects.upload("models", sizes)
    node, destination = nodes[0], cluster.directory / prefix
    before = cluster.objects.object_bytes()
    held = node.daemon.held_bytes()

    argv = node.daemon.fetch_argv(f"s3://models/{prefix}/", str(destination))
    command = Process(node.machine.argv(argv), cluster.logs / f"{prefix}-fetch.log", environment())
    wait_until(lambda: node.daemon.held_bytes() - held >= total // 2, "half is there", 120, node.daemon.process)
    written = node.daemon.held_bytes() - held
    if also_the_daemon:
        node.daemon.process.kill()
    command.kill()
    if also_the_daemon:
        node.daemon.start()
        cluster.wait_until_joined()
    sent_half_way = cluster.objects.object_bytes() - before
    assert sent_half_way < total, "the fetch was over before the kill: slow the origin"

    status, output = node.daemon.fetch(f"s3://models/{prefix}/", str(destination))
    assert status == 0, output
    assert hashes_below(destination, prefix) == expected
    sent = cluster.objects.object_bytes() - before
    figure(f"killed half way ({prefix}) and run again: S3 GET bytes ÷ size", sent / total)
    # The daemon that lives on fetches nothing twice. The next one has every chunk that the killed one had shown to be
    # written, durable or not; only what was on the wire, which was never written, is asked for again.
    refetched = sent - sent_half_way
    figure(f"killed half way ({prefix}): bytes fetched again ÷ bytes not yet written", refetched / (total - written))
    assert refetched <= total - written
    assert also_the_daemon or sent <= total


def test_the_bar_in_a_terminal(
    cluster: Cluster, nodes: list[Node], slow_origin: None, figure: Callable[[str, object], None]
) -> None:
    cluster.objects.upload("models", checkpoint("bar", 8 * MIB))
    node = nodes[0]
    argv = node.machine.argv(node.daemon.fetch_argv("s3://models/bar/", str(cluster.directory / "bar")))
    with Terminal(cluster.directory / "tmux.sock", argv) as terminal:
        screens = terminal.watch(until="windlass-ended", timeout_s=60)
    (cluster.logs / "bar.txt").write_text("\n----\n".join(screens))

    live = [screen for screen in screens if re.search(r"\[=+>.* left", screen)]
    assert live, f"no screen shows a bar under way:\n{screens[-1]}"
    shown = live[len(live) // 2]
    figure("the bar", "\n" + shown.rstrip())
    assert re.search(r"MiB of .* MiB/s, .* left, peers \d+ % origin \d+ % local \d+ %", shown), shown
    assert "windlass-ended 0" in screens[-1]


class Terminal:
    """A real terminal, kept by a tmux server of its own."""

    def __init__(self, socket: Path, argv: list[str]) -> None:
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        # The end is printed by a second word, so that the command line itself does not look like the end.
        shell = f"{shlex.join(argv)}; printf 'windlass-%s %s\\n' ended $?; sleep 60"
        run([*self._tmux, "new-session", "-d", "-x", "120", "-y", "30", shell], env=environment({"TERM": "xterm"}))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_) -> None:
        run([*self._tmux, "kill-server"], check=False)

    def watch(self, until: str, timeout_s: float) -> list[str]:
        """The different screens until one shows `until`."""
        screens: list[str] = []
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            screen = run([*self._tmux, "capture-pane", "-p"]).stdout.decode()
            if not screens or screens[-1] != screen:
                screens.append(screen)
            if until in screen:
                return screens
            time.sleep(0.1)
        raise TimeoutError(f"the terminal never showed {until!r}:\n{screens[-1]}")


def test_a_version_is_fetched_by_its_id(cluster: Cluster, nodes: list[Node]) -> None:
    made = call_s3(
        cluster.origin, cluster.objects.endpoint, "upload_versions", "versioned", "m/weights.bin", str(20 * MIB + 5)
    )
    latest = made[-1]
    for version, sha256 in [*made, ("", latest[1])]:
        destination = cluster.directory / f"version-{version}"
        query = f"?versionId={version}" if version else ""
        status, output = nodes[0].daemon.fetch(f"s3://versioned/m/weights.bin{query}", str(destination))
        assert status == 0, output
        with destination.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
    reads = [request for request in cluster.objects.requests() if "/versioned/" in request.path and request.object_bytes()]
    assert {version for version, _ in made} == {
        version for request in reads for version in parse_qs(request.query).get("versionId", [])
    }
    assert sum(request.object_bytes() for request in reads) == 2 * (20 * MIB + 5), "the latest was here already"
    status, output = nodes[0].daemon.fetch("s3://versioned/m/weights.bin?versionId=none", str(cluster.directory / "no"))
    assert status == 1, output
