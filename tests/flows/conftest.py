"""The Prefect server and worker that these tests share, and somebody whom it can tell things."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect_site import site

__all__ = ["site"]


@pytest.fixture
def hook() -> Iterator[tuple[str, queue.Queue[str]]]:
    """A webhook, and what is said to it."""
    said: queue.Queue[str] = queue.Queue()

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said.put(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Ear)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", said
    server.shutdown()
    server.server_close()
