"""docs/queries.md, run as it stands: every question has the answer that its table was made to give."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import make_row
from tables import Table

import pipeline
from models.masks import encode_mask_png, encode_rle
from pipeline.storage import normalize_uri

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "queries.md").read_text(encoding="utf-8")
BEFORE, NOW = "a1b2c3d4e5f6", "0f1e2d3c4b5a"
NAMES = ("road", "car", "tree")
SIDE_PX = 10
NORTH, SOUTH = "s3://photos/north", "s3://photos/south"
MONDAYS = [dt.datetime(2026, 1, day, 3, tzinfo=dt.UTC) for day in (5, 12, 19)]


def questions() -> dict[str, str]:
    """Text by heading."""
    found = re.split(r"^## (\d+\. .*)$", PAGE, flags=re.M)[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


QUESTIONS = questions()


def image(
    name: str, car_px: int, tree_px: int, objects: int = 0, *, at: dt.datetime, second: int, node: str = "host-a",
    etag: str = "e1", entropy: float = 0.0, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """An image of 100 pixels: first cars, then trees, then road; `objects` cars in columns of their own."""
    flat = np.zeros(SIDE_PX * SIDE_PX, np.uint8)
    flat[:car_px] = 1
    flat[car_px : car_px + tree_px] = 2
    class_ids = flat.reshape(SIDE_PX, SIDE_PX)
    classes = [
        {"class_id": index, "name": NAMES[index], "pixels": int(count), "fraction": count / 100, "mean_confidence": 0.5,
         "regions": 1}
        for index, count in enumerate(np.bincount(flat, minlength=3)) if count
    ]  # fmt: skip
    return make_row(
        name, etag, node=node, processed_at=at + dt.timedelta(seconds=second), width=SIDE_PX, height=SIDE_PX,
        classes=classes, mask={"bytes": encode_mask_png(class_ids, [(0, 0, 0)] * 3), "path": None},
        instances=[car(index) for index in range(objects)], mean_entropy=entropy, mean_confidence=1 - entropy,
        brightness=entropy, fetch_ms=1.0, decode_ms=2.0, infer_ms=4.0, encode_ms=0.5, **changes,
    )  # fmt: skip


def car(index: int) -> dict[str, Any]:
    """Of 3 × 2 pixels; the second overlaps the first by a column, the third touches the right edge."""
    x, y = ((2, 2), (4, 2), (7, 6))[index]
    inside = np.zeros((SIDE_PX, SIDE_PX), bool)
    inside[y : y + 2, x : x + 3] = True
    return {"class_id": 1, "name": "car", "score": 0.5, "bbox": [x, y, 3, 2], "area": 6, "rle": encode_rle(inside)}


def failed(name: str, kind: str, *, at: dt.datetime, second: int, node: str = "host-b") -> dict[str, Any]:
    return make_row(name, "e1", kind, node=node, processed_at=at + dt.timedelta(seconds=second))


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `masks`: three nights, two versions of one model."""
    folder = tmp_path_factory.mktemp("cookbook")
    table = Table(normalize_uri(str(folder / "masks")))
    first, second, third = MONDAYS
    worker = {"node": "host-a", "device": "cpu", "name": "cpu", "bf16": True, "cores": 2, "software": {}}
    fields = {"model_name": "street", "record": {"seconds": 36.0, "workers": [worker] * 2, "images_per_s": 0.125}}
    table.run(
        image(f"{NORTH}/1.jpg", 10, 0, at=first, second=0), image(f"{NORTH}/2.jpg", 20, 20, at=first, second=1),
        image(f"{SOUTH}/1.jpg", 0, 50, at=first, second=2), image(f"{SOUTH}/2.jpg", 30, 10, at=first, second=4),
        at=first, model_version=BEFORE, **fields,
    )  # fmt: skip
    table.run(
        image(f"{NORTH}/1.jpg", 10, 0, at=second, second=0, entropy=0.5),
        image(f"{NORTH}/2.jpg", 20, 20, 1, at=second, second=1, entropy=0.25),
        image(f"{SOUTH}/1.jpg", 0, 80, at=second, second=2, entropy=0.125, node="host-b"),
        image(f"{SOUTH}/2.jpg", 30, 5, 3, at=second, second=4, node="host-b"),
        failed(f"{NORTH}/bad.jpg", "corrupt", at=second, second=5),
        failed(f"{SOUTH}/late.jpg", "fetch_failed", at=second, second=6),
        failed(f"{SOUTH}/lost.jpg", "missing", at=second, second=8),
        at=second, model_version=NOW, **fields,
    )  # fmt: skip
    table.run(
        image(f"{NORTH}/1.jpg", 40, 0, 1, at=third, second=0, etag="e2", entropy=0.75),
        image(f"{SOUTH}/late.jpg", 0, 90, at=third, second=4, attempt=2, entropy=0.625),
        at=third, model_version=NOW, changed=1, **fields,
    )  # fmt: skip
    return folder


@pytest.fixture
def ask(masks: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`ask(sql)` in the folder that the page writes of."""
    monkeypatch.chdir(masks)
    connection = pipeline.connect("masks")
    yield lambda sql: connection.sql(sql).fetchall()
    connection.close()


def day(monday: int) -> dt.date:
    return MONDAYS[monday].date()


N1, N2, S1, S2, LATE = (
    f"{place}.jpg" for place in (f"{NORTH}/1", f"{NORTH}/2", f"{SOUTH}/1", f"{SOUTH}/2", f"{SOUTH}/late")
)
RUNS = [f"{at:%Y%m%dT%H%M%SZ}-{number:06x}" for number, at in enumerate(MONDAYS, 1)]
#: By number of the question. What counts now, in pixels of 100: north/1 has 40 cars; north/2 20 cars and 20 trees;
#: south/1 80 trees; south/2 30 cars and 5 trees; south/late 90 trees; the rest is road.
ANSWERS: dict[int, list[tuple[Any, ...]]] = {
    1: [("road", 0.43, 5), ("tree", 0.39, 4), ("car", 0.18, 3)],
    2: [
        (NORTH, "road", 0.6), (NORTH, "car", 0.3), (NORTH, "tree", 0.1),
        (SOUTH, "tree", 1.75 / 3), (SOUTH, "road", 0.95 / 3), (SOUTH, "car", 0.1),
    ],
    3: [
        (day(1), "car", 0.5 / 3), (day(1), "road", 1.45 / 3), (day(1), "tree", 1.05 / 3),
        (day(2), "car", 0.2), (day(2), "road", 0.35), (day(2), "tree", 0.45),
    ],
    4: [(N1, 0.75, 0.25), (LATE, 0.625, 0.375), (N2, 0.25, 0.75), (S1, 0.125, 0.875), (S2, 0.0, 1.0)],
    5: [(0, 2), (1, 2), (3, 1)],
    6: [(S1, "road", 0.5, 0.2), (S1, "tree", 0.5, 0.8)],
    7: [(NORTH, "corrupt", 1, 1 / 3), (SOUTH, "missing", 1, 1 / 4)],
    8: [(RUNS[0], "host-a", 4, 3 / 4), (RUNS[1], "host-a", 2, 1.0), (RUNS[1], "host-b", 5, 4 / 6),
        (RUNS[2], "host-a", 2, 1 / 4)],
    9: [("street", BEFORE, 4, 2.5 * 72 / 3600 / 4 * 1e6), ("street", NOW, 9, 2.5 * 144 / 3600 / 9 * 1e6)],
    10: [(run, 1.0, 2.0, 4.0, 0.5) for run in RUNS],
    11: [(RUNS[2], "done", NOW, 2, 2, 0, 0.1), (RUNS[1], "done", NOW, 7, 4, 3, 0.1),
         (RUNS[0], "done", BEFORE, 4, 4, 0, 0.1)],
    12: [("car", N1, 0.4), ("car", S2, 0.3), ("car", N2, 0.2), ("road", S2, 0.65), ("road", N1, 0.6),
         ("road", N2, 0.6), ("tree", LATE, 0.9), ("tree", S1, 0.8), ("tree", N2, 0.2)],
    13: [("road", "tree", 4), ("road", "car", 3), ("car", "tree", 2)],
    14: [("car", 5, 6.0, 6)],
    15: [(S2, "car", [7.0, 6.0, 3.0, 2.0])],
    16: [(S2, [2.0, 2.0, 3.0, 2.0], [4.0, 2.0, 3.0, 2.0], 2 / 10)],
    # south/1: road 20 of 50, tree 50 of 80, mean of 0.4 and 0.625; south/2: car 1, tree 5 of 10, road 60 of 65.
    17: [(S1, (20 / 50 + 50 / 80) / 2), (S2, (1 + 5 / 10 + 60 / 65) / 3), (N1, 1.0), (N2, 1.0)],
    18: [(0.0, 2, 0.9375), (0.2, 1, 0.75), (0.6, 2, 0.3125)],
    19: [(MONDAYS[1] + dt.timedelta(seconds=6), "", NOW, 1, "fetch_failed", "it was fetch_failed"),
         (MONDAYS[2] + dt.timedelta(seconds=4), "e1", NOW, 2, "ok", None)],
}  # fmt: skip


def same(row: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return len(row) == len(expected) and all(
        mine == pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else mine == theirs
        for mine, theirs in zip(row, expected, strict=True)
    )


def check(heading: str, rows: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    assert len(rows) == len(expected), (heading, rows)
    for row, one in zip(rows, expected, strict=True):
        assert same(row, one), (heading, row, one)


def test_there_are_twenty_questions_and_five_are_answered_without_us() -> None:
    assert [int(heading.partition(".")[0]) for heading in QUESTIONS] == list(range(1, 21))
    by_hand = [re.findall(r"^# (DuckDB|Polars|pandas)$", text, re.M) for text in QUESTIONS.values()]
    assert [one for one in by_hand if one] == [["DuckDB", "Polars", "pandas"]] * 5
    assert "pipeline" not in "".join(code for _, code in python_blocks())


@pytest.mark.parametrize("heading", QUESTIONS)
def test_the_question_has_its_answer(heading: str, ask: Any) -> None:
    (sql,) = re.findall(r"^```sql\n(.*?)^```$", QUESTIONS[heading], re.M | re.S)
    number = int(heading.partition(".")[0])
    rows = ask(sql)
    if number == 20:
        assert [name.partition(",")[0] for name, _ in rows] == ["instances", "mask"]
        stored = ask("SELECT sum(octet_length(mask.bytes)) FROM segments")[0][0]
        assert 0.5 * stored < rows[1][1] < 1.5 * stored  # the pages, compressed once more
    else:
        check(heading, rows, ANSWERS[number])


@pytest.mark.parametrize("number", ["6", "17"])
def test_two_models_are_not_taken_for_two_versions(number: str, tmp_path: Path) -> None:
    table = Table(normalize_uri(str(tmp_path / "masks")))
    for model, version, car_px in (("street", BEFORE, 10), ("street", NOW, 10), ("forest", "a" * 12, 90)):
        at = MONDAYS[table.runs]
        table.run(image(N1, car_px, 0, at=at, second=0), at=at, model_name=model, model_version=version)
    text = next(text for heading, text in QUESTIONS.items() if heading.startswith(f"{number}."))
    (sql,) = re.findall(r"^```sql\n(.*?)^```$", text, re.M | re.S)
    assert table.ask(sql) == []


def python_blocks() -> list[tuple[str, str]]:
    return [
        (heading, code)
        for heading, text in QUESTIONS.items()
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


@pytest.mark.parametrize(
    ("heading", "code"),
    [pytest.param(*block, id=f"{block[0][:2]}{block[1].splitlines()[0][2:]}") for block in python_blocks()],
)
def test_other_tools_have_the_same_answer(
    heading: str, code: str, masks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(masks)
    names: dict[str, Any] = {}
    exec(code, names)
    answer = names["answer"]
    rows = answer.rows() if hasattr(answer, "rows") else list(answer.itertuples(index=False, name=None))
    check(heading, rows, ANSWERS[int(heading.partition(".")[0])])
