"""Bytes that are almost right. Owns: how they are changed. Must not know: what reads them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

_TELLING = [
    b"",
    b"\0",
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"-1",
    b"1e999",
    b"null",
    b"[" * 2000,
    b"\x1b[",
]
_ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 255, 65536, 2**31, 2**64, 10**400, 0.5, -0.0, float("inf"), float("nan"), "", "x", "\0",
    "../..", "\x1b[2J", "\ud800", "9" * 400, [], [[]], [None], {}, {"id": 1}, [1, 2, 3, 4], [1e9, -1e9, 0, 1, 5, 5],
]  # fmt: skip


def mutations(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of `seeds` with up to six changes: bytes replaced, taken out, put in, or repeated from elsewhere in it; or
    with a value of its JSON replaced, where it has any.
    """
    change = st.tuples(
        st.sampled_from(["replace", "cut", "insert", "repeat", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 16),
        st.one_of(st.sampled_from(_TELLING), st.binary(max_size=8)),
    )
    seed = st.sampled_from(seeds)
    by_bytes = st.builds(_changed, seed, st.lists(change, max_size=6))
    if not any(map(json_of, seeds)):
        return by_bytes
    return st.one_of(by_bytes, st.builds(json_mutated, seed, st.integers(0, 1 << 32)))


def json_of(data: bytes) -> tuple[int, int, Any] | None:
    """(start, end, value) of the first JSON object in `data`, None where there is none."""
    text = data.decode("latin-1")
    start = text.find("{")
    if start < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return start, end, value


def json_mutated(data: bytes, seed: int) -> bytes:
    """`data` with one to three values of its JSON object replaced, taken out or put twice; unchanged if it has none."""
    found = json_of(data)
    if found is None:
        return data
    start, end, value = found
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        holder, key = chance.choice(places)
        how = chance.random()
        if how < 0.7:
            holder[key] = copy.deepcopy(chance.choice(_ODD_VALUES))
        elif how < 0.85:
            del holder[key]
        elif isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[f"{key} "] = holder[key]
    try:
        return data[:start] + json.dumps(value).encode() + data[end:]
    except (ValueError, RecursionError):  # a value may hold itself by now
        return data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key) of every value below."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(items):
        yield value, key
        yield from _places(below)


def _changed(data: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    for how, where, length, new in changes:
        at = int(where * (len(data) + 1))
        match how:
            case "replace":
                data = data[:at] + new + data[at + len(new) :]
            case "cut":
                data = data[:at] + data[at + length :]
            case "insert":
                data = data[:at] + new + data[at:]
            case "repeat":
                data = data[:at] + data[at // 2 : at // 2 + length] + data[at:]
            case "end":
                data = data[:at]
    return data
