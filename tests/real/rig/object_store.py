"""moto's S3 as the origin of checkpoints, and its request log as the witness of what left it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rig.network import Machine
from rig.processes import wait_until

PORT = 9000
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Request:
    """One request and what was sent for it. `bytes` is the body, `at` when it came, where the log says so."""

    method: str
    path: str
    query: str
    range: str | None
    if_match: str | None
    client: str
    status: int
    bytes: int
    at: float = 0.0

    def object_bytes(self) -> int:
        """The bytes of an object that this response carried: listings and errors carry none."""
        is_object = self.path.count("/") >= 2 and not self.path.endswith("/")
        return self.bytes if self.method == "GET" and is_object and self.status in (200, 206) else 0


class ObjectStore:
    """One moto server on `machine`."""

    def __init__(self, machine: Machine, directory: Path, logs: Path) -> None:
        self.machine = machine
        self.endpoint = f"http://{machine.address}:{PORT}"
        directory.mkdir(parents=True)
        self._requests = directory / "requests.jsonl"
        argv = [sys.executable, str(HERE / "counting_s3.py"), str(PORT), str(self._requests)]
        # moto keeps bodies in temporary files: beside the rig's own state they are gone with it.
        environment = {**os.environ, "TMPDIR": str(directory), "MOTO_S3_CUSTOM_ENDPOINTS": self.endpoint}
        self._process = machine.start(argv, logs / f"{machine.name}-s3.log", environment)
        wait_until(lambda: bool(machine.get(f"{self.endpoint}/", check=False)), "moto answers", 60, self._process)

    def upload(self, bucket: str, sizes_by_key: dict[str, int]) -> dict[str, str]:
        """Makes the objects. Returns key to sha256."""
        return call_s3(self.machine, self.endpoint, "upload", bucket, json.dumps(sizes_by_key))

    def refuse(self, *signers: str) -> None:
        """Presigned requests of these access keys are denied from now on, and no others."""
        Path(f"{self._requests}.refused").write_text(" ".join(signers))

    def requests(self) -> list[Request]:
        if not self._requests.exists():
            return []
        return [Request(**json.loads(line)) for line in self._requests.read_text().splitlines()]

    def object_bytes(self) -> int:
        """The sum of all the object bytes that left this origin."""
        return sum(request.object_bytes() for request in self.requests())

    def close(self) -> None:
        self._process.terminate()


def call_s3(machine: Machine, endpoint: str, command: str, *arguments: str):
    """Runs one command of `s3_client.py` on `machine` and returns its answer."""
    argv = [sys.executable, str(HERE / "s3_client.py"), endpoint, command, *arguments]
    return json.loads(machine.run(argv).stdout)
