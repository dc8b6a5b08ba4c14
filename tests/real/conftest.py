"""What every test of the real parts shares: a rig of its own per module, layers made once, and logs when one fails."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.cluster import Cluster
from rig.images import ImageBuilder
from rig.kubernetes import BINARY

LOG_TAIL_LINES = 15
LOG_LINE_CHARACTERS = 300
"""Enough of each log to see a cause, little enough to read twelve of them; `--keep-logs` has the whole."""


collect_ignore = [] if os.environ.get("WINDLASS_RIG_FULL") or BINARY.exists() else ["test_kubernetes.py"]
"""A real API server takes seven minutes of CPU to build: in a full run, or where it is built. `tests/run` says so."""

FIGURES = pytest.StashKey[list[tuple[str, object]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []
    # SIGTERM unwinds as Ctrl-C does, so that fixtures end what they started. A shell starts background commands with
    # SIGINT ignored, so that one is set too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A short directory for all state: Unix sockets allow 107 bytes of path."""
    directory = Path(tempfile.mkdtemp(prefix="wl-", dir=os.environ.get("WINDLASS_RIG_DIR", "/tmp")))
    directory.chmod(0o711)  # one daemon runs as nobody
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def images(scratch: Path) -> ImageBuilder:
    return ImageBuilder(scratch / "images")


@pytest.fixture(scope="module")
def cluster(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A network with an origin machine; the module adds the nodes it needs.

    A module that reads no object says `WITHOUT_OBJECTS = True`: an object store takes long to start.
    """
    name = request.module.__name__.removeprefix("test_")
    kept = os.environ.get("WINDLASS_RIG_LOGS")
    logs = Path(kept) / name if kept else scratch / name / "logs"
    built = Cluster(tag=name[:6], directory=scratch / name, logs=logs)
    if getattr(request.module, "WITHOUT_OBJECTS", False):
        built.without_objects()
    try:
        yield built
    finally:
        built.close()


@pytest.fixture(scope="session")
def figure(pytestconfig: pytest.Config) -> Callable[[str, object], None]:
    """Notes a measured figure, to be shown at the end of the run."""
    return lambda name, value: pytestconfig.stash[FIGURES].append((name, value))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if figures := config.stash[FIGURES]:
        terminalreporter.section("figures")
        for name, value in figures:
            shown = f"{value:.6f}" if isinstance(value, float) else value
            terminalreporter.write_line(f"{name}: {shown}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and (cluster := getattr(item, "funcargs", {}).get("cluster")):
        for log in sorted(cluster.logs.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            shown = [line[:LOG_LINE_CHARACTERS] for line in lines]
            report.sections.append((f"the end of {log.name}", "\n".join(shown)))
    return report
