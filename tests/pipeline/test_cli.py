"""The command `maskmill` as a person and as a script meet it: stdout, stderr, exit statuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import psutil
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from command_line import Maskmill
from handmade import make_image, part_paths, rows_of
from rich.console import Console

import pipeline
from pipeline import screen
from pipeline.commands import options
from pipeline.engine import run as engine_run

HOSTILE = '[red]it\'s[/red] "so" :bomb: %s \x1b[2J.png'
SHOWN = '[red]it\'s[/red] "so" :bomb: %s \\x1b[2J.png'

JSON_KEYS = {
    "run_id", "images", "duplicates", "planned", "skipped", "held", "ok", "errors", "errors_by_kind", "parts",
    "seconds", "images_per_s", "megapixels_per_s", "model_busy_fraction", "model_version",
}  # fmt: skip


class Place(NamedTuple):
    """SOURCE, DEST and the options that every command here has."""

    source: Path
    dest: Path
    options: tuple[str, ...]


@pytest.fixture
def place(tmp_path: Path, semantic_model: Path, image_folder: Callable[..., Path]) -> Place:
    options = ("--model", str(semantic_model), "--precision", "fp32", "--threads", "1", "--no-report")
    return Place(image_folder(3), tmp_path / "dest", options)


@pytest.fixture
def done(place: Place, maskmill: Maskmill) -> Place:
    """The same, segmented, with an image of a hostile name and one that is none."""
    make_image(place.source / HOSTILE, 5)
    (place.source / "bad.jpg").write_bytes(b"no picture")
    assert maskmill("segment", place.source, place.dest, *place.options).status == options.TOO_MANY_ERRORS
    return place


# ── segment ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_is_exactly_one_object_with_all_keys(place: Place, maskmill: Maskmill) -> None:
    said = maskmill("segment", place.source, place.dest, *place.options, "--json")
    assert said.status == 0
    assert said.out.count("\n") == 1
    body = json.loads(said.out)
    assert body.keys() >= JSON_KEYS
    assert (body["images"], body["ok"], body["errors"], body["planned"], body["skipped"]) == (3, 3, 0, 3, 0)
    assert body["run_id"] == rows_of(place.dest)[0]["run_id"]
    again = json.loads(maskmill("segment", place.source, place.dest, *place.options, "--json").out)
    assert again.keys() == body.keys()
    assert (again["run_id"], again["planned"], again["skipped"]) == (None, 0, 3)


def test_what_a_person_reads(place: Place, maskmill: Maskmill) -> None:
    first = maskmill("segment", place.source, place.dest, *place.options)
    assert "done: run " in first.out
    assert "3 ok, 0 errors" in first.out
    assert "engine local" in first.err
    again = maskmill("segment", place.source, place.dest, *place.options)
    assert again.out == "nothing to do: 3 images, 3 done before, 0 held by open runs\n"


def test_too_many_errors_are_status_3_but_all_is_done(place: Place, maskmill: Maskmill) -> None:
    (place.source / "bad.jpg").write_bytes(b"no picture")
    said = maskmill("segment", place.source, place.dest, *place.options, "--json")
    assert said.status == options.TOO_MANY_ERRORS == 3
    assert json.loads(said.out)["errors_by_kind"] == {"not_an_image": 1}
    assert len(rows_of(place.dest)) == 4


def test_errors_below_the_limit_are_status_0(place: Place, maskmill: Maskmill) -> None:
    (place.source / "bad.jpg").write_bytes(b"no picture")
    said = maskmill("segment", place.source, place.dest, *place.options, "--max-error-rate", "0.25")
    assert said.status == 0
    assert "1 error (1 not_an_image)" in said.out


def test_a_canary_that_fails_is_status_3_and_the_run_stays_open(place: Place, maskmill: Maskmill) -> None:
    for path in place.source.iterdir():
        path.write_bytes(b"no picture")
    said = maskmill("segment", place.source, place.dest, *place.options, "--canary", "2", "--shard-size", "2")
    assert said.status == 3
    assert "stopped after the canary" in said.out
    assert "warning:" in said.err
    assert len(rows_of(place.dest)) == 2


def test_a_dry_run_prints_the_plan(place: Place, maskmill: Maskmill) -> None:
    said = maskmill("segment", place.source, place.dest, *place.options, "--dry-run", "--shard-size", "2")
    assert said.status == 0
    assert "3: 3 new, 0 changed, 0 failed before" in said.out
    assert "in 2 shards" in said.out
    assert "from a sample of" in said.out
    body = json.loads(maskmill("segment", place.source, place.dest, *place.options, "--dry-run", "--json").out)
    assert body["state"] == "planned"
    assert body["work"]["new"] == 3
    assert not place.dest.exists()


WRONG_USAGE = [
    (["segment", "{source}", "{dest}"], "--model"),
    (["segment", "{source}"], "DEST"),
    (["segmnet"], "segmnet"),
    (["segment", "{source}", "{dest}", "--model", "no-such-model"], "no model is called 'no-such-model'"),
    (["segment", "{source}", "{dest}", "--model", "Not A Name"], "'Not A Name' is neither"),
    (["segment", "{source}", "{dest}", "--model", "gone.safetensors"], "gone.safetensors"),
    (["segment", "{source}/nowhere", "{dest}", "--model", "{model}"], "nowhere"),
    (["segment", "", "{dest}", "--model", "{model}"], "empty"),
    (["segment", "{source}", "{dest}", "--model", "{model}", "--batch-size", "0"], "--batch-size is 0"),
    (["segment", "{source}", "{dest}", "--model", "{model}", "--batch-size", "x"], "batch-size"),
    (["segment", "{source}", "{dest}", "--model", "{model}", "--precision", "fp8"], "--precision is 'fp8'"),
    (["segment", "{source}", "{dest}", "--model", "{model}", "--engine", "spark"], "--engine is 'spark'"),
    (["segment", "{source}", "{dest}", "--model", "{model}", "--max-error-rate", "5"], "--max-error-rate is 5.0"),
    (["segment", "{source}", "{dest}", "--model", "{model}", "--memory-mb", "0"], "--memory-mb is 0"),
    (["segment", "{source}", "{dest}", "--model", "{model}", "--run-date", "today"], "run-date"),
    (["segment", "nosuch://x/y", "{dest}", "--model", "{model}"], "nosuch"),
    (["query", "{source}", "SELECT 1"], "holds no Maskmill table"),
    (["query", "{source}", "SELECT 1", "--format", "xml"], "--format is 'xml'"),
    (["runs", "list", "{dest}"], "holds no runs"),
    (["runs", "show", "{dest}", "20260102T030405Z-abcdef"], "no run '20260102T030405Z-abcdef'"),
    (["runs", "abandon", "{dest}", "x/../y"], "no run 'x/../y'"),
    (["models", "show", "no-such-model"], "no-such-model"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), WRONG_USAGE, ids=[" ".join(case[0][:1] + case[0][-2:]) for case in WRONG_USAGE]
)
def test_wrong_usage_is_one_sentence_and_status_2(
    place: Place, maskmill: Maskmill, arguments: list[str], expected: str
) -> None:
    names = {"source": str(place.source), "dest": str(place.dest), "model": place.options[1]}
    said = maskmill(*(argument.format(**names) for argument in arguments))
    assert said.status == options.USAGE == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert not place.dest.exists()


def test_failing_infrastructure_is_status_1(place: Place, maskmill: Maskmill, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.errors import StorageError

    def fails(*_: Any, **__: Any) -> Any:
        raise StorageError("could not list 's3://x': 503", kind="fetch_failed")

    monkeypatch.setattr(engine_run, "read_source", fails)
    said = maskmill("segment", place.source, place.dest, *place.options)
    assert (said.status, said.err.splitlines()[-1]) == (1, "failed: could not list 's3://x': 503")


def test_a_bug_is_a_sentence_too(place: Place, maskmill: Maskmill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_run, "read_source", lambda *_, **__: 1 / 0)
    said = maskmill("segment", place.source, place.dest, *place.options)
    assert said.status == 1
    assert "failed: ZeroDivisionError: division by zero" in said.err
    assert "MASKMILL_DEBUG=1" in said.err


@pytest.mark.parametrize("arguments", [[], ["segment"], ["query"], ["runs"], ["runs", "list"], ["models"]])
def test_help(maskmill: Maskmill, arguments: list[str]) -> None:
    said = maskmill(*arguments, "--help")
    assert said.status == 0
    assert "Usage: maskmill" in said.out


@pytest.mark.parametrize("arguments", [[], ["runs"], ["models"]])
def test_a_command_without_arguments_shows_its_help(maskmill: Maskmill, arguments: list[str]) -> None:
    said = maskmill(*arguments)
    assert (said.status, said.err) == (2, "")
    assert "Usage: maskmill" in said.out


# ── names from the corpus ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hostile_name_is_shown_as_text(done: Place, maskmill: Maskmill) -> None:
    sql = f"SELECT image_uri[-{len(HOSTILE)}:] AS name FROM images ORDER BY 1"
    said = maskmill("query", done.dest, sql)
    assert said.status == 0
    assert SHOWN in said.out
    assert "\x1b" not in said.out
    as_json = maskmill("query", done.dest, sql, "--format", "json").out
    assert HOSTILE in [row["name"] for row in json.loads(as_json)]


def test_a_hostile_name_in_an_error_or_a_source_is_shown_as_text(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("segment", done.source / (HOSTILE + "x"), done.dest, *done.options)
    assert said.status == 2
    assert "[red]it" in said.err
    assert "\x1b" not in said.err
    maskmill("segment", done.source / HOSTILE, done.dest, *done.options, "--force")
    listed = maskmill("runs", "list", done.dest)
    assert "[red]it" in listed.out
    assert "\x1b" not in listed.out


def test_a_hostile_column_name(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, 'SELECT 1 AS "[bold]x""y"')
    assert '[bold]x"y' in said.out


# ── query ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_query_as_a_table(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, "SELECT count(*) AS images, 1/3 AS third, NULL AS nothing FROM images")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines == [["images", "third", "nothing"], ["5", "0.333333"], ["(1", "row)"]]


def test_query_as_json(done: Place, maskmill: Maskmill) -> None:
    sql = "SELECT *, 'nan'::FLOAT AS odd FROM images ORDER BY image_uri"
    rows = json.loads(maskmill("query", done.dest, sql, "--format", "json").out)
    assert len(rows) == 5
    assert rows[0]["odd"] is None
    good = next(row for row in rows if row["status"] == "ok")
    assert good["mask"]["bytes"].startswith("iVBORw0KGgo")  # PNG in base64
    assert good["classes"][0]["pixels"] > 0
    assert maskmill("query", done.dest, "SELECT 1 WHERE false", "--format", "json").out == "[]\n"


def test_sums_and_decimals_are_numbers_in_json(done: Place, maskmill: Maskmill) -> None:
    sql = "SELECT sum(width) AS wide, sum(0.25::DECIMAL(4, 2)) AS share, 2::HUGEINT ** 70 AS float FROM images"
    (row,) = json.loads(maskmill("query", done.dest, sql, "--format", "json").out)
    assert type(row["wide"]) is int and row["share"] == 1.25 and row["float"] == 2.0**70


def test_columns_of_one_name_are_all_in_json(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, "SELECT 1 AS a, 2 AS b, 3 AS a, 4 AS a", "--format", "json")
    assert json.loads(said.out) == [{"a": 1, "b": 2, "a_1": 3, "a_2": 4}]


def test_query_as_csv_of_odd_types(done: Place, maskmill: Maskmill) -> None:
    sql = "SELECT '\\x00a'::BLOB AS b, [NULL, 1] AS l, INTERVAL 1 DAY AS i, NULL AS n, 1.50 AS d"
    said = maskmill("query", done.dest, sql, "--format", "csv").out.splitlines()
    assert said == ['"b","l","i","n","d"', '"AGE=","[null, 1]","[0, 1, 0]",,1.50']


def test_query_as_csv_with_every_column(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, "SELECT * FROM images ORDER BY image_uri", "--format", "csv")
    assert said.status == 0
    table = pyarrow.csv.read_csv(io.BytesIO(said.out.encode()))
    assert table.num_rows == 5
    good = next(row for row in table.to_pylist() if row["status"] == "ok")
    assert json.loads(good["classes"])[0]["pixels"] > 0
    assert json.loads(good["mask"])["bytes"].startswith("iVBORw0KGgo")  # PNG in base64, as in JSON
    assert Path(good["image_uri"]).name == "0000.jpg"


def test_query_as_parquet(done: Place) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "query", str(done.dest), "FROM images", "--format", "parquet"]
    table = pq.read_table(io.BytesIO(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    assert table.num_rows == 5
    assert str(table.schema.field("mask").type).startswith("struct<bytes: ")


def test_a_query_that_is_wrong_says_why(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, "SELECT colour FROM images")
    assert said.status == 2
    assert said.err.startswith("error: the query failed: ")
    assert "colour" in said.err


# ── a healthy table ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_verify_finds_nothing_in_a_whole_table_and_says_what_a_cut_file_is(done: Place, maskmill: Maskmill) -> None:
    whole = maskmill("verify", done.dest, "--deep")
    assert whole.status == 0 and "nothing is wrong" in whole.out, whole.out
    part = next(done.dest.glob("segments/*/*/*/*.parquet"))
    part.chmod(0o644)
    part.write_bytes(part.read_bytes()[:-20])
    damaged = maskmill("verify", done.dest)
    assert damaged.status == 1 and part.name in damaged.out
    (finding, *_) = json.loads(maskmill("verify", done.dest, "--json").out)
    assert set(finding) == {"kind", "uri", "message", "mend"} and finding["mend"]
    assert maskmill("verify", done.source).status == 2


def test_drift_of_a_first_run_has_nothing_to_be_compared_with(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("drift", done.dest)
    assert said.status == 0 and "no earlier run" in said.out
    assert json.loads(maskmill("drift", done.dest, "--json").out)["state"] == "no_earlier_runs"
    assert maskmill("drift", done.dest, "--run", "20200101T000000Z-abcdef").status == 2


def test_a_narrow_terminal_shows_every_run_id_whole(
    done: Place, maskmill: Maskmill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich would crop what does not fit, and the id is there to be copied."""
    monkeypatch.setattr(screen, "stdout", lambda: Console(width=40, highlight=False))
    shown = maskmill("runs", "list", done.dest).out
    run = pipeline.list_runs(str(done.dest))[-1]
    assert run["run_id"] in shown and run["source"] in shown and run["model_version"] in shown


# ── settings of a run ────────────────────────────────────────────────────────────────────────────────────────────────


def test_settings_change_the_answer_and_are_frozen(done: Place, maskmill: Maskmill) -> None:
    """Another setting is another question: every image is asked it, and the plan says what it was."""
    again = maskmill("segment", done.source, done.dest, *done.options, "--set", "tile_above_pixels=600", "--json")
    assert again.status == options.TOO_MANY_ERRORS, again.err
    outcome = json.loads(again.out)
    assert outcome["planned"] == outcome["images"] > 0
    plan = json.loads(maskmill("runs", "show", done.dest, outcome["run_id"]).out)["plan"]
    same = maskmill("segment", done.source, done.dest, *done.options, "--set", "size_policy.kind=native", "--json")
    assert json.loads(same.out)["planned"] == 0, "the card's own value is no other question"
    assert plan["settings"]["tile_above_pixels"] == 600 and plan["command"]["settings"] == {"tile_above_pixels": 600}
    assert (
        json.loads(
            maskmill("segment", done.source, done.dest, *done.options, "--set", "tile_above_pixels=600", "--json").out
        )["planned"]
        == 0
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("posprocessing.kind=argmax", "did you mean 'postprocessing'"),
        ("cleanup", "not KEY=VALUE"),
        ("cleanup.min_region_area_px=many", "cleanup.min_region_area_px does not fit"),
        ('size_policy={"kind":"tile","tile_px":4}', "smaller than the network's stride"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_image(
    change: str, said: str, done: Place, maskmill: Maskmill
) -> None:
    before = maskmill("runs", "list", done.dest, "--json").out
    refused = maskmill("segment", done.source, done.dest, *done.options, "--set", change)
    assert refused.status == 2 and said in refused.err.splitlines()[-1], refused.err
    assert maskmill("runs", "list", done.dest, "--json").out == before


def test_several_statements_are_refused(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, "SELECT 1; SELECT 2")
    assert said.status == 2 and "2 statements" in said.err


def test_masks_in_a_pipe_are_one_line_a_row_and_no_bytes(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, "SELECT image_uri, mask, classes FROM images WHERE status = 'ok'")
    lines = said.out.splitlines()
    assert len(lines) == 2 + int(lines[-1].strip("()").split()[0])
    assert all("bytes>" in line and "PNG" not in line for line in lines[1:-1])


def test_long_results_are_cut_on_the_screen_and_say_so(done: Place, maskmill: Maskmill) -> None:
    said = maskmill("query", done.dest, "SELECT range AS n FROM range(1500)")
    assert "the first 1000 rows" in said.out
    assert len(maskmill("query", done.dest, "FROM range(5000)", "--format", "csv").out.splitlines()) == 5001


# ── runs and models ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_list_show_abandon(done: Place, maskmill: Maskmill) -> None:
    (run,) = json.loads(maskmill("runs", "list", done.dest, "--json").out)
    assert (run["state"], run["rows"], run["planned"]) == ("done", 5, 5)
    table = maskmill("runs", "list", done.dest)
    assert run["run_id"] in table.out
    assert "5/5" in table.out
    shown = json.loads(maskmill("runs", "show", done.dest, run["run_id"]).out)
    assert (shown["ok"], shown["plan"]["run_id"]) == (4, run["run_id"])
    said = maskmill("runs", "abandon", done.dest, run["run_id"])
    assert said.out == f"run {run['run_id']} is done: 5 of 5 rows are committed\n"


def test_models_list_and_show(
    maskmill: Maskmill, tmp_path: Path, semantic_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.file import model_version

    version = model_version(semantic_model.read_bytes())
    shelf = tmp_path / "registry" / "tiny-semantic"
    shelf.mkdir(parents=True)
    (shelf / f"{version}.safetensors").write_bytes(semantic_model.read_bytes())
    monkeypatch.setenv("MASKMILL_REGISTRY", str(tmp_path / "registry"))
    listed = json.loads(maskmill("models", "list", "--json").out)
    assert ["tiny-semantic", version] in [[line["name"], line["version"]] for line in listed]
    assert version in maskmill("models", "list").out
    for reference in ("tiny-semantic", f"tiny-semantic@{version}", str(semantic_model)):
        card = json.loads(maskmill("models", "show", reference).out)
        assert (card["name"], card["version"], card["task"]) == ("tiny-semantic", version, "semantic")


# ── a process of its own ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_being_asked_to_stop_drains_and_the_same_command_continues(
    asked: signal.Signals, place: Place, maskmill: Maskmill
) -> None:
    for index in range(60):
        make_image(place.source / f"more-{index}.png", index)
    command = [sys.executable, "-m", "pipeline.cli", "segment", place.source, place.dest, *place.options]
    command += ["--shard-size", "1", "--engine", "local"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not part_paths(place.dest):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, asked)
        out, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == options.INTERRUPTED == 130, err
    assert "Traceback" not in err
    assert "stopping" in err
    assert "the same command continues" in out
    committed = len(rows_of(place.dest))
    assert 0 < committed < 63
    said = maskmill("segment", place.source, place.dest, *place.options, "--shard-size", "1", "--json")
    assert said.status == 0
    assert len(json.loads(said.out)["runs"]) == 1
    assert len({row["image_uri"] for row in rows_of(place.dest)}) == len(rows_of(place.dest)) == 63


def test_being_asked_twice_it_does_not_wait_for_shards_in_flight(place: Place, tmp_path: Path) -> None:
    for index in range(60):
        make_image(place.source / f"more-{index}.png", index)
    command = [sys.executable, "-m", "pipeline.cli", "segment", place.source, place.dest, *place.options]
    command += ["--shard-size", "1", "--engine", "local", "--actors", "1"]
    told = tmp_path / "stderr"
    with told.open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True)
    workers: list[psutil.Process] = []
    try:
        while not part_paths(place.dest):
            assert process.poll() is None, told.read_text()
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "pipeline.engine.crew" in child.cmdline()]
        for worker in workers:
            worker.suspend()  # so that nothing in flight is ever finished
        process.send_signal(signal.SIGINT)
        while "s to finish" not in told.read_text():
            assert process.poll() is None, told.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    finally:
        process.kill()
        left = [worker for worker in workers if worker.is_running()]
        for worker in left:
            worker.kill()
    assert (process.returncode, out) == (options.INTERRUPTED, ""), told.read_text()
    assert "Traceback" not in told.read_text()
    assert len(workers) == 1 and not left
    assert 0 < len(rows_of(place.dest)) < 63


def test_a_reader_that_goes_away_gets_no_complaint(done: Place) -> None:
    command = f'"{sys.executable}" -m pipeline.cli query "{done.dest}" "FROM range(200000)" --format csv | head -n 1'
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ('"range"\n', "")


def test_version(maskmill: Maskmill) -> None:
    said = maskmill("--version")
    assert (said.status, said.out) == (0, f"maskmill {pipeline.__version__}\n")


def test_models_import(maskmill: Maskmill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tiny.safetensors"
    common = ("models", "import", "smp:unet/resnet18", "--out", out, "--arg", "encoder_depth=3", "--arg")
    said = maskmill(*common, "decoder_channels=[16,8,8]", "--random", "--seed", "4", "--classes", "background, road")
    assert (said.status, said.err) == (0, "")
    assert "unet-resnet18, version " in said.out
    shown = json.loads(maskmill("models", "show", out).out)
    assert [info["name"] for info in shown["classes"]] == ["background", "road"]
    assert shown["version"] in said.out
    before = out.read_bytes()
    for arguments, expected in [
        ((*common, "decoder_channels=16 8", "--random"), "give KEY=JSON"),
        ((*common, "encoder_depth=9", "--random"), "'encoder_depth'"),
        (("models", "import", "smp:unet/resnet18", "--out", "x.pth", "--random"), "must end in .safetensors"),
        (("models", "import", "torchvision:fcn", "--out", out, "--random"), "known are fcn_resnet50"),
        (("models", "import", "smp:unet/resnet18", "--out", out, "--weights-file", tmp_path / "no.pth"), "no.pth"),
        (("models", "import", "smp:unet/resnet18", "--out", out, "--weights-file", tmp_path), "Is a directory"),
        (("models", "import", "smp:unet/resnet18", "--out", out, "--random", "--task", "x"), "task is 'x'"),
        ((*common, "decoder_channels=[16,8,8]", "--random", "--classes", "a,a"), "error: class ids and names must be"),
        (
            ("models", "import", "smp:unet/resnet18", "--out", tmp_path / "no" / "x.safetensors", "--random"),
            f"there is no folder {tmp_path / 'no'}\n",
        ),
    ]:
        said = maskmill(*arguments)
        assert (said.status, said.out) == (2, "")
        assert expected in said.err
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # What urllib keeps of its proxies must not outlive this.
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for arguments, place in [
        (("torchvision:lraspp_mobilenet_v3_large",), "lraspp_mobilenet_v3_large-d234d4ea.pth"),
        (("smp:unet/resnet18", "--weights", "imagenet"), "smp-hub/resnet18.imagenet"),
    ]:
        said = maskmill("models", "import", *arguments, "--out", out)
        assert said.status == 1
        assert place in said.err and "could not be fetched" in said.err and "--weights-file" in said.err
        assert out.read_bytes() == before
