"""An export as a whole: counts, conditions, kills, places that are taken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import get_args

import boto3
import pytest
from exported import Exported
from handmade import encoded_image, make_row
from harness import file_digests, wait_until

import pipeline
from pipeline.errors import InfrastructureError, UsageError
from pipeline.insight.export.job import ExportOutcome
from pipeline.insight.export.shape import Kind
from pipeline.storage import file_uri, local_path, open_storage


def test_the_condition_is_any_sql(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic", images=8)
    least = sorted(table.rows.values(), key=lambda row: row["mean_confidence"])[:3]
    where = (
        "image_uri IN (SELECT image_uri FROM images WHERE status = 'ok' ORDER BY mean_confidence LIMIT 3) -- the least"
    )
    outcome = table.export("coco", where=where)
    assert (outcome.images, outcome.skipped) == (3, {})
    images = json.loads(table.files()["annotations.json"])["images"]
    assert {one["coco_url"] for one in images} == {row["image_uri"] for row in least}
    assert (
        table.export("png", "cars", where="list_contains(list_transform(classes, lambda c: c.name), 'car')").images == 8
    )


def test_every_condition_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[4] / "docs" / "export.md").read_text(encoding="utf-8")
    conditions = re.findall(r'--where "([^"]+)"', page)
    assert len(conditions) >= 6
    table = Exported(tmp_path, "instance", images=1, errors=0)
    for number, where in enumerate(conditions):
        try:
            table.export("png", f"out-{number}", where=where)
        except UsageError as error:
            assert "chooses no image" in str(error)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("no_such_column > 1", "no_such_column"),
        ("true; DROP TABLE x", "2 statements"),
        ("true;", "is no condition"),
        ("true) OR (true", "is no condition"),
        ("true ORDER BY 1", "is no condition"),
        ("", "is no condition"),
        ("width >", "is no condition"),
        ("image_uri", "cannot be asked"),
        ("width < 0", "chooses no image"),
        ("status = 'error'", "the 1 that it chooses are errors"),
    ],
)
def test_what_is_no_condition_is_wrong_usage(where: str, said: str, tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic", images=2)
    with pytest.raises(UsageError, match="where") as caught:
        table.export("png", where=where)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_masks_of_several_models_are_told_apart(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic", images=3)
    table.place.night(4, 0, model_name="other")
    with pytest.raises(UsageError, match="several models, other, tiny-semantic"):
        table.export("coco")
    assert table.export("coco", where="model = 'other'").images == 4


def test_the_same_again_does_nothing(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic")
    first = table.export("yolo", images=True)
    before = file_digests(tmp_path / "out")
    again = table.export("yolo", images=True)
    assert not first.was_there and again == first._replace(was_there=True)
    assert file_digests(tmp_path / "out") == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "data.yaml", "export.json", "images", "labels", "skipped.jsonl", "train.txt", "val.txt",
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"holds another export, of .* --format yolo --images: give a new --out"):
        table.export("yolo", where="width > 1", images=True)
    table.place.night(2, 0)
    with pytest.raises(UsageError, match="of the table as it was before"):
        table.export("yolo", images=True)
    assert file_digests(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic", images=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "annotations.json").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        table.export("coco")
    for name in ("segments/x", "runs", "evaluations"):
        with pytest.raises(UsageError, match="inside the table"):
            table.export("coco", f"dest/{name}")
    with pytest.raises(UsageError, match="is not empty"):
        table.export("coco", "dest")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out cannot be written"):
        table.export("coco", "file/below")
    assert (tmp_path / "out" / "annotations.json").read_text() == "mine"


def test_nothing_to_be_had_is_a_failure(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic", images=2)
    for photo in table.place.photos.iterdir():
        photo.unlink()
    with pytest.raises(InfrastructureError, match="none of the 2 images could be had: 1 error, 2 gone"):
        table.export("overlay")
    assert not (tmp_path / "out" / "export.json").exists()


@pytest.mark.parametrize("format_", get_args(Kind))
def test_names_that_lead_elsewhere_stay_inside(tmp_path: Path, format_: str) -> None:
    table = Exported(tmp_path, "semantic", images=1, errors=0)
    (row,) = table.rows.values()
    names = ("..png", ".hidden.png", "a\nb\\c.png", "..\\..\\x.png", "%2e%2e%2fx.png", "-rf.png", "é" * 100 + ".png")
    for name in names:  # that a disk has
        shutil.copy(local_path(row["image_uri"]), table.place.photos / name)
    uris = [file_uri(str(table.place.photos / name)) for name in names]
    gone = ["s3://b/../../../etc/x.jpg", "s3://b/north/x.jpg", "s3://b/south/x.jpg", "s3://b/" + "é" * 400 + ".jpg",
            "s3://b/..", "s3://b/a\nb\\c\x00.jpg"]  # fmt: skip
    kept = {name: row[name] for name in ("width", "height", "mask", "classes", "image_format")}
    rows = [make_row(uri, open_storage(uri).head(uri).etag, **kept) for uri in uris]
    rows += [make_row(uri, "e", **kept) for uri in gone] if format_ != "overlay" else []  # which takes the image itself
    table.place.table.run(*rows, card=table_card(table))
    outcome = table.export(format_)
    assert outcome.images == 1 + len(rows) and not outcome.skipped
    new = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "dest")]
    made = [path for path in new if path.parent != table.place.photos]
    assert all(path.is_relative_to(tmp_path / "out") for path in made)
    folder = {"png": "masks", "overlay": "overlays", "yolo": "labels"}.get(format_)
    if folder:
        assert len([path for path in made if path.parent == tmp_path / "out" / folder]) == 1 + len(rows), made
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", path.name) for path in made)


def table_card(table: Exported) -> dict[str, object]:
    (plan,) = (tmp for tmp in (Path(table.folder) / "dest" / "runs").glob("*/plan.json"))
    return dict(json.loads(plan.read_text())["card"])


_SLOW_CHILD = """
import sys, time, pipeline
pipeline.export(dest=sys.argv[1], out=sys.argv[2], format='coco', images=True, piece_images=2,
                listen=lambda done, total: time.sleep(0.4))
"""


def test_a_kill_loses_no_piece_and_no_byte(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic", images=12)
    table.export("coco", "calm", images=True, piece_images=2)
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", _SLOW_CHILD, table.dest, str(out)])
    try:
        wait_until(lambda: len(list(out.glob("_export/*.json"))) >= 3, what="a plan and two receipts")
    finally:
        child.kill()
        child.wait()
    (out / "_tmp").mkdir(exist_ok=True)
    (out / "_tmp" / "half").write_bytes(b"what a kill in the middle of a write leaves")
    left = file_digests(out)
    receipts = {name for name in left if name.startswith("_export/") and name.endswith(".json")}
    assert 3 <= len(receipts) < 7 and not (out / "export.json").exists()
    images = {name: kept for name, kept in left.items() if name.startswith("images/")}
    finished = 2 * (len(receipts) - 1)
    # The table grows meanwhile: what was frozen stays what is exported.
    table.place.night(3, 0)
    outcome = table.export("coco", images=True, piece_images=2)
    assert (outcome.images, outcome.skipped) == (11, {"error": 1, "gone": 1})
    after = file_digests(out)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "calm").iterdir()}
    assert {name: digest for name, (_, digest) in after.items()} == {
        name: digest for name, (_, digest) in file_digests(tmp_path / "calm").items()
    }
    same = sum(after[name] == kept for name, kept in images.items())
    assert same >= finished - 1, "files of finished pieces were written again"  # one of the images is gone


@pytest.mark.s3
def test_all_of_it_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    local = Exported(tmp_path, "semantic")
    remote = f"{s3_bucket}/dest"
    client = boto3.client("s3")
    for folder in sorted({path.parent for path in (tmp_path / "dest").rglob("*") if path.is_file()}):
        upload_files(client, folder, f"{remote}/{folder.relative_to(tmp_path / 'dest')}")

    def export(name: str) -> ExportOutcome:
        return pipeline.export(
            dest=remote, out=f"{s3_bucket}/{name}", format="coco", images=True, piece_images=2, where="width > 1"
        )

    outcome = export("out")
    assert (outcome.images, outcome.skipped) == (5, {"gone": 1})
    assert export("out").was_there
    pages = client.list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"), Prefix="out/")["Contents"]
    names = {one["Key"] for one in pages}
    assert {name for name in names if "/images/" not in name} == {
        "out/annotations.json", "out/export.json", "out/skipped.jsonl",
    }  # fmt: skip
    local.export("coco", images=True, piece_images=2, where="width > 1")
    body = client.get_object(Bucket=s3_bucket.removeprefix("s3://"), Key="out/annotations.json")["Body"].read()
    assert body == local.files()["annotations.json"]


def upload_files(client: object, folder: Path, prefix_uri: str) -> None:
    """The files of a folder, none of those below it."""
    bucket, _, prefix = prefix_uri.removeprefix("s3://").partition("/")
    for path in folder.iterdir():
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())  # type: ignore[attr-defined]


class Gate(BaseHTTPRequestHandler):
    """Serves one picture under every name, unless it is told to refuse."""

    refusing = True
    data = encoded_image(1)

    def do_GET(self) -> None:
        self.send_response(403 if Gate.refusing else 200)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", "0" if Gate.refusing else str(len(self.data)))
        self.end_headers()
        if self.command == "GET" and not Gate.refusing:
            self.wfile.write(self.data)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_images_that_are_all_denied_stop_it(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic", images=1, errors=0)
    (row,) = table.rows.values()
    kept = {name: row[name] for name in ("width", "height", "mask", "classes", "image_format")}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    Thread(target=server.serve_forever, daemon=True).start()
    uris = [f"http://127.0.0.1:{server.server_port}/{number}.png" for number in range(16)]
    table.place.table.run(*(make_row(uri, "e", **kept) for uri in uris), card=table_card(table))
    try:
        Gate.refusing = True
        with pytest.raises(InfrastructureError, match="16 of 16 images are denied"):
            table.export("png", images=True, where="image_uri LIKE 'http%'")
        Gate.refusing = False
        outcome = table.export("png", images=True, where="image_uri LIKE 'http%'")
    finally:
        server.shutdown()
        server.server_close()
    assert (outcome.images, outcome.skipped) == (16, {})
    assert [data for name, data in table.files().items() if name.startswith("images/")] == [Gate.data] * 16
