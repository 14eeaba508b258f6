"""The proxy that other tests rely on really does break things."""

from __future__ import annotations

import http.client
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from chaos.faultproxy import FaultProxy

BODY = bytes(range(256)) * 40


class _Handler(http.server.BaseHTTPRequestHandler):
    served = 0
    received = b""

    def do_GET(self) -> None:
        type(self).served += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_PUT(self) -> None:
        type(self).received = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    _Handler.served = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with FaultProxy(server.server_port, control_port=0) as started:
        yield started
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port: int | None, method: str = "GET", body: str | None = None, **more: Any) -> tuple[int, bytes]:
    assert port is not None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, "/x", body=body, **more)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_faults_nothing_changes(proxy: FaultProxy) -> None:
    assert ask(proxy.port) == (200, BODY)
    assert proxy.requests == ["GET /x"]


def test_flip_changes_one_bit(proxy: FaultProxy) -> None:
    proxy.inject("flip", limit=1)
    _, body = ask(proxy.port)
    assert sum((a ^ b).bit_count() for a, b in zip(body, BODY, strict=True)) == 1
    assert ask(proxy.port) == (200, BODY)


def test_flip_request_changes_one_bit_of_what_the_server_gets(proxy: FaultProxy) -> None:
    proxy.inject("flip_request", limit=1)
    for changed in (1, 0):
        assert ask(proxy.port, "PUT", "sent") == (200, b"")
        assert sum((a ^ b).bit_count() for a, b in zip(_Handler.received, b"sent", strict=True)) == changed


@pytest.mark.parametrize(("kind", "status"), [("unavailable", 503), ("error", 500), ("expired", 400)])
def test_refusals_never_reach_the_server(proxy: FaultProxy, kind: str, status: int) -> None:
    proxy.inject(kind, match="GET /x")
    assert ask(proxy.port)[0] == status
    assert _Handler.served == 0


def test_only_what_a_key_signed(proxy: FaultProxy) -> None:
    proxy.inject("expired", key="old")
    for key, status in (("old", 400), ("new", 200)):
        assert ask(proxy.port, headers={"Authorization": f"AWS4-HMAC-SHA256 Credential={key}/20260101/x"})[0] == status


@pytest.mark.parametrize(("kind", "served"), [("reset_before", 0), ("reset_after", 1), ("stall", 0), ("refuse", 0)])
def test_resets(proxy: FaultProxy, kind: str, served: int) -> None:
    proxy.inject(kind)
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        ask(proxy.port)
    assert _Handler.served == served


def test_truncate_ends_early(proxy: FaultProxy) -> None:
    proxy.inject("truncate")
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy.port)
    assert caught.value.partial == BODY[: len(BODY) // 2]


def test_the_control_port(proxy: FaultProxy) -> None:
    rules = {"seed": 7, "faults": [{"kind": "unavailable", "probability": 0.5}]}
    assert ask(proxy.control_port, "PUT", json.dumps(rules))[0] == 200
    first = [ask(proxy.port)[0] for _ in range(20)]
    assert set(first) == {200, 503}
    assert json.loads(ask(proxy.control_port)[1]) == {"hits": {"unavailable": first.count(503)}}
    ask(proxy.control_port, "PUT", json.dumps(rules))
    assert [ask(proxy.port)[0] for _ in range(20)] == first  # the same seed, the same faults
    assert ask(proxy.control_port, "PUT", '{"faults": [{"kind": "nonsense"}]}')[0] == 400
