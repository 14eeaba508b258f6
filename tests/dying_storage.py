"""A store whose process dies at a chosen change: what a kill leaves behind, for every moment at which it can come."""

from __future__ import annotations

import threading
from typing import Any

from pipeline.storage import Storage

_CHANGES = {"put_new", "put", "replace", "delete"}


class KilledError(BaseException):
    """As a kill: nothing may catch it, and nothing is done after it."""


class DyingStorage:
    """Passes calls on to `storage` until `changes_left` changes were made; from the next one on every call dies.

    Between two changes a kill leaves the same state, whenever it comes: so these are all the states there are.
    """

    def __init__(self, storage: Storage, changes_left: int) -> None:
        self._storage = storage
        self._left = changes_left
        self._lock = threading.Lock()
        self.died = False

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._storage, name)
        if not callable(call) or name == "check_create_only":  # which changes nothing that counts
            return call

        def passed_on(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                if name in _CHANGES:
                    self.died |= self._left == 0
                    self._left -= 1
                if self.died:
                    raise KilledError
                return call(*arguments, **options)

        return passed_on
