"""JSON from somebody else. Owns: that its texts are Unicode. Must not know: what it means."""

from __future__ import annotations

import json
import re
from typing import Any

_HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(data: bytes | str) -> Any:
    """What UTF-8 JSON says. Raises ValueError where it is not JSON, or one of its texts has half a character (a lone
    surrogate), which no file's name and no digest can take; RecursionError where it is nested too deeply."""
    text = data if isinstance(data, str) else bytes(data).decode("utf-8")
    value = json.loads(text)
    if _HALF_A_CHARACTER.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # it may have its other half
    return value
