"""containerd 2.x, built from source by `tests/run` (tests/real/tools): Debian has 1.6.

It pulls in two ways: by the transfer service, its default since 2.1, or in the CRI plugin itself ("local"); and fetches
a layer in one request or in parallel ranges.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rig.containerd import Containerd
from rig.network import Machine
from rig.processes import run

TOOLS = Path(os.environ.get("WINDLASS_RIG_TOOLS", "target/tools/bin")).absolute()

NOT_BUILT = "containerd 2.x is not built: tests/run builds it where Go is"
needed = pytest.mark.skipif(not (TOOLS / "containerd").exists(), reason=NOT_BUILT)

CONFIG = """
version = 3
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.differ.v1.erofs"]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  use_local_image_pull = {local}
  concurrent_layer_fetch_buffer = {buffer}
  max_concurrent_downloads = {downloads}
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{config_path}"
[plugins."io.containerd.transfer.v1.local"]
  concurrent_layer_fetch_buffer = {buffer}
  max_concurrent_downloads = {downloads}
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{root}/cni-bin"]
  conf_dir = "{root}/cni-conf"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
"""

RANGE_BYTES = 1 << 20
"""Of one parallel range: a layer of the tests is several."""


@dataclass(frozen=True)
class Way:
    """How a containerd 2.x pulls."""

    local: bool
    """In the CRI plugin instead of by the transfer service."""

    buffer: int = 0
    """Bytes of one parallel range; 0 fetches a layer in one request."""

    extra_certs: str = ""
    """More directories of a colon-separated `config_path`, as EKS writes it."""

    downloads: int = 3
    """At a time: of one image where it pulls itself, of all images where the transfer service does."""

    def __str__(self) -> str:
        return f"{'local' if self.local else 'transfer'}{'-ranges' if self.buffer else ''}"


FORMS: dict[str, Way | None] = {
    "containerd 1.6": None,
    "2.x transfer": Way(local=False),
    "2.x local": Way(local=True),
    "2.x transfer, ranges": Way(local=False, buffer=RANGE_BYTES),
    "2.x local, ranges": Way(local=True, buffer=RANGE_BYTES),
}
"""containerd in all its forms, by name; Debian's has no way to choose."""

PLAIN_FORMS = list(FORMS)[:3]
"""Those that differ in how they show a credential."""


class Containerd2(Containerd):
    """One containerd 2.x on `machine`."""

    COMMAND = str(TOOLS / "containerd")
    CTR = str(TOOLS / "ctr")

    def __init__(self, machine: Machine, directory: Path, logs: Path, way: Way) -> None:
        self._way = way
        super().__init__(machine, directory, logs)

    def _toml(self, directory: Path) -> str:
        return CONFIG.format(
            root=directory / "root",
            state=directory / "state",
            socket=self._socket,
            local=str(self._way.local).lower(),
            buffer=self._way.buffer,
            downloads=self._way.downloads,
            config_path=str(self.certs) + self._way.extra_certs,
        )

    @staticmethod
    def version() -> str:
        return run([Containerd2.COMMAND, "--version"]).stdout.decode().split()[2]


def containerd_of(form: str, machine: Machine, directory: Path, logs: Path, **more: int) -> Containerd:
    """A containerd of one of the `FORMS`, `more` of its way changed; skips the test where that is not built."""
    way = FORMS[form]
    if way is None:
        return Containerd(machine, directory, logs)
    if not (TOOLS / "containerd").exists():
        pytest.skip(NOT_BUILT)
    return Containerd2(machine, directory, logs, replace(way, **more))
