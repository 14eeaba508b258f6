"""Bytes that are almost right, drawn by Hypothesis. Must not know: what reads them."""

from __future__ import annotations

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
    b"\x1b[2J",
]


def mutations(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of `seeds` with up to six changes: bytes replaced, taken out, put in, or repeated from elsewhere in it."""
    change = st.tuples(
        st.sampled_from(["replace", "cut", "insert", "repeat", "end"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 16),
        st.one_of(st.sampled_from(_TELLING), st.binary(max_size=8)),
    )
    return st.builds(_changed, st.sampled_from(seeds), st.lists(change, max_size=6))


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
