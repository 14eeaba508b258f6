"""`segment` from end to end: what became of images in SOURCE."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from handmade import make_image, rows_of, touch_later
from run_bench import Bench

import pipeline
from pipeline.errors import UsageError

pytestmark = pytest.mark.usefixtures("workers_in_this_process")


def test_what_is_gone_and_what_is_back_is_recorded_by_a_run_of_no_images(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(3)
    bench.segment(photos)
    everything = bench.shown("image_uri")
    (photos / "0001.png").rename(photos.parent / "away.png")
    gone = bench.segment(photos)
    assert (gone.state, gone.planned, gone.skipped, gone.removed, gone.returned) == ("done", 0, 2, 1, 0)
    assert (gone.ok, gone.errors, gone.parts, gone.engine) == (0, 0, 0, "")
    assert bench.shown("image_uri") == [everything[0], everything[2]]
    assert bench.segment(photos).run_id is None  # it is said once
    (photos.parent / "away.png").rename(photos / "0001.png")
    back = bench.segment(photos)
    assert (back.planned, back.removed, back.returned) == (0, 0, 1)
    assert bench.shown("image_uri") == everything
    assert bench.segment(photos).run_id is None
    assert len(rows_of(bench.dest)) == 3
    assert pipeline.verify(str(bench.dest), deep=True) == []
    listed = [(run["state"], run["planned"], run["rows"]) for run in pipeline.list_runs(str(bench.dest))]
    assert listed == [("done", 0, 0), ("done", 0, 0), ("done", 3, 3)]
    assert pipeline.show_run(str(bench.dest), gone.run_id)["plan"]["removed"] == 1
    assert pipeline.drift(str(bench.dest)).run_id not in (gone.run_id, back.run_id)
    assert pipeline.drift(str(bench.dest), back.run_id).state == "too_few_images"
    manifest = pq.read_table(bench.dest / "runs" / gone.run_id / "manifest.parquet")
    assert (len(manifest), manifest.schema.metadata[b"maskmill_schema_version"]) == (0, b"1")


def test_a_removal_is_recorded_beside_new_work(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(3)
    bench.segment(photos)
    (photos / "0000.jpg").unlink()
    make_image(photos / "new.png", 8)
    outcome = bench.segment(photos)
    assert (outcome.planned, outcome.ok, outcome.removed) == (1, 1, 1)
    assert [Path(uri).name for uri in bench.shown("image_uri")] == ["0001.png", "0002.jpg", "new.png"]
    (photos / "0001.png").unlink()
    forced = bench.segment(photos, force=True)
    assert (forced.planned, forced.removed) == (2, 1)
    (photos / "0002.jpg").unlink()
    retried = bench.segment(photos, retry_errors=True)
    assert (retried.planned, retried.removed) == (0, 1)
    assert [Path(uri).name for uri in bench.shown("image_uri")] == ["new.png"]


def test_only_a_full_listing_says_that_something_is_gone(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(4)
    bench.segment(photos)
    manifest = photos.parent / "some.txt"
    manifest.write_text(str(photos / "0002.jpg"))
    (photos / "0000.jpg").unlink()
    assert [bench.segment(source).run_id for source in (manifest, photos / "0001.png")] == [None, None]
    assert bench.segment(photos, limit=1).run_id is None
    assert bench.segment(photos, dry_run=True).run_id is None
    assert bench.segment(f"{photos}/*.png").run_id is None  # a listing, of which 0000.jpg is no part
    assert bench.segment(photos, suffixes=(".png",)).run_id is None
    assert len(bench.shown("image_uri")) == 4
    assert bench.segment(f"{photos}/0*.jpg").removed == 1
    assert len(bench.shown("image_uri")) == 3


def test_an_empty_source_is_a_usage_error_and_removes_nothing(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(2)
    bench.segment(photos)
    shutil.rmtree(photos)
    with pytest.raises(UsageError, match="does not exist"):
        bench.segment(photos)
    photos.mkdir()
    with pytest.raises(UsageError, match="no images"):
        bench.segment(photos)
    assert len(bench.shown("image_uri")) == 2


def test_the_view_follows_the_command_back_to_older_settings_and_an_older_version(
    bench: Bench, other_semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(2)
    first = bench.segment(photos)
    plain = bench.shown("settings_digest")
    bench.segment(photos, max_pixels=1_000_000)
    assert bench.shown("settings_digest") != plain
    back = bench.segment(photos)
    assert (back.planned, back.removed, back.returned) == (0, 0, 0) and back.run_id is not None
    assert bench.shown("settings_digest") == plain
    second = bench.segment(photos, model=str(other_semantic_model))
    assert bench.shown("version") == [second.model_version]
    manifest = photos.parent / "all.txt"
    manifest.write_text("\n".join(str(path) for path in photos.iterdir()))
    bench.segment(manifest)  # no listing, and still the question of the version that counts
    assert bench.shown("version") == [first.model_version]
    assert bench.segment(photos).run_id is None
    assert len(rows_of(bench.dest)) == 6


def test_an_image_that_went_back_to_older_bytes_shows_their_row(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(2)
    image = photos / "0000.jpg"
    bench.segment(photos)
    old, old_etags = (image.read_bytes(), image.stat().st_mtime_ns), bench.shown("image_etag")
    make_image(image, 99)
    touch_later(image)
    bench.segment(photos)
    assert bench.shown("image_etag") != old_etags
    image.write_bytes(old[0])
    os.utime(image, ns=(old[1], old[1]))
    outcome = bench.segment(photos)
    assert (outcome.planned, outcome.returned) == (0, 1)
    assert bench.shown("image_etag") == old_etags
