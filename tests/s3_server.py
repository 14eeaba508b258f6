"""An S3 server in memory (moto) whose conditional writes are atomic, as those of S3 are.

moto looks whether the condition holds and writes then; of two threads both may look first, and both would win.
"""

from __future__ import annotations

import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

_put_object = S3Response.put_object
_one_at_a_time = threading.Lock()


def put_object(self: S3Response) -> Any:
    with _one_at_a_time:
        return _put_object(self)


if __name__ == "__main__":
    S3Response.put_object = put_object  # type: ignore[method-assign]
    main()
