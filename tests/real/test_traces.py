"""Traces as a collector gets them: a pull's request, what it read, and each chunk with its source."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from rig.cluster import Cluster, at_once
from rig.images import ImageBuilder, Layer, push
from rig.processes import wait_until
from rig.windlass import wait_until_joined

COLLECTOR = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/json"
        with open(sys.argv[1], "ab") as kept:
            kept.write(body + b"\\n")
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer(("", 4318), Handler).serve_forever()
"""
"""Takes what an OpenTelemetry collector takes, and keeps it."""


def spans(kept: Path) -> list[dict]:
    found = []
    for line in kept.read_text().splitlines() if kept.exists() else []:
        for resource in json.loads(line)["resourceSpans"]:
            about = attributes(resource["resource"])
            assert about["service.name"] == "windlass"
            for scope in resource["scopeSpans"]:
                found += [{**span, "node": about["host.name"], **attributes(span)} for span in scope["spans"]]
    return found


def attributes(owner: dict) -> dict[str, str]:
    return {one["key"]: next(iter(one["value"].values())) for one in owner["attributes"]}


def test_a_pull_is_a_trace_from_request_to_sources(cluster: Cluster, images: ImageBuilder) -> None:
    cluster._objects = SimpleNamespace(endpoint="http://127.0.0.1:9")
    kept = cluster.directory / "spans.jsonl"
    collector = cluster.machine("collector")
    process = collector.start([sys.executable, "-c", COLLECTOR, str(kept)], cluster.logs / "collector.log")
    cluster.on_close(process.terminate)
    machines = [cluster.machine("trace1"), cluster.machine("trace2")]
    addresses = [machine.address for machine in machines]
    environment = {"WINDLASS_TRACES__ENDPOINT": f"http://{collector.address}:4318"}
    daemons = [
        cluster.daemon(machine, replace(cluster.settings(machine, addresses), environment=environment))
        for machine in machines
    ]
    at_once(*[daemon.start for daemon in daemons])
    wait_until_joined(daemons)

    image = images.build("trace", [Layer(1800, 20, False)])
    push(image, cluster.origin, cluster.registry.reference("trace/image"))
    digest, size = max(image.blobs().items(), key=lambda blob: blob[1])
    path = f"/v2/trace/image/blobs/{digest}?ns={cluster.registry.host}"
    for daemon in daemons:
        daemon.machine.run(["curl", "-sf", "-o", "/dev/null", f"http://127.0.0.1:5100{path}"])

    def reads() -> dict[str, dict]:
        return {span["node"]: span for span in spans(kept) if span["name"] == "read" and span["content"] == digest}

    wait_until(lambda: len(reads()) == 2, "both reads are collected", 30, process)
    first, second = (reads()[machine.name] for machine in machines)
    assert int(first["origin"]) == size and int(second["peers"]) == size, (first, second)
    for read, source in ((first, cluster.registry.host), (second, "trace1")):
        trace = [span for span in spans(kept) if span["traceId"] == read["traceId"]]
        request = next(span for span in trace if span["name"] == "request")
        assert request["path"] == path.split("?")[0] and read["parentSpanId"] == request["spanId"]
        chunks = [span for span in trace if span["name"] == "chunk"]
        assert len(chunks) == -(-size // (8 << 20)), "each chunk is in the trace of the request that it was fetched for"
        assert {span["source"] for span in chunks} == {source} and {span["outcome"] for span in chunks} == {"kept"}
        assert all(span["parentSpanId"] == read["spanId"] for span in chunks)
        assert all(int(span["startTimeUnixNano"]) < int(span["endTimeUnixNano"]) for span in chunks)
    assert daemons[0].metric("windlass_trace_spans_total", outcome="exported") > 0
