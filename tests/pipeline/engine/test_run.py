"""`segment` from end to end with a tiny model, its worker in this process: what is done, done again, and told."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from awkward_corpus import make_awkward_corpus
from handmade import answers_of, make_image, part_paths, rows_of, touch_later
from run_bench import Bench, names

import pipeline
from pipeline.config import SegmentConfig
from pipeline.engine import run as engine_run
from pipeline.engine.crew import InlineCrew
from pipeline.engine.fleet import Fleet
from pipeline.engine.lease import Lease
from pipeline.engine.ledger import Ledger, Plan
from pipeline.engine.outcome import Event
from pipeline.errors import BYTES_KINDS, HeldError, InfrastructureError, ModelError, ReconciliationError, UsageError

pytestmark = pytest.mark.usefixtures("workers_in_this_process")


# ── what is done, and what not again ────────────────────────────────────────────────────────────────────────────────


def test_every_image_gets_one_row_and_the_outcome_adds_up(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(7)
    outcome = bench.segment(photos, shard_size=3)
    assert bench.done == names(photos)
    assert (outcome.state, outcome.images, outcome.planned, outcome.ok, outcome.errors) == ("done", 7, 7, 7, 0)
    assert (outcome.skipped, outcome.held, outcome.duplicates) == (0, 0, 0)
    assert outcome.parts == len(part_paths(bench.dest)) == 3
    assert outcome.parts_bytes == sum(path.stat().st_size for path in part_paths(bench.dest))
    assert outcome.images_per_s > 0
    assert 0 < outcome.model_busy_fraction <= 1


def test_workers_end_before_rows_are_counted_where_nothing_can_follow(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker gives its memory back in 0.05 s, which is what counting takes, too."""
    order: list[str] = []
    close, reconcile = Fleet.close, engine_run.reconcile

    def closing(fleet: Fleet) -> None:
        order.append("close")
        close(fleet)

    def counting(*args: Any) -> Any:
        order.append("count")
        return reconcile(*args)

    monkeypatch.setattr(Fleet, "close", closing)
    monkeypatch.setattr(engine_run, "reconcile", counting)
    photos = image_folder(3)
    bench.segment(photos)
    assert order[:2] == ["close", "count"]


def test_rows_say_what_was_read(bench: Bench, image_folder: Callable[..., Path]) -> None:
    from models.masks import decode_mask_png

    photos = image_folder(2)
    outcome = bench.segment(photos)
    for row, path in zip(rows_of(bench.dest), sorted(photos.iterdir()), strict=True):
        status = path.stat()
        etag = f"{status.st_size}-{status.st_mtime_ns}"
        assert (row["image_uri"], row["image_etag"], row["listed_etag"]) == (f"file://{path}", etag, etag)
        assert (row["image_bytes"], row["attempt"], row["task"]) == (status.st_size, 1, "semantic")
        assert (row["run_id"], row["model_version"]) == (outcome.run_id, outcome.model_version)
        assert row["image_format"] == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
        mask = decode_mask_png(row["mask"]["bytes"])
        assert mask.shape == (row["height"], row["width"])
        assert sum(found["pixels"] for found in row["classes"]) == mask.size
        assert {found["class_id"] for found in row["classes"]} == set(mask.ravel().tolist())


def test_a_second_run_processes_nothing_and_writes_nothing(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(3)
    bench.segment(photos)
    before = names(bench.dest)
    outcome = bench.segment(photos)
    assert (outcome.state, outcome.run_id, outcome.planned, outcome.skipped) == ("done", None, 0, 3)
    assert names(bench.dest) == before


def test_one_changed_and_one_new_image_are_what_is_left(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(4)
    bench.segment(photos)
    make_image(photos / "0001.png", 99)
    touch_later(photos / "0001.png")
    make_image(photos / "deep" / "new.png", 5)
    outcome = bench.segment(photos)
    assert (outcome.planned, outcome.skipped) == (2, 3)
    assert bench.done == sorted([*names(photos), "0001.png"])
    current = pipeline.connect(str(bench.dest)).sql("SELECT count(*), count(DISTINCT image_uri) FROM images").fetchall()
    assert current == [(5, 5)]


def test_another_model_does_everything_again(
    bench: Bench, other_semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(3)
    first = bench.segment(photos)
    second = bench.segment(photos, model=str(other_semantic_model))
    assert second.ok == 3
    assert first.model_version != second.model_version
    assert bench.shown("version") == [second.model_version]


def test_other_settings_do_everything_again_and_auto_keeps_what_was(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(2)
    bench.segment(photos, precision="fp32")
    assert bench.segment(photos, precision="auto").planned == 0
    assert bench.segment(photos, precision="bf16").ok == 2
    assert bench.segment(photos, precision="fp32", batch_size=3, shard_size=1, threads=2).planned == 0


def test_auto_goes_on_as_auto_whatever_was_asked_for_in_between(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(3)
    bench.segment(photos, precision="auto")
    bench.segment(photos, precision="fp32", limit=1)
    bench.segment(photos, precision="bf16", limit=1)
    assert bench.segment(photos, precision="auto").planned == 0


def test_a_precision_that_the_device_lacks_is_said_before_anything_is_frozen(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match="fp16"):
        bench.segment(image_folder(2), precision="fp16")
    assert not (bench.dest / "runs").exists()


def test_limit_by_limit(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(5)
    assert [bench.segment(photos, limit=2).ok for _ in range(4)] == [2, 2, 1, 0]
    assert bench.done == names(photos)


def test_force_repeats_and_the_views_show_each_image_once(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(3)
    bench.segment(photos)
    outcome = bench.segment(photos, force=True)
    assert outcome.ok == 3
    assert len(rows_of(bench.dest)) == 6
    assert pipeline.connect(str(bench.dest)).sql("SELECT run_id FROM images").fetchall() == [(outcome.run_id,)] * 3


def test_retry_errors_takes_up_what_failed_for_good(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(2)
    (photos / "bad.jpg").write_bytes(b"no picture")
    first = bench.segment(photos)
    assert first.errors_by_kind == {"not_an_image": 1}
    assert bench.segment(photos).planned == 0
    again = bench.segment(photos, retry_errors=True)
    assert (again.planned, again.errors) == (1, 1)
    assert [row["attempt"] for row in rows_of(bench.dest) if row["image_uri"].endswith("bad.jpg")] == [1, 2]


def test_missing_images_are_rows_and_are_tried_every_time(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(1)
    manifest = photos.parent / "list.txt"
    manifest.write_text(f"{photos}/0000.jpg\n{photos}/gone.jpg\n{photos}/0000.jpg\n")
    for attempt in range(1, 5):
        outcome = bench.segment(manifest)
        assert outcome.duplicates == 1
        assert outcome.errors_by_kind == {"missing": 1}
        assert [row["attempt"] for row in rows_of(bench.dest)].count(attempt) >= 1
    make_image(photos / "gone.jpg", 3)
    assert bench.segment(manifest).ok == 1
    assert bench.segment(manifest).planned == 0


# ── the awkward ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_awkward_image_has_one_row_of_the_right_kind(bench: Bench, tmp_path: Path) -> None:
    corpus = tmp_path / "awkward"
    expected = make_awkward_corpus(corpus)
    outcome = bench.segment(corpus, max_pixels=100_000_000, shard_size=17, suffixes=(".jpg", ".jpeg", ".png", ".gif",
                            ".webp", ".bmp", ".tif", ".tiff"))  # fmt: skip
    found = {}
    for row in rows_of(bench.dest):
        name = row["image_uri"].removeprefix(f"file://{corpus}/")
        assert name not in found
        size = (row["width"], row["height"]) if row["status"] == "ok" else None
        found[name] = (row["error_kind"] or "ok", size)
    assert found == {name: (outcome.outcome, outcome.size) for name, outcome in expected.items()}
    assert outcome.errors == sum(kind in BYTES_KINDS for kind, _ in found.values()) > 0
    assert bench.segment(corpus, max_pixels=100_000_000).planned == 0


def test_images_that_are_replaced_or_deleted_once_they_are_planned(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(3)
    old, new = photos / "0000.jpg", photos / "0001.png"

    def meddle(event: Event) -> None:
        if event.text.startswith("run "):
            new.replace(old)
            touch_later(old)

    outcome = bench.segment(photos, listen=meddle)
    assert (outcome.ok, outcome.errors_by_kind) == (2, {"missing": 1})
    replaced = next(row for row in rows_of(bench.dest) if row["image_uri"].endswith(old.name))
    status = old.stat()
    assert replaced["image_etag"] == f"{status.st_size}-{status.st_mtime_ns}" != replaced["listed_etag"]
    assert (replaced["image_format"], replaced["image_bytes"]) == ("PNG", status.st_size)
    assert bench.segment(photos).planned == 0  # done as it is now, and what is gone is not listed


def test_no_images_is_a_usage_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "*.tiff"):
        with pytest.raises(UsageError):
            bench.segment(source)
    assert not bench.dest.exists()


def test_an_unwritable_dest_is_a_usage_error(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(1)
    bench.dest.write_text("a file where the folder should be")
    with pytest.raises(UsageError, match="DEST cannot be written"):
        bench.segment(photos, precision="auto")
    assert bench.texts("note") == "", "workers were asked before DEST was"
    assert bench.dest.read_text() == "a file where the folder should be"


@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.ENOSPC, InfrastructureError), (errno.EIO, InfrastructureError), (errno.EROFS, UsageError)],
)
def test_a_dest_that_fails_is_the_world_s_fault_and_one_that_cannot_be_is_not(
    bench: Bench,
    image_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    expected: type[Exception],
) -> None:
    def fails(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    photos = image_folder(1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fails)
        with pytest.raises(expected, match="DEST cannot be written"):
            bench.segment(photos)
    assert bench.segment(photos).ok == 1


def test_foreign_files_in_dest_are_left_alone(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(2)
    bench.segment(photos)
    folder = part_paths(bench.dest)[0].parent
    foreign = [folder / "mine.parquet", bench.dest / "segments" / "mine.parquet", bench.dest / "runs" / "notes.txt"]
    for path in foreign:
        path.write_bytes(b"not Parquet at all")
    assert bench.segment(photos).planned == 0
    assert bench.segment(photos, force=True).ok == 2
    assert {path.read_bytes() for path in foreign} == {b"not Parquet at all"}


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "missing", "pickle"])
def test_a_file_that_is_no_model_is_a_usage_error(bench: Bench, damage: str, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(1)
    whole = bench.model.read_bytes()
    damaged = photos.parent / "damaged.safetensors"
    content = {
        "cut": whole[: len(whole) // 2],
        "text": b"hello" * 100,
        "empty": b"",
        "pickle": b"\x80\x04\x95" + bytes(99),
    }
    if damage != "missing":
        damaged.write_bytes(content[damage])
    with pytest.raises(ModelError, match=r"damaged\.safetensors"):
        bench.segment(photos, model=str(damaged))
    assert not bench.dest.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size_policy": {"kind": "tile", "tile_px": 4}}, "tile_px 4 is smaller than the network's stride 8"),
        ({"size_policy": {"kind": "tile", "tile_px": 68}}, "tile_px 68 is not a multiple of the network's stride 8"),
        (
            {"size_policy": {"kind": "letterbox", "height_px": 64, "width_px": 4}},
            "width_px 4 is smaller than the network's stride 8",
        ),
        ({"postprocessing": {"kind": "detections"}}, "unet finds no instances by itself"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_settings_that_the_network_cannot_serve_bring_up_no_worker(
    bench: Bench,
    *,
    settings: dict[str, Any],
    said: str,
    dry_run: bool,
    image_folder: Callable[..., Path],
    instance_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(InlineCrew, "start", lambda crew: pytest.fail("a worker was brought up"))
    with pytest.raises(UsageError, match=said):
        bench.segment(image_folder(1), model=str(instance_model), settings=settings, dry_run=dry_run)
    assert not bench.dest.exists()


@pytest.mark.parametrize(
    ("images", "settings", "started"),
    [
        (5, {"shard_size": 3}, 2),
        (3, {"shard_size": 1, "canary": 1}, 3),
        (1, {"precision": "auto"}, 1),
        (3, {"precision": "auto", "limit": 2}, 2),
        (5, {"shard_size": 1, "dry_run": True}, 1),
    ],
)
def test_no_more_workers_are_started_than_there_are_shards(
    bench: Bench,
    image_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    *,
    images: int,
    settings: dict[str, Any],
    started: int,
) -> None:
    start, begun = InlineCrew.start, []
    monkeypatch.setattr(InlineCrew, "start", lambda crew: begun.append(1) or start(crew))
    bench.segment(image_folder(images), actors=4, **settings)
    assert len(begun) == started


@pytest.mark.parametrize("actors", [25, 500])
def test_more_workers_than_memory_holds_are_refused_before_one_is_started(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, actors: int
) -> None:
    """Processes were forked until the kernel ran out of memory."""
    photos = image_folder(1)
    monkeypatch.setattr("pipeline.engine.crew.memory_bytes", lambda: 24 << 30)
    with monkeypatch.context() as patch:
        patch.setattr(InlineCrew, "start", lambda crew: pytest.fail("a worker was brought up"))
        said = f"--actors {actors}: 24.0 GiB of memory may be used here, and each .* to take 1: give 24 at most"
        with pytest.raises(UsageError, match=said):
            bench.segment(photos, actors=actors)
        with pytest.raises(UsageError, match=said):
            config = SegmentConfig(source=str(photos), dest=str(bench.dest), model=str(bench.model), actors=actors)
            pipeline.plan(config, scratch=photos.parent)
        assert not bench.dest.exists()
    assert bench.segment(photos, actors=24).ok == 1
    monkeypatch.setattr("pipeline.engine.crew.memory_bytes", lambda: 1 << 29)
    assert bench.segment(photos, actors=1, force=True).ok == 1


# ── the same answer however it is cut ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_masks_do_not_depend_on_shards_or_neighbours(
    tmp_path: Path, task: str, request: pytest.FixtureRequest, image_folder: Callable[..., Path]
) -> None:
    model = request.getfixturevalue(f"{task}_model")
    photos = image_folder(9)
    answers = []
    for number, settings in enumerate([{"shard_size": 100}, {"shard_size": 1}, {"shard_size": 4, "actors": 2}]):
        bench = Bench(tmp_path / f"dest-{number}", model)
        bench.segment(photos, batch_size=4, **settings)
        answers.append(answers_of(bench.dest))
    bench = Bench(tmp_path / "dest-few", model)
    some = tmp_path / "some.txt"
    some.write_text("\n".join(str(path) for path in sorted(photos.iterdir())[1::3]))
    bench.segment(some, batch_size=4)
    assert len(answers[0]) == 9
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]
    few = answers_of(bench.dest)
    assert few == {uri: answers[0][uri] for uri in few}
    assert len(few) == 3


# ── the canary ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_good_canary_goes_on(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(6)
    outcome = bench.segment(photos, canary=2, shard_size=4)
    assert (outcome.state, outcome.ok, outcome.parts) == ("done", 6, 2)
    assert "canary fine" in bench.texts("note")


def test_a_bad_canary_stops_and_a_higher_limit_goes_on(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(6)
    for name in ("0000.jpg", "0001.png"):
        (photos / name).write_bytes(b"no picture")
    outcome = bench.segment(photos, canary=3, shard_size=2)
    assert (outcome.state, outcome.ok, outcome.errors) == ("canary_failed", 1, 2)
    assert min(outcome.seconds, outcome.images_per_s, outcome.megapixels_per_s) > 0
    assert bench.done == names(photos)[:3]
    assert "--max-error-rate" in bench.texts("warning")
    again = bench.segment(photos, canary=3, max_error_rate=0.9)
    assert (again.state, again.run_id, again.ok, again.errors) == ("done", outcome.run_id, 4, 2)
    assert bench.done == names(photos)


# ── the plan, the record, the reckoning ─────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_writes_nothing_and_estimates_from_a_sample(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(5)
    outcome = bench.segment(photos, dry_run=True, shard_size=2)
    assert (outcome.state, outcome.planned, outcome.shards, outcome.run_id) == ("planned", 5, 3, None)
    assert outcome.estimate is not None
    assert outcome.estimate.seconds is not None
    assert outcome.estimate.seconds > 0
    assert "sample" in outcome.estimate.basis
    assert not bench.dest.exists()


def test_a_dry_run_estimates_from_the_last_run_and_names_open_runs(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(6)
    first = bench.segment(photos / "*.jpg")
    nightly = bench.interrupted(photos, after_parts=1, shard_size=1)
    make_image(photos / "new.jpg", 9)
    before = names(bench.dest)
    outcome = bench.segment(photos / "*.jpg", dry_run=True)
    assert (outcome.planned, outcome.skipped) == (1, 3)
    assert outcome.estimate is not None
    assert outcome.estimate.basis == f"run {first.run_id}"
    everything = bench.segment(photos, dry_run=True)
    assert set(everything.held_by) == {nightly.run_id}
    assert names(bench.dest) == before


def test_the_record_tells_how_it_was_done(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(3)
    (photos / "bad.png").write_bytes(b"")
    outcome = bench.segment(photos, batch_size=2)
    folder = bench.dest / "runs" / str(outcome.run_id)
    record = json.loads((folder / "run.json").read_text())
    assert (record["state"], record["ok"], record["errors"]) == ("done", 3, 1)
    assert len(record["plan"]["card_digest"]) == 12
    assert record["errors_by_kind"] == {"empty": 1}
    assert record["plan"]["card"]["name"] == outcome.model_name == record["plan"]["model_name"]
    assert (record["plan"]["precision"], record["plan"]["batch_size"], record["plan"]["threads"]) == ("fp32", 2, 1)
    assert set(record["stage_ms"]) == {"fetch", "decode", "infer", "encode"}
    assert record["stage_ms"]["infer"] > 0
    (worker,) = record["workers"]
    assert worker["device"] == "cpu"
    assert {"python", "torch", "numpy"} <= set(worker["software"])
    listed = pq.read_table(folder / "manifest.parquet")
    assert listed.num_rows == 4
    assert sorted(listed["uri"].to_pylist()) == listed["uri"].to_pylist()
    assert not (folder / "lease.json").exists()
    assert pq.ParquetFile(part_paths(bench.dest)[0]).schema_arrow.metadata[b"maskmill_model"] == b"tiny-semantic"


def test_a_part_that_vanishes_fails_the_run(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = image_folder(4)
    reconcile = engine_run.reconcile

    def vanished(*arguments: Any) -> Any:
        part_paths(bench.dest)[0].unlink()
        return reconcile(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(engine_run, "reconcile", vanished)
        with pytest.raises(ReconciliationError):
            bench.segment(photos, shard_size=1)
    assert not list(bench.dest.glob("runs/*/run.json"))
    assert bench.segment(photos).ok == 4  # the same command does the missing shard again
    assert bench.done == names(photos)


def test_a_part_with_the_wrong_rows_fails_the_run(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as images, but one image twice and one not at all."""
    photos = image_folder(4)
    reconcile = engine_run.reconcile

    def twice(*arguments: Any) -> Any:
        first, second, *_ = part_paths(bench.dest)
        shutil.copy(first, second)
        return reconcile(*arguments)

    monkeypatch.setattr(engine_run, "reconcile", twice)
    with pytest.raises(ReconciliationError, match=r"1 have none, for example '.*0001\.png'"):
        bench.segment(photos, shard_size=1)


def test_a_list_that_became_shorter_fails_the_run(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = image_folder(4)
    reconcile = engine_run.reconcile

    def cut(*arguments: Any) -> Any:
        (path,) = bench.dest.glob("runs/*/manifest.parquet")
        pq.write_table(pq.read_table(path).slice(0, 3), path)
        return reconcile(*arguments)

    monkeypatch.setattr(engine_run, "reconcile", cut)
    with pytest.raises(ReconciliationError, match="its frozen list has 3 images, its plan 4"):
        bench.segment(photos)


def test_a_manifest_in_parquet_with_its_own_etags(bench: Bench, image_folder: Callable[..., Path]) -> None:
    """The listed etag is outdated: the row has both, and the image is done under either."""
    photos = image_folder(2)
    manifest = photos.parent / "list.parquet"
    uris = [f"file://{path}" for path in sorted(photos.iterdir())]
    pq.write_table(pa.table({"uri": uris, "etag": ["yesterday", "yesterday"]}), manifest)
    assert bench.segment(manifest).ok == 2
    assert {row["listed_etag"] for row in rows_of(bench.dest)} == {"yesterday"}
    assert bench.segment(manifest).planned == 0
    assert bench.segment(photos).planned == 0


def test_an_inventory_that_goes_while_it_is_planned_is_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are read where they lie, in the same question as the table: either may be what fails."""
    part = tmp_path / "part.parquet"
    pq.write_table(pa.table({"bucket": ["b"], "key": ["a.jpg"], "e_tag": ["e"]}), part)
    md5 = hashlib.md5(part.read_bytes()).hexdigest()
    source = tmp_path / "manifest.json"
    files = [{"key": part.name, "MD5checksum": md5}]
    source.write_text(json.dumps({"fileFormat": "Parquet", "files": files}))
    read_source = engine_run.read_source

    def read_then_lose(*args: Any, **kwargs: Any) -> Any:
        corpus = read_source(*args, **kwargs)
        part.unlink()
        return corpus

    monkeypatch.setattr(engine_run, "read_source", read_then_lose)
    with pytest.raises(InfrastructureError, match=r"table at .*, or the inventory file:.*manifest\.json, could not"):
        bench.segment(source)
    assert not part_paths(bench.dest)


def test_all_in_memory(memory_folder: str, semantic_model: Path) -> None:
    """A SOURCE and a DEST that no other process can see."""
    import fsspec
    from handmade import encoded_image

    files = fsspec.filesystem("memory")
    for index in range(3):
        files.pipe(f"{memory_folder}/photos/a b#{index}.png", encoded_image(index))
    dest = f"{memory_folder}/dest"
    settings: dict[str, Any] = {
        "source": f"{memory_folder}/photos",
        "dest": dest,
        "model": str(semantic_model),
        "report": False,
    }
    assert pipeline.segment(**settings, shard_size=2, threads=1).ok == 3
    assert pipeline.segment(**settings).planned == 0
    assert pipeline.connect(dest).sql("SELECT count(*) FROM images").fetchall() == [(3,)]
    assert [row["state"] for row in pipeline.list_runs(dest)] == ["done"]


@pytest.mark.s3
def test_all_on_s3(s3_bucket: str, s3_client: object, semantic_model: Path) -> None:
    from handmade import encoded_image

    bucket = s3_bucket.removeprefix("s3://")
    keys = ["a b.png", "it's.png", "100%.png", "deep/x#y?.png", "ünï.png"]
    for index, key in enumerate(keys):
        s3_client.put_object(Bucket=bucket, Key=f"photos/{key}", Body=encoded_image(index))  # type: ignore[attr-defined]
    s3_client.put_object(Bucket=bucket, Key="photos/bad.png", Body=b"no picture")  # type: ignore[attr-defined]
    settings: dict[str, Any] = {
        "source": f"{s3_bucket}/photos",
        "dest": f"{s3_bucket}/masks",
        "model": str(semantic_model),
    }
    outcome = pipeline.segment(**settings, shard_size=2, threads=1)
    assert (outcome.ok, outcome.errors_by_kind) == (5, {"not_an_image": 1})
    rows = pipeline.connect(f"{s3_bucket}/masks").sql("SELECT image_uri FROM images WHERE status = 'ok'").fetchall()
    assert sorted(uri for (uri,) in rows) == sorted(f"{s3_bucket}/photos/{key}" for key in keys)
    assert pipeline.segment(**settings).planned == 0
    s3_client.put_object(Bucket=bucket, Key="photos/a b.png", Body=encoded_image(99))  # type: ignore[attr-defined]
    assert pipeline.segment(**settings).planned == 1


def test_the_same_command_started_twice_at_once_is_held_not_planned_again(
    image_folder: Callable[..., Path], semantic_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one freezes its plan after this one has looked for open runs: the log tells, and its lease holds."""
    source, dest = image_folder(4), tmp_path / "out"
    config = SegmentConfig(
        source=str(source), dest=str(dest), model=str(semantic_model), precision="fp32", lease_ttl_s=2.0
    )
    freeze = Ledger.freeze
    leases: list[Lease] = []

    def second(self: Ledger, plan: Plan, manifest: bytes) -> bool:
        if not leases:
            twin = plan.model_copy(update={"run_id": plan.run_id[:-6] + "abcdef"})
            assert freeze(self, twin, manifest)
            leases.append(Lease(self.storage, self.uri(twin.run_id, "lease.json"), ttl_s=2.0).__enter__())
        return freeze(self, plan, manifest)

    monkeypatch.setattr(Ledger, "freeze", second)
    try:
        with pytest.raises(HeldError, match="abcdef is being worked on"):
            pipeline.segment(config)
    finally:
        leases[0].__exit__(None, None, None)
    assert pipeline.segment(config).ok == 4
    assert len(rows_of(dest)) == 4
