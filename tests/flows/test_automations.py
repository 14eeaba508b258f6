"""The server's automations: made once however often, and telling people of a run that failed."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prefect_site import Site, client_of

pytest.importorskip("prefect")

from prefect import tags

from flows.automations import create
from flows.segment_corpus import segment_corpus
from pipeline.errors import ModelError

pytestmark = pytest.mark.prefect


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


def test_they_are_made_once_and_tell_of_a_failure(
    site: Site, hook: tuple[str, queue.Queue[str]], tmp_path: Path
) -> None:
    url, said = hook
    with client_of(site):
        assert create(url) == create(url)
        with pytest.raises(ModelError), tags("maskmill"):
            segment_corpus(source=str(tmp_path), dest=str(tmp_path / "out"), model="nobody")
        text = said.get(timeout=60)
    assert "Failed" in text and "no model is called 'nobody'" in text
    made = [one["name"] for one in site.api("automations/filter", {})]
    assert sorted(name for name in made if name.startswith("maskmill")) == sorted(create_names())
    (block,) = site.api("block_documents/filter", {"block_documents": {"name": {"any_": ["maskmill-notify"]}}})
    assert url not in json.dumps(block), "the address is a secret"


def create_names() -> list[str]:
    return ["maskmill: failed and crashed runs are told", "maskmill: runs without heartbeats have crashed"]
