"""A small HTTP proxy that breaks things on purpose, to stand between a client and a store in tests.
Owns: the faults and when they strike. Must not know: S3, or anything of the project.

In process:

    with FaultProxy(upstream_port) as proxy:
        proxy.inject("flip", match="GET .*jpg", limit=1)
        ...                         # talk to http://127.0.0.1:{proxy.port}
        assert proxy.hits["flip"] == 1

On its own: `python faultproxy.py LISTEN_PORT UPSTREAM_PORT CONTROL_PORT`; then PUT JSON to the control
port, such as `{"seed": 1, "faults": [{"kind": "unavailable", "probability": 0.1}]}`; any request answers
with the hits so far.

Every request is read whole, and so is every answer: this is for tests, not for streaming. One connection
serves one request."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal[
    "refuse",  # the connection is reset before anything is read
    "unavailable",  # 503 SlowDown, the store never hears of it
    "error",  # 500 InternalError, the store never hears of it
    "expired",  # 400 ExpiredToken, as AWS says of session credentials that were good once; see `key`
    "reset_before",  # reset after the request was read, the store never hears of it
    "reset_after",  # the store did the work, the client never hears of it
    "stall",  # nothing is answered for `seconds`, then a reset; the store never hears of it
    "stall_body",  # half of the body, then nothing for `seconds`, then a reset
    "truncate",  # half of the body, then a clean end of the connection
    "flip",  # one bit of the body is wrong
    "flip_request",  # one bit of the request's body is wrong
    "latency",  # the answer comes `seconds` later
]

_ERROR_XML = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"
_STATUS = {
    "unavailable": (503, b"SlowDown"),
    "error": (500, b"InternalError"),
    "expired": (400, b"ExpiredToken"),
}


@dataclass
class Fault:
    """One rule: what happens to requests whose `METHOD /path` matches, how likely, and how often at most. With `key`
    to those alone that are signed by that access key.
    """

    kind: Kind
    probability: float = 1.0
    limit: int | None = None
    match: str = ""
    seconds: float = 0.0
    key: str = ""
    hits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown fault {self.kind!r}; one of {', '.join(get_args(Kind))}")


class FaultProxy:
    """The proxy, on a thread with an event loop of its own. `port` is where it listens. Deterministic for
    one client at a time.
    """

    def __init__(self, upstream_port: int, *, port: int = 0, control_port: int | None = None, seed: int = 0) -> None:
        self.port = port
        self.control_port = control_port
        self.hits: Counter[str] = Counter()
        self.requests: list[str] = []
        self._upstream_port = upstream_port
        self._random = random.Random(seed)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen. Returns once connections are accepted."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def stop(self) -> None:
        """Drop every connection and stop listening."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def inject(
        self,
        kind: Kind,
        *,
        probability: float = 1.0,
        limit: int | None = None,
        match: str = "",
        seconds: float = 0.0,
        key: str = "",
    ) -> None:
        """Add a rule. `match` is a regular expression searched in `METHOD /path?query`."""
        with self._lock:
            self._faults.append(Fault(kind, probability, limit, match, seconds, key))

    def clear(self) -> None:
        """Drop all rules, counts and the list of requests."""
        with self._lock:
            self._faults.clear()
            self.hits.clear()
            self.requests.clear()

    def _strikes(self, request: str, *kinds: Kind, key: str = "") -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.kind not in kinds or (fault.limit is not None and fault.hits >= fault.limit):
                    continue
                if fault.key and fault.key != key:
                    continue
                if re.search(fault.match, request) and self._random.random() < fault.probability:
                    fault.hits += 1
                    self.hits[fault.kind] += 1
                    return fault
        return None

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]
        if self.control_port is not None:
            self._control = await asyncio.start_server(self._serve_control, "127.0.0.1", self.control_port)
            self.control_port = self._control.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        if self.control_port is not None:
            self._control.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._one(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strikes("", "refuse"):
            return _reset(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        if re.search(rb"(?i)\r\nExpect: *100-continue", head):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(_content_length(head))
        request = " ".join(head.split(b" ", 2)[i].decode("latin-1") for i in (0, 1))
        self.requests.append(request)
        if late := self._strikes(request, "latency"):
            await asyncio.sleep(late.seconds)
        signed = re.search(rb"Credential=([^/]*)/", head)
        key = signed[1].decode("latin-1") if signed else ""
        fault = self._strikes(request, "unavailable", "error", "expired", "reset_before", "stall", key=key)
        if fault is not None and fault.kind in _STATUS:
            status, code = _STATUS[fault.kind]
            xml = _ERROR_XML % code
            writer.write(b"HTTP/1.1 %d Injected\r\nConnection: close\r\nContent-Type: application/xml\r\n" % status)
            writer.write(b"Content-Length: %d\r\n\r\n" % len(xml) + (b"" if request.startswith("HEAD") else xml))
            await writer.drain()
            return None
        if fault is not None:
            await asyncio.sleep(fault.seconds)
            return _reset(writer)

        if body and self._strikes(request, "flip_request"):
            body = self._flipped(body)
        answer_head, answer = await self._ask_upstream(head, body)
        fault = self._strikes(request, "reset_after", *(("truncate", "flip", "stall_body") if answer else ()))
        kind = fault.kind if fault else None
        if kind == "reset_after":
            return _reset(writer)
        if kind == "flip":
            answer = self._flipped(answer)
        writer.write(answer_head)
        writer.write(answer[: len(answer) // 2] if kind in ("truncate", "stall_body") else answer)
        await writer.drain()
        if fault is not None and kind == "stall_body":
            await asyncio.sleep(fault.seconds)
            _reset(writer)
        return None

    def _flipped(self, body: bytes) -> bytes:
        place = self._random.randrange(len(body))
        return body[:place] + bytes([body[place] ^ (1 << self._random.randrange(8))]) + body[place + 1 :]

    async def _ask_upstream(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        try:
            writer.write(_one_request_only(head, drop=rb"Connection|Expect") + body)
            await writer.drain()
            answer_head = await reader.readuntil(b"\r\n\r\n")
            return _one_request_only(answer_head, drop=rb"Connection|Keep-Alive"), await reader.read()
        finally:
            writer.close()

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(_content_length(head))
            status, answer = b"200 OK", {"hits": dict(self.hits)}
            if body:
                try:
                    wanted = json.loads(body)
                    faults = [Fault(**rule) for rule in wanted.get("faults", [])]
                except (ValueError, TypeError) as error:
                    status, answer = b"400 Bad Request", {"error": str(error)}
                else:
                    self.clear()
                    with self._lock:
                        self._random.seed(wanted.get("seed", 0))
                        self._faults.extend(faults)
            text = json.dumps(answer).encode()
            writer.write(b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def _content_length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\nContent-Length: *(\d+)", head)
    return int(found[1]) if found else 0


def _one_request_only(head: bytes, *, drop: bytes) -> bytes:
    kept = re.sub(rb"(?i)\r\n(?:" + drop + rb"):[^\r]*", b"", head)
    return kept[:-2] + b"Connection: close\r\n\r\n"


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST, not FIN."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main(arguments: list[str]) -> None:
    """`LISTEN_PORT UPSTREAM_PORT CONTROL_PORT`; runs until it is killed."""
    listen, upstream, control = map(int, arguments)
    with FaultProxy(upstream, port=listen, control_port=control):
        threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
