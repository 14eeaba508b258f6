"""An S3 store as programs meet it on a bad day. Owns: which faults strike how often, and the environment that leads
programs to the proxy that has them. Must not know: the store, what is done with it.
"""

from __future__ import annotations

import os
from typing import Any

TIMEOUT_S = 3
#: Where a digest can tell a flipped byte: whole objects, and bodies that the client signs.
_WHOLE_OBJECTS = r"GET /[^?]*/(photos|masks/runs)/"
FAULTS: list[tuple[Any, dict[str, Any]]] = [
    ("unavailable", {"probability": 0.06}),
    ("error", {"probability": 0.02}),
    ("reset_before", {"probability": 0.04}),
    ("reset_after", {"probability": 0.04}),
    ("truncate", {"probability": 0.03}),
    ("stall", {"probability": 0.01, "seconds": TIMEOUT_S * 3}),
    ("stall_body", {"probability": 0.01, "seconds": TIMEOUT_S * 3}),
    ("flip", {"probability": 0.05, "match": _WHOLE_OBJECTS}),
    ("flip_request", {"probability": 0.05, "match": r"PUT .*/masks/"}),
]


def proxy_environment(port: int, access_key: str, secret_key: str) -> dict[str, str]:
    """The variables that lead every AWS tool to the proxy at `port`, and make it give up on a stalled request soon."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "MASKMILL_STORAGE_TIMEOUT_S": str(TIMEOUT_S),
    }
