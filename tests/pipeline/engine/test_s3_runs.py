"""Whole runs with SOURCE and DEST on S3: the answers of local disk, through kills, faults and changes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from chaos.faultproxy import FaultProxy
from expiring_profile import ExpiringProfile
from harness import SHAPE_FLAGS, Case, Command, in_process, part_count, terminal_rows, upload, wait_until

import pipeline
from pipeline import cli
from pipeline.engine.outcome import Event
from pipeline.errors import ExpiredCredentialsError
from pipeline.storage import bucket as bucket_storage

pytestmark = pytest.mark.s3

IMAGES = 24
FLAGS = ("--engine", "local", *SHAPE_FLAGS, "--lease-ttl", "4")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES)


@pytest.fixture
def source(case: Case, s3_bucket: str, s3_client: Any) -> str:
    """`s3://bucket/photos` with the corpus."""
    return upload(s3_client, case.images, f"{s3_bucket}/photos")


@pytest.fixture
def dest(s3_bucket: str) -> str:
    return f"{s3_bucket}/masks"


def test_the_command_is_killed_and_run_again(case: Case, source: str, dest: str, s3_client: Any) -> None:
    command = (source, dest, "--model", case.model, "--shard-size", "1", *FLAGS)
    first = Command(*command)
    first.until(lambda: part_count(dest, s3_client) >= 3, what="three Parts", poll_s=0.02)
    first.kill()
    assert part_count(dest, s3_client) < IMAGES, "the driver was to die in the middle"
    outcome = Command(*command).outcome()
    assert outcome["ok"] == IMAGES and outcome["errors"] == 0
    assert terminal_rows(dest) == case.calm


def test_only_what_is_new_or_replaced_is_processed(case: Case, source: str, dest: str, s3_client: Any) -> None:
    first = case.segment(source, dest)
    assert (first.ok, first.images) == (IMAGES, IMAGES)
    assert terminal_rows(dest) == case.calm

    parts = part_count(dest, s3_client)
    again = case.segment(source, dest)
    assert (again.planned, again.skipped, again.runs) == (0, IMAGES, [])
    assert part_count(dest, s3_client) == parts

    names = sorted(case.calm)
    bucket = source.split("/")[2]
    s3_client.put_object(Bucket=bucket, Key=f"photos/{names[3]}", Body=(case.images / names[5]).read_bytes())
    s3_client.put_object(Bucket=bucket, Key="photos/new.png", Body=(case.images / names[7]).read_bytes())
    changed = case.segment(source, dest)
    assert (changed.planned, changed.ok, changed.skipped) == (2, 2, IMAGES - 1)
    assert changed.work is not None and (changed.work.changed, changed.work.new) == (1, 1)
    rows = pipeline.connect(dest).execute("SELECT image_uri, mask_crc32 FROM images").fetchall()
    latest = {uri.rpartition("/")[2]: crc32 for uri, crc32 in rows}
    expected = {name: answer.crc32 for name, answer in case.calm.items()}
    expected |= {names[3]: expected[names[5]], "new.png": expected[names[7]]}
    assert latest == expected


def test_objects_that_are_not_there_are_rows(
    case: Case, source: str, dest: str, s3_client: Any, tmp_path: Path
) -> None:
    """One key of the manifest never was, and one object goes away between listing and reading."""
    names = sorted(case.calm)
    uris = [f"{source}/{name}" for name in [*names, "never.jpg"]]
    manifest = tmp_path / "list.txt"
    manifest.write_text("\n".join(uris))
    bucket = source.split("/")[2]

    def delete_once_planned(event: Event) -> None:
        if event.text.startswith("run "):
            s3_client.delete_object(Bucket=bucket, Key=f"photos/{names[0]}")

    outcome = case.segment(str(manifest), dest, listen=delete_once_planned)
    assert (outcome.ok, outcome.errors_by_kind) == (IMAGES - 1, {"missing": 2})
    rows = terminal_rows(dest)
    assert {rows.pop(names[0]).error_kind, rows.pop("never.jpg").error_kind} == {"missing"}
    assert rows == {name: answer for name, answer in case.calm.items() if name != names[0]}

    # Missing is a failure of the world: once the object is there, the next run takes it up.
    s3_client.put_object(Bucket=bucket, Key=f"photos/{names[0]}", Body=(case.images / names[0]).read_bytes())
    outcome = case.segment(str(manifest), dest)
    assert (outcome.ok, outcome.errors_by_kind) == (1, {"missing": 1})
    rows = terminal_rows(dest)
    assert rows.pop("never.jpg").error_kind == "missing"
    assert rows == case.calm


def test_a_signed_address_leaves_no_signature_and_is_continued_when_signed_anew(
    case: Case, source: str, dest: str, s3_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(case.calm)
    bucket = source.split("/")[2]
    lines = [f"{source}/{name}" for name in [*names, "never.jpg"]]
    s3_client.put_object(Bucket=bucket, Key="lists/tonight.txt", Body="\n".join(lines).encode())
    signed = [
        s3_client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket, "Key": "lists/tonight.txt"}, ExpiresIn=expires_s
        )
        for expires_s in (600, 700)
    ]
    assert signed[0] != signed[1]
    caplog.set_level("DEBUG", logger="pipeline")
    texts: list[str] = []
    first = case.segment(signed[0], dest, canary=len(lines), listen=lambda event: texts.append(event.text))
    assert (first.state, len(pipeline.list_runs(dest))) == ("canary_failed", 1)
    second = case.segment(signed[1], dest, max_error_rate=1.0, listen=lambda event: texts.append(event.text))
    assert second.state == "done" and len(pipeline.list_runs(dest)) == 2  # the first, then `never.jpg` again
    assert second.runs[0] == first.runs[0]
    secrets = [url.partition("ignature=")[2].partition("&")[0] for url in signed]
    pages = s3_client.list_objects_v2(Bucket=bucket, Prefix="masks/runs/")["Contents"]
    written = [s3_client.get_object(Bucket=bucket, Key=page["Key"])["Body"].read() for page in pages]
    assert any(b"lists/tonight.txt" in data for data in written)
    for secret in secrets:
        assert secret
        assert not any(secret.encode() in data for data in written)
        assert secret not in caplog.text + "".join(texts) + json.dumps(pipeline.list_runs(dest), default=str)


def test_local_source_and_s3_dest(case: Case, dest: str) -> None:
    assert case.segment(str(case.images), dest).ok == IMAGES
    assert terminal_rows(dest) == case.calm


#: What strikes, and how often. A flipped byte can be noticed where the store gives a digest: in whole objects.
_WHOLE_OBJECTS = r"GET /[^?]*/(photos|masks/runs)/"
_FAULTS: dict[str, dict[str, Any]] = {
    "unavailable": {"probability": 0.15},
    "error": {"probability": 0.1},
    "reset_before": {"probability": 0.1},
    "reset_after": {"probability": 0.1},
    "truncate": {"probability": 0.1},
    "flip": {"probability": 0.2, "match": _WHOLE_OBJECTS},
}


@pytest.mark.parametrize(
    "kinds",
    [["unavailable", "error"], ["reset_before", "reset_after"], ["truncate", "flip"]],
    ids="+".join,
)
def test_faults_change_nothing(case: Case, source: str, dest: str, fault_proxy: FaultProxy, kinds: list[Any]) -> None:
    for kind in kinds:
        fault_proxy.inject(kind, **_FAULTS[kind])
    outcome = case.segment(source, dest)
    hits = dict(fault_proxy.hits)
    fault_proxy.clear()
    assert set(hits) == set(kinds)
    assert (outcome.ok, outcome.errors) == (IMAGES, 0)
    assert terminal_rows(dest) == case.calm
    assert case.segment(source, dest).planned == 0


def test_writes_whose_answers_are_lost_count_once(case: Case, source: str, dest: str, fault_proxy: FaultProxy) -> None:
    """Of the writes that create; a lease or progress that is never acknowledged is given up."""
    fault_proxy.inject("reset_after", match=r"PUT .*(parquet|plan\.json|run\.json|_log/)")
    outcome = case.segment(source, dest)
    assert fault_proxy.hits["reset_after"] >= outcome.parts + 4  # the list, the plan, the log, the record
    fault_proxy.clear()
    assert outcome.ok == IMAGES
    assert terminal_rows(dest) == case.calm


def test_an_outage_in_the_middle(  # noqa: PLR0917
    case: Case,
    source: str,
    dest: str,
    fault_proxy: FaultProxy,
    s3_client: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bucket_storage, "_RETRIES_PER_REQUEST", 1)  # the patience itself is not what is tested
    arguments = [source, dest, "--model", str(case.model), "--shard-size", "1", *FLAGS, "--lease-ttl", "1", "--json"]
    monkeypatch.setattr("sys.argv", ["maskmill", "segment", *arguments])

    def maskmill() -> int:
        with in_process(), pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def cut_off() -> None:
        wait_until(lambda: part_count(dest, s3_client) >= 3, what="three Parts")
        fault_proxy.inject("refuse")

    fault_proxy.inject("latency", match=_WHOLE_OBJECTS, seconds=0.1)  # so that there is a middle
    cutter = threading.Thread(target=cut_off)
    cutter.start()
    status = maskmill()
    cutter.join()
    told = capsys.readouterr()
    assert status == 1
    assert told.out == "" and "Traceback" not in told.err
    assert told.err.count("failed: could not ") == 1 and f"'{dest}/segments/" in told.err
    kept = part_count(dest, s3_client)
    assert 3 <= kept < IMAGES

    fault_proxy.clear()
    assert maskmill() == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["ok"] == IMAGES and part_count(dest, s3_client) == IMAGES
    assert terminal_rows(dest) == case.calm


@pytest.mark.parametrize("renewed", [True, False], ids=["renewed meanwhile", "not renewed"])
def test_credentials_expire_in_the_middle(  # noqa: PLR0917
    case: Case,
    source: str,
    dest: str,
    fault_proxy: FaultProxy,
    s3_client: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    renewed: bool,
) -> None:
    """Of an image that they were not good enough for, no row says so: nothing is wrong with it."""
    profile = ExpiringProfile(tmp_path, f"http://127.0.0.1:{fault_proxy.port}", monkeypatch)

    def expire() -> None:
        wait_until(lambda: part_count(dest, s3_client) >= 3, what="three Parts")
        if renewed:
            profile.renew()
        fault_proxy.inject("expired", key="old")

    fault_proxy.inject("latency", match=_WHOLE_OBJECTS, seconds=0.1)  # so that there is a middle
    thread = threading.Thread(target=expire)
    thread.start()
    try:
        if renewed:
            assert case.segment(source, dest, shard_size=1).ok == IMAGES
            assert fault_proxy.hits["expired"] > 0
        else:
            with pytest.raises(ExpiredCredentialsError, match="renew the credentials and give the same command again"):
                case.segment(source, dest, shard_size=1)
    finally:
        thread.join()
    if not renewed:
        kept = part_count(dest, s3_client)
        assert 3 <= kept < IMAGES
        with pytest.raises(ExpiredCredentialsError):  # no wrong usage, and so tried again by whoever repeats commands
            case.segment(source, dest, shard_size=1)
        profile.renew()
        assert case.segment(source, dest, shard_size=1).planned == IMAGES
    assert terminal_rows(dest) == case.calm
    rows = pipeline.connect(dest).sql("SELECT count(*) FROM segments").fetchall()
    assert rows == [(IMAGES,)], "an image has a row that says that it was denied"
