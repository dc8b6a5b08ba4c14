"""An ECR on the origin's machine, private or public, and its log as the witness of what it was asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rig.cluster import Cluster
from rig.images import Image
from rig.processes import wait_until

PORT, STORE_PORT = 5601, 5602
SERVER = Path(__file__).parent / "ecr_server.py"


class Ecr:
    """One `ecr_server.py` that has one image."""

    def __init__(self, cluster: Cluster, image: Image, token_life_s: float, url_life_s: int, public: bool = False) -> None:
        cluster.directory.mkdir(parents=True, exist_ok=True)
        self.log = cluster.directory / "ecr.jsonl"
        machine = cluster.origin
        arguments = [PORT, STORE_PORT, machine.address, image.layout, self.log, token_life_s, url_life_s]
        argv = [sys.executable, str(SERVER), *map(str, arguments), *(["public"] if public else [])]
        self._process = machine.start(argv, cluster.logs / "ecr.log")
        self.url = f"http://{machine.address}:{PORT}"
        wait_until(lambda: bool(machine.get(f"{self.url}/v2/", check=False)), "the ECR stub answers", 30, self._process)

    def records(self, service: str, method: str | None = None) -> list[dict]:
        """What the API and registry (`ecr`) or the object store (`store`) were asked, in the order of the answers."""
        records = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [r for r in records if r["service"] == service and method in (None, r["method"])]

    def object_bytes(self) -> int:
        """What left the object store."""
        return sum(record["bytes"] for record in self.records("store") if record["status"] in (200, 206))

    def close(self) -> None:
        self._process.terminate()
