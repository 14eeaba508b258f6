"""A soak's verdict: it sees what it is there to see."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from chaos.accounts import account, answers_of, slope
from handmade import make_list, make_part, make_row

CONTENTS = {"a.png": b"a", "b.png": b"b"}
ETAGS = {name: hashlib.md5(data).hexdigest() for name, data in CONTENTS.items()}
MASKS: dict[str, Any] = {
    name: {"mask": {"bytes": name.encode(), "path": None}, "mask_crc32": number} for number, name in enumerate(CONTENTS)
}
RUN = "20260102T030405Z-abcdef"


def test_a_soak_starts_by_itself() -> None:
    """`make soak` has no pytest to say where the sources are."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--minutes" in done.stdout, done.stderr


def table(folder: Path, parts: list[list[dict[str, Any]]], frozen: list[str]) -> Path:
    """DEST with these Parts, and one closed run with this list."""
    for number, rows in enumerate(parts):
        path = folder / "segments" / f"{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_part(rows))
    run = folder / "runs" / RUN
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    listed = pq.read_table(pa.BufferReader(make_list(frozen)))
    etags = pa.array([ETAGS.get(uri, "e") for uri in frozen], pa.string())
    pq.write_table(listed.set_column(listed.schema.get_field_index("etag"), "etag", etags), run / "manifest.parquet")
    return folder


def row(name: str, **changes: Any) -> dict[str, Any]:
    return make_row(name, ETAGS[name], run_id=RUN) | MASKS[name] | changes


def test_what_is_right_is_right(tmp_path: Path) -> None:
    calm = answers_of(table(tmp_path / "calm", [[row("a.png"), row("b.png")]], []), CONTENTS)
    failed = make_row("b.png", ETAGS["b.png"], "fetch_failed", run_id="20260101T030405Z-abcdef")
    folder = table(tmp_path / "out", [[row("a.png")], [failed], [row("b.png", attempt=2)]], ["a.png", "b.png"])
    counts = account(folder, ETAGS, calm)
    assert (counts.rows, counts.terminal, counts.closed_runs, counts.error_kinds) == (3, 2, 1, {"fetch_failed": 1})
    assert (counts.lost, counts.duplicated, counts.unaccounted, counts.different) == (0, 0, 0, 0)


def test_each_wrong_is_counted_as_what_it_is(tmp_path: Path) -> None:
    calm = answers_of(table(tmp_path / "calm", [[row("a.png"), row("b.png")]], []), CONTENTS)

    def counts(name: str, *parts: list[dict[str, Any]], frozen: list[str] | None = None) -> tuple[int, int, int, int]:
        found = account(table(tmp_path / name, list(parts), frozen or []), ETAGS, calm)
        return found.lost, found.duplicated, found.unaccounted, found.different

    failed = make_row("b.png", ETAGS["b.png"], "fetch_failed", run_id=RUN)
    assert counts("lost", [row("a.png")]) == (1, 0, 0, 0)
    assert counts("failed", [row("a.png"), failed]) == (1, 0, 0, 0)
    assert counts("twice", [row("a.png"), row("b.png")], [row("b.png", run_id="other")]) == (0, 1, 0, 0)
    assert counts("absent", [row("a.png")], [row("b.png", run_id="other")], frozen=["a.png", "b.png"]) == (0, 0, 1, 0)
    other = row("b.png", mask={"bytes": b"other", "path": None})
    assert counts("mask", [row("a.png"), other]) == (0, 0, 0, 1)
    broken = make_row("b.png", ETAGS["b.png"], "corrupt", image_etag=ETAGS["b.png"])
    assert counts("broken", [row("a.png"), broken]) == (0, 0, 0, 1)


def test_memory_that_grows_is_told_from_memory_that_does_not() -> None:
    at_s = [float(second) for second in range(0, 600, 10)]
    noise = [(number * 7919) % 11 - 5 for number in range(60)]
    grows = slope(at_s, [1e9 + 1e6 * second + 1e6 * n for second, n in zip(at_s, noise, strict=True)])
    level = slope(at_s, [1e9 + 1e6 * n for n in noise])
    assert grows.lowest_bytes_per_min > 50e6 and abs(grows.bytes_per_min - 60e6) < 1e6
    assert level.lowest_bytes_per_min <= 0 < level.margin_bytes_per_min
