"""Who works on a run now. Owns: `lease.json`, the heartbeat, the decision that a holder is dead.
Must not know: what a run does. A lease saves double work, no more: what makes rows safe is that Parts are created once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import HeldError, StoppedError, StorageError
from pipeline.storage import Storage, hide_secrets, uri_name

log = logging.getLogger(__name__)

#: A lease is renewed so often in its TTL, and often enough for others, who go by a TTL of their own.
_BEATS = 4
_BEAT_S = 7.5


def this_host() -> str:
    """Names this process table: equal exactly where a process id means the same process."""
    boot = _read("/proc/sys/kernel/random/boot_id") or "unknown"
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = "unknown"
    return f"{socket.gethostname()}/{boot}/{namespace}"


def process_start(pid: int) -> str | None:
    """When `pid` began, in clock ticks since boot; None where no such process lives. Tells a reused id."""
    stat = _read(f"/proc/{pid}/stat")
    if stat is None:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else fields[19]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


class Lease:
    """A lease on one run. A context manager: taken on entry, kept alive by a thread, given back on exit.

    `superseded` is set when it is held no more: stop working then. Another driver has taken it, or it could not be
    renewed for a reason that is not its store's, which is then `failure`. While its store fails it is tried again.
    """

    def __init__(
        self,
        storage: Storage,
        uri: str,
        *,
        ttl_s: float,
        wait: bool = False,
        should_stop: Callable[[], bool] | None = None,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        """`is_over`: asked where the lease has gone from under its holder; then it is not written again."""
        self._is_over = is_over or (lambda: False)
        self._storage = storage
        self._uri = uri
        self._ttl_s = ttl_s
        self._wait = wait
        self._should_stop = should_stop or (lambda: False)
        self._holder = uuid.uuid4().hex
        self._beat = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.superseded = threading.Event()
        self.failure: Exception | None = None

    def __enter__(self) -> Lease:
        """Raises HeldError where a live driver holds the run (unless `wait`), StoppedError where `should_stop` says so,
        StorageError where the store fails.
        """
        while True:
            if not self._outlive_holder() and self._storage.create_only_is_atomic:
                # Twice, since it may be gone again; what is there and cannot be read is damaged.
                created = self._write_new() or (not self._read() and self._write_new())
                # A disk without hard links says what it is when it is first asked.
                if created and self._storage.create_only_is_atomic:
                    break
                if not created and self._read():
                    continue
            if self._should_stop():
                raise StoppedError("stopped while taking up a run")
            self._write()
            time.sleep(min(0.2, self._ttl_s / 10))  # who wrote at the same moment finds out that he was not the last
            if self._read().get("holder") == self._holder:
                break
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        # What is wrong with it was told already: it must not stand in the way of that.
        with contextlib.suppress(Exception if self.failure else StorageError):
            if self._read().get("holder") == self._holder:
                self._storage.delete(self._uri)

    def _outlive_holder(self) -> bool:
        """Returns once nobody holds the run: whether a lease of the dead is there. Dead: its process is gone, or its
        lease stood still for a TTL."""
        seen = self._read()
        since_s = time.monotonic()
        while seen:
            if seen.get("host") == this_host() and process_start(int(seen.get("pid", -1))) != seen.get("started"):
                return True
            if time.monotonic() - since_s > self._ttl_s:
                return True
            time.sleep(min(0.5, self._ttl_s / 10))
            if self._should_stop():
                raise StoppedError("stopped while waiting for another driver's run")
            now = self._read()
            if now != seen:
                if now and not self._wait:
                    run_id, host = uri_name(self._uri.rpartition("/")[0]), str(now.get("host")).split("/")[0]
                    raise HeldError(
                        f"run {run_id} is being worked on by process {now.get('pid')} on {host}: "
                        "wait until it ends (`segment --wait` does), or stop it"
                    )
                seen, since_s = now, time.monotonic()
        return False

    def _keep(self) -> None:
        failures = 0
        try:
            while not self._stop.wait(min(self._ttl_s / _BEATS, _BEAT_S)):
                try:
                    if not self._renew():
                        self.superseded.set()
                        return
                    failures = 0
                except StorageError as error:
                    log.warning("the lease could not be renewed: %s", error)
                except Exception as error:
                    failures += 1
                    if failures == _BEATS:  # a whole TTL, or that of most others
                        raise
                    why = hide_secrets(f"{type(error).__name__}: {error}")
                    log.warning("the lease could not be renewed: %s", why)
        except Exception as error:  # noqa: BLE001 - told by the run, which stops
            self.failure = error
            self.superseded.set()

    def _renew(self) -> bool:
        """False where another driver has taken the lease."""
        now = self._read()
        if now and now.get("holder") != self._holder:
            log.warning("another driver has taken over this run (process %s)", now.get("pid"))
            return False
        if not now and self._is_over():
            log.warning("another driver has taken over this run, and ended it")
            return False
        self._write()
        return True

    def _write_new(self) -> bool:
        """Whether the lease, which was not there, is ours: of all who write it now, one is told so."""
        # A write whose answer was lost is ours all the same.
        return self._storage.put_new(self._uri, self._body()) or self._read().get("holder") == self._holder

    def _write(self) -> None:
        self._storage.put(self._uri, self._body())

    def _body(self) -> bytes:
        self._beat += 1
        pid = os.getpid()
        body = {
            "holder": self._holder, "beat": self._beat, "host": this_host(), "pid": pid,
            "started": process_start(pid), "at": time.time(), "ttl_s": self._ttl_s,
        }  # fmt: skip
        return json.dumps(body).encode()

    def _read(self) -> dict[str, Any]:
        return read_lease(self._storage, self._uri)


def read_lease(storage: Storage, uri: str) -> dict[str, Any]:
    """The lease at `uri`, {} where nobody holds one or it cannot be understood."""
    try:
        body = json.loads(storage.get(uri).data)
    except StorageError as error:
        if error.kind == "missing":
            return {}
        raise
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
