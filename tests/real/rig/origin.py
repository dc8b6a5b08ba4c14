"""`blob_origin.py` on a machine: how it is told what to do, and its log as the witness of what left it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rig.blob_origin import Fault, Pace
from rig.network import Machine
from rig.object_store import Request
from rig.processes import wait_until

PORT = 5000
PROGRAM = Path(__file__).parent / "blob_origin.py"


class Origin:
    """One origin on `machine`."""

    def __init__(self, machine: Machine, directory: Path, logs: Path) -> None:
        self.machine = machine
        self.host = f"{machine.address}:{PORT}"
        directory.mkdir(parents=True, exist_ok=True)
        self._requests = directory / "requests.jsonl"
        argv = [sys.executable, str(PROGRAM), str(PORT), str(self._requests)]
        self._process = machine.start(argv, logs / f"{machine.name}-blobs.log")
        wait_until(lambda: machine.answers(f"http://{self.host}/v2/"), "the origin answers", 30, self._process)

    def make(self, name: str, sizes: Sequence[int]) -> list[str]:
        """Makes an image of random layers. Returns their digests."""
        return self._tell({"make": name, "sizes": list(sizes)})["layers"]

    def forget(self, name: str) -> None:
        self._tell({"forget": name})

    def pace(self, pace: Pace) -> None:
        self._tell({"pace": asdict(pace)})

    def misbehave(self, *faults: Fault) -> int:
        """From now on; without faults it behaves. Returns how many answers those before have spoilt."""
        return self._tell({"faults": [asdict(fault) for fault in faults]})["dealt"]

    def requests(self, digest: str) -> list[Request]:
        """The GETs of one blob that are over, whatever was answered."""
        if not self._requests.exists():
            return []
        asked = [Request(**json.loads(line)) for line in self._requests.read_text().splitlines()]
        return [request for request in asked if request.method == "GET" and request.path.endswith(f"/blobs/{digest}")]

    def close(self) -> None:
        self._process.terminate()

    def _tell(self, command: dict) -> dict:
        return json.loads(self.machine.post(f"http://{self.host}/rig", json.dumps(command).encode()))
