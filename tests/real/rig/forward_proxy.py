"""A program: a plain HTTP forward proxy that writes what it was asked for, one URL per line.

`python forward_proxy.py PORT LOG`.
"""

from __future__ import annotations

import http.client
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "proxy-connection", "keep-alive", "transfer-encoding"}
"""Headers that end at the proxy (RFC 9110 section 7.6.1)."""


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log = None
    lock = threading.Lock()

    def log_message(self, *_) -> None:
        """Nothing: the log of URLs is the record."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        with self.lock:
            self.log.write(f"{self.command} {self.path}\n")
        upstream = http.client.HTTPConnection(url.netloc, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        upstream.request(self.command, f"{url.path}?{url.query}" if url.query else url.path, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {*HOP_BY_HOP, "content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)
        upstream.close()


def main() -> None:
    Proxy.log = open(sys.argv[2], "a", buffering=1)
    ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Proxy).serve_forever()


if __name__ == "__main__":
    main()
