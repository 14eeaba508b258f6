"""What bounds a run, and which share of each ceiling it reached."""

from __future__ import annotations

import datetime as dt
import json
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import make_image, make_part
from tables import whole_row

import pipeline
from pipeline.corpus.manifest import Corpus
from pipeline.engine import placement
from pipeline.engine.ceilings import measure, unlike_rows
from pipeline.engine.crew import InlineCrew
from pipeline.engine.limits import Ceilings, StoreCeiling, Traits, assess, read_ceilings, write_ceilings
from pipeline.engine.store_ceilings import in_processes, measure_store, read_all, sample_of
from pipeline.errors import ExpiredCredentialsError, InfrastructureError, UsageError
from pipeline.storage import Blob
from pipeline.storage.disk import DiskStorage

WORKER = {"node": "a", "device": "cpu", "name": "Abacus", "cores": 4}


def run(**changes: Any) -> Traits:
    """100 images of one megapixel and 1 MB in 10 s, by two workers of one thread each."""
    fields: dict[str, Any] = {
        "rows": 100, "seconds": 10.0, "stage_ms": {"fetch": 10.0, "decode": 20.0, "encode": 10.0}, "threads": 1,
        "active_s": 20.0, "busy_s": 18.0, "listed": 1000, "listing_s": 2.0, "store": "s3://photos/",
        "image_bytes": 1e6, "part_bytes": 1e4, "megapixels": {"JPEG": 1.0}, "model": "street@0123456789ab",
        "precision": "bf16", "setup": "plain", "resized": False, "image_megapixels": 1.0, "workers": [WORKER, WORKER],
    }  # fmt: skip
    return Traits(**(fields | changes))


def ceilings(**changes: Any) -> Ceilings:
    fields: dict[str, Any] = {
        "measured_at": dt.datetime(2026, 1, 2, tzinfo=dt.UTC), "node": "b", "device": "cpu", "device_name": "Abacus",
        "cores": 4, "load": 0.0, "source": "s3://photos/",
        "stores": {"s3://photos/": StoreCeiling(gets_per_s=100, mean_bytes=5e5, core_ms_per_get=2, listed_per_s=5000)},
        "decode_mpx_per_core_s": {"JPEG": 100.0, "PNG": 10.0},
        "encode_mpx_per_core_s": {"street@0123456789ab plain": 50.0},
        "forward_mpx_per_s": {"street@0123456789ab bf16 plain": 20.0}, "write_mb_per_core_s": 10.0, "megapixels": 0.5,
    }  # fmt: skip
    return Ceilings(**(fields | changes))


def test_each_share_is_the_rate_over_the_ceiling_for_such_images() -> None:
    found = assess(run(), ceilings())
    assert found is not None
    assert found.ceilings == {
        "fetch": 50.0,  # twice as large as those measured
        "list": 5000.0, "decode": 400.0, "encode": 200.0, "write": 4000.0, "model": 20.0,
        # 10 ms decode, 20 encode, 1 write, 200 model, 4 reading: 235 core-ms an image
        "cores": round(4 / 0.235, 3),
    }  # fmt: skip
    assert found.reached == {
        "fetch": 0.2, "list": 0.1, "decode": 0.025, "encode": 0.05, "write": 0.0025, "model": 0.5,
        "cores": round(10 * 0.235 / 4, 4),
    }  # fmt: skip
    assert found.measured == "Abacus, 4 cores, 2026-01-02"
    assert "50% of its ceiling" in found.why and "the cores at 59%" in found.why


def test_a_gpu_is_beside_the_cores_and_there_may_be_several() -> None:
    gpus = [WORKER | {"device": "cuda:0", "name": "H"}] * 2 + [WORKER | {"node": "c", "device": "cuda:0", "name": "H"}]
    found = assess(run(workers=gpus), ceilings(device="cuda", device_name="H"))
    assert found is not None
    assert found.ceilings["model"] == 60.0, "three of them"
    assert found.ceilings["cores"] == round(8 / 0.035, 3), "two machines, and the network takes none"


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, "model"),
        ({"busy_s": 4.0, "stage_ms": {"fetch": 150.0, "decode": 20.0, "encode": 10.0}}, "fetch"),
        ({"busy_s": 4.0, "stage_ms": {"fetch": 1.0, "decode": 100.0, "encode": 60.0}}, "decode"),
        ({"busy_s": 4.0, "stage_ms": {"fetch": 1.0, "decode": 60.0, "encode": 100.0}}, "encode"),
        ({"busy_s": 4.0, "threads": 8, "stage_ms": {"fetch": 1.0, "decode": 60.0, "encode": 100.0}}, "none"),
        ({"active_s": 8.0, "busy_s": 8.0}, "start"),
    ],
)  # fmt: skip
def test_what_bounds_a_run_is_told_without_ceilings(changes: dict[str, Any], bound: str) -> None:
    found = assess(run(**changes), None)
    assert found is not None
    assert (found.bound_by, found.reached, found.ceilings, found.measured) == (bound, {}, {}, "")
    # Shares add up to what the threads were busy: 100 images in 20 s of one thread each.
    assert found.time["decode"] == pytest.approx(run(**changes).stage_ms["decode"] / 1e3 * 100 / (
        run(**changes).threads * run(**changes).active_s))  # fmt: skip


def test_ceilings_of_another_machine_are_not_compared() -> None:
    for changes, words in (({"device_name": "Slide rule"}, "Slide rule"), ({"cores": 2}, "2 cores")):
        found = assess(run(), ceilings(**changes))
        assert found is not None
        assert found.reached == {} and words in found.measured and found.bound_by == "model"


def test_what_was_not_measured_has_no_share() -> None:
    found = assess(run(megapixels={"TIFF": 1.0}, store="s3://other/", precision="fp32", listing_s=0.0), ceilings())
    assert found is not None
    assert found.reached.keys() == {"encode", "write"}
    assert "; model, cores not compared: the ceilings are of street@0123456789ab bf16 plain" in found.measured
    assert assess(run(rows=0), ceilings()) is None


def test_other_settings_are_not_compared() -> None:
    """One file said 87 % of a plain run, 44 % of one with flips that was as busy, and 326 % of one resized."""
    found = assess(run(setup="flips"), ceilings())
    assert found is not None
    assert found.reached.keys() == found.ceilings.keys() == {"fetch", "list", "decode", "write"}
    assert found.measured == (
        "Abacus, 4 cores, 2026-01-02; model, encode, cores not compared: the ceilings are of "
        "street@0123456789ab bf16 plain, the run was of street@0123456789ab bf16 flips (model, precision, settings)"
    )
    assert "ceiling" not in found.why and found.bound_by == "model"


@pytest.mark.parametrize(
    ("megapixels", "compared"), [(0.5, True), (0.6, True), (0.4, True), (0.62, False), (0.3, False)]
)
def test_where_images_are_resized_only_those_like_the_sample_are_compared(megapixels: float, compared: bool) -> None:
    """The canvas does not grow with the image."""
    images = {"megapixels": {"JPEG": megapixels}, "image_megapixels": megapixels}
    found = assess(run(resized=True, **images), ceilings())
    assert found is not None
    assert ({"model", "encode", "cores"} <= found.reached.keys()) is compared
    assert {"fetch", "decode", "write"} <= found.reached.keys()
    says = "; model, encode, cores not compared: images are resized, those of the sample have 0.5 megapixels"
    assert (says in found.measured) is not compared
    native = assess(run(**images), ceilings())
    assert native is not None and {"model", "encode", "cores"} <= native.reached.keys()


def test_a_file_that_is_none_is_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKMILL_LIMITS", raising=False)
    assert read_ceilings(None) is None
    place = tmp_path / "l.json"
    with pytest.raises(UsageError, match="maskmill limits --out"):
        read_ceilings(str(place))
    write_ceilings(ceilings(), str(place))
    assert read_ceilings(str(place)) == ceilings()
    monkeypatch.setenv("MASKMILL_LIMITS", str(place))
    assert read_ceilings(None) == ceilings()
    place.write_text(json.dumps({"version": 7}))
    with pytest.raises(UsageError, match="version"):
        read_ceilings(None)
    place.write_text(json.dumps(json.loads(ceilings().model_dump_json()) | {"version": 1}))
    with pytest.raises(UsageError, match="make it anew with `maskmill limits --out"):
        read_ceilings(None)


def test_a_script_without_a_guard_measures_and_is_run_once(
    tmp_path: Path, semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    """Processes that multiprocessing spawns run the caller's script again, and die of it."""
    script, source = tmp_path / "script.py", str(image_folder(2))
    script.write_text(
        "import pathlib, pipeline, pipeline.engine.store_ceilings as stores\n"
        f"found = pipeline.limits({source!r}, {str(semantic_model)!r}, seconds=0.02, precision='fp32')\n"
        f"alone = stores.measure_store({source!r}, scratch=pathlib.Path({str(tmp_path)!r}), seconds=0.02)\n"
        "print(found.stores.keys() == alone.keys())\n"
    )
    variables = os.environ | {"PYTHONPATH": str(Path(pipeline.__file__).parents[1])}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_measuring_processes_are_others_and_are_gone_afterwards() -> None:
    pids = in_processes(2, os.getpid)
    assert len({*pids, os.getpid()}) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_measuring_process_that_dies_is_told_in_a_sentence() -> None:
    with pytest.raises(InfrastructureError, match=r"one of 2 measuring processes died .*exit status 3.*: see that"):
        in_processes(2, os._exit, 3)
    with pytest.raises(ZeroDivisionError):
        in_processes(1, operator.truediv, 1, 0)


def test_measured_ceilings_are_in_the_record_of_a_run_and_in_its_report(
    tmp_path: Path, semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    images, file = image_folder(6), tmp_path / "limits.json"
    found = measure(str(images), str(semantic_model), scratch=tmp_path / "scratch", seconds=0.02, precision="fp32")
    write_ceilings(found, str(file))
    assert found.decode_mpx_per_core_s.keys() and all(rate > 0 for rate in found.decode_mpx_per_core_s.values())
    done = pipeline.segment(
        source=str(images), dest=str(tmp_path / "dest"), model=str(semantic_model), engine="local", actors=1,
        precision="fp32", limits=str(file),
    )  # fmt: skip
    limits = pipeline.show_run(str(tmp_path / "dest"), done.run_id)["limits"]
    assert limits["reached"].keys() == {"list", "fetch", "decode", "model", "encode", "write", "cores"}
    for stage, share in limits["reached"].items():
        if stage != "list":
            assert share == pytest.approx(done.images_per_s / limits["ceilings"][stage], abs=1e-3)
    page = (tmp_path / "dest" / "runs" / str(done.run_id) / "report.html").read_text()
    assert "Against the limits" in page and limits["measured"] in page and "all on the CPU" in page


def test_a_run_is_compared_with_ceilings_of_its_own_settings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    images, file = image_folder(6), tmp_path / "limits.json"
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    flips: dict[str, Any] = {"augmentation": {"flips": ["horizontal"]}}
    resized: dict[str, Any] = {"size_policy": {"kind": "resize", "short_side_px": 96}}

    def measured(**options: Any) -> Ceilings:
        scratch = tmp_path / "scratch"
        return measure(str(images), str(semantic_model), scratch=scratch, seconds=0.02, precision="fp32", **options)

    def reached(settings: dict[str, Any], source: Path = images, **options: Any) -> dict[str, float]:
        dest = str(tmp_path / "dest")
        done = pipeline.segment(
            source=str(source), dest=dest, model=str(semantic_model), engine="local", actors=1, precision="fp32",
            limits=str(file), settings=settings, force=True, report=False, **options,
        )  # fmt: skip
        found: dict[str, float] = pipeline.show_run(dest, done.run_id)["limits"]["reached"]
        return found

    of_model = {"model", "encode", "cores"}
    write_ceilings(measured(), str(file))
    assert not of_model & reached(flips).keys()
    assert of_model <= reached({"size_policy": {"kind": "native"}}).keys(), "the card says so anyway"
    assert of_model <= reached({}, max_pixels=1_000_000).keys()
    write_ceilings(measured(settings=resized), str(file))
    assert of_model <= reached(resized).keys()
    assert not of_model & reached({}).keys(), "the other way round"
    make_image(tmp_path / "large" / "0.png", 1, width=200, height=150)
    assert not of_model & reached(resized, tmp_path / "large").keys()
    with pytest.raises(UsageError, match=r"--set: .*short_side_px"):
        measured(settings={"size_policy": {"kind": "resize"}})


def test_rows_made_for_a_part_are_as_large_as_those_of_other_images() -> None:
    """Repeated, they would be found again by zstd, which a real Part's are not: 8 MB/s were told where 60 were true."""
    rows = [whole_row(f"s3://photos/{index}.jpg", index) for index in range(8)]
    made = unlike_rows(rows, 200)
    assert [len(row["mask"]["bytes"]) for row in made[:8]] == [len(row["mask"]["bytes"]) for row in rows]
    assert len({row["mask"]["bytes"] for row in made}) == 200
    for ours, theirs in zip(made, rows, strict=False):
        for one, other in zip(ours["instances"], theirs["instances"], strict=True):
            assert sorted(one["rle"]["counts"]) == sorted(other["rle"]["counts"])
            assert one["bbox"] == other["bbox"]
    assert len(make_part(made)) > 2 * len(make_part([rows[i % 8] for i in range(200)]))


def test_an_inventory_that_goes_meanwhile_is_named() -> None:
    gone = Corpus("read_parquet(['/nowhere/part.parquet'])", 100, True, False, "file:///lists/manifest.json")
    with pytest.raises(InfrastructureError, match=r"lists/manifest\.json could not be read: IO Error"):
        sample_of(gone)


def test_images_that_cannot_be_read_are_left_out_of_the_sample(
    tmp_path: Path, semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    """As a damaged one is: one file that somebody had moved ended the measurement."""
    photos = image_folder(4)
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "folder.png").mkdir()
    uris = [str(photos / "gone.png"), *map(str, sorted(photos.iterdir())), str(photos / "gone.jpg")]
    (tmp_path / "list.txt").write_text("\n".join(uris))
    found = measure(str(tmp_path / "list.txt"), str(semantic_model), scratch=tmp_path, seconds=0.02, precision="fp32")
    assert found.decode_mpx_per_core_s.keys() == {"JPEG", "PNG"}
    sizes = [path.stat().st_size for path in photos.iterdir() if path.is_file()]
    store = measure_store(str(tmp_path / "list.txt"), scratch=tmp_path, seconds=0.02)
    assert store["file:///"].mean_bytes == sum(sizes) / len(sizes) == found.stores["file:///"].mean_bytes


def test_a_sample_of_which_nothing_can_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [f"file://{tmp_path}/{name}.png" for name in ("a", "b")]
    with pytest.raises(UsageError, match=r"no image of the sample can be read: .*a\.png"):
        read_all(uris, 0.01, None)
    (tmp_path / "b.png").write_bytes(b"b")
    assert [blob.data for blob in read_all(uris, 0.01, None)[1]] == [b"b"]

    class Expired(DiskStorage):
        def get(self, uri: str) -> Blob:
            if uri == uris[0]:
                raise ExpiredCredentialsError("expired", kind="denied")
            return super().get(uri)

    monkeypatch.setattr("pipeline.engine.store_ceilings.open_storage", lambda uri, profile: Expired(uri))
    with pytest.raises(ExpiredCredentialsError):
        read_all(uris, 0.01, None)


@pytest.mark.slow
def test_images_in_tiles_are_measured_in_tiles(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    make_image(tmp_path / "photos" / "large.png", 1, width=700, height=650)
    found = measure(str(tmp_path / "photos"), "nuclei-unet", scratch=tmp_path, seconds=0.01)
    assert found.decode_mpx_per_core_s.keys() == {"PNG"}
    assert next(iter(found.forward_mpx_per_s.values())) > 0


@pytest.mark.parametrize(
    "asked",
    [{"seconds": float("inf")}, {"seconds": 0.0}, {"seconds": float("nan")}, {"batch_size": 0}, {"batch_size": 10**20}],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"--(seconds|batch-size) is .*: give "):
        measure("nowhere", "nuclei-unet", scratch=tmp_path, **asked)
