"""The deployments of infra/prefect.yaml, with a real server and worker: on schedule, by hand, cancelled, killed."""

from __future__ import annotations

import datetime as dt
import json
import urllib.error
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from harness import SHAPE, Case, part_count, terminal_rows, upload, wait_until
from prefect_site import Site

pytestmark = pytest.mark.prefect

IMAGES = 40
SETTINGS: dict[str, Any] = {"engine": "local", "actors": 1, "shard_size": 1, "lease_ttl_s": 4} | SHAPE


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES)


@pytest.fixture(scope="module", autouse=True)
def nightly(site: Site, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DEST of the nightly, which is due in a minute or two, as somebody who tries it out would have it."""
    dest = tmp_path_factory.mktemp("nightly") / "out"
    settings = {"source": str(case.images), "dest": str(dest), "model": str(case.model)} | SETTINGS
    found = site.api("deployments/name/segment-corpus/nightly")
    due = dt.datetime.now(ZoneInfo("Europe/Berlin")) + dt.timedelta(seconds=70)
    schedule = {"cron": f"{due.minute} {due.hour} * * *", "timezone": "Europe/Berlin"}
    schedule = {"active": True, "schedule": schedule, "parameters": settings}
    site.api(f"deployments/{found['id']}/schedules", [schedule])
    return dest


def finished(site: Site, dest: str) -> list[dict[str, Any]]:
    events = site.api("events/filter", {"filter": {"event": {"name": ["maskmill.run.finished"]}}})["events"]
    return [event for event in events if event["payload"]["dest"] == dest]


def scheduled(site: Site, dest: Path) -> list[dict[str, Any]]:
    """Runs that the scheduler made for this DEST, the earliest first."""
    wanted = {"deployments": {"name": {"any_": ["nightly"]}}, "sort": "EXPECTED_START_TIME_ASC"}
    runs = site.api("flow_runs/filter", wanted)
    return [run for run in runs if run["auto_scheduled"] and run["parameters"]["dest"] == str(dest)]


def test_by_hand_over_s3(site: Site, case: Case, s3_bucket: str, s3_client: Any) -> None:
    source = upload(s3_client, case.images, f"{s3_bucket}/photos")
    dest = f"{s3_bucket}/masks"
    settings = SETTINGS | {"shard_size": 25}
    options = [f"-p{name}={json.dumps(value)}" for name, value in settings.items()]
    said = site.prefect(
        "deployment", "run", "segment-corpus/adhoc", "-p", f"source={source}", "-p", f"dest={dest}",
        "-p", f"model={case.model}", *options, "--watch",
    )  # fmt: skip
    assert "Completed" in said
    assert terminal_rows(dest) == case.calm
    run_id = said.partition("UUID: ")[2].split()[0]
    shown = site.artifacts(run_id)
    assert set(shown) == {"segment-plan", "segment-progress", "segment-counts", "segment-errors", "segment-sheet"}
    counts = {row["figure"]: row["value"] for row in json.loads(shown["segment-counts"]["data"])}
    assert counts["rows ok"] == str(IMAGES) and counts["rows with errors"] == "0"
    assert shown["segment-progress"]["data"] == 100.0
    assert shown["segment-sheet"]["data"].startswith("data:image/png;base64,")
    wait_until(lambda: finished(site, dest) != [], what="the event", poll_s=0.2)
    (event,) = finished(site, dest)
    assert event["payload"]["ok"] == IMAGES
    secret = site.environment["AWS_SECRET_ACCESS_KEY"].encode()
    for path in site.folder.rglob("*"):  # the server's database, what it and the worker log, scratch
        if path.is_file() and secret in path.read_bytes():
            # Prefect's own way to hand a run its environment.
            assert path.parent.name.startswith("prefect-workspace-attempt-"), path
            assert path.parent.stat().st_mode & 0o077 == 0
    assert f"prefect.flow-run.{run_id}" in {one["prefect.resource.id"] for one in event["related"]}


@pytest.mark.parametrize("setting", ["batch_size=0", "engine=dask", "max_error_rate=2", "max_pixels=many"])
def test_a_bad_parameter_is_refused_with_its_name(site: Site, case: Case, tmp_path: Path, setting: str) -> None:
    name, _, value = setting.partition("=")
    wrong = {name: int(value) if value.isdigit() else value}
    with pytest.raises(urllib.error.HTTPError) as refusal:
        site.begin("adhoc", source=str(case.images), dest=str(tmp_path / "out"), model=str(case.model), **wrong)
    assert refusal.value.code == 409
    assert name in refusal.value.read().decode()


@pytest.mark.timeout(420)
def test_cancelled_then_killed_then_done(site: Site, case: Case, tmp_path: Path) -> None:
    """Each run continues what the one before it left; at the end there is one row for each image.

    The first was due days ago: that is the night that all of its rows file under, whoever writes them.
    """
    dest = tmp_path / "out"
    settings = {"source": str(case.images), "dest": str(dest), "model": str(case.model)} | SETTINGS

    with site.paced():
        first = site.begin("adhoc", due="2026-10-31T23:30:00Z", **settings)
        wait_until(lambda: part_count(dest) >= 3, what="three Parts")
        site.cancel(first)
        assert site.end_of(first)[0] == "CANCELLED"
        kept = part_count(dest)
        assert 3 <= kept < IMAGES, "the run was to be cancelled in the middle"

        second = site.begin("adhoc", **settings)
        wait_until(lambda: part_count(dest) >= kept + 3, what="three more Parts")
        site.process_of(second).kill()
        state, message = site.end_of(second)
        assert state == "CRASHED" and "SIGKILL" in message
        assert kept + 3 <= part_count(dest) < IMAGES, "the run was to be killed in the middle"

    third = site.begin("adhoc", **settings)
    assert site.end_of(third)[0] == "COMPLETED"
    assert terminal_rows(dest) == case.calm
    (folder,) = dest.glob("segments/*/*/*/")
    assert folder.name == "date=2026-10-31"
    assert any(line.startswith("continuing run") for line in site.logs(third))
    wait_until(lambda: not site.left_over(), timeout_s=60, what=f"the end of {site.left_over()}", poll_s=0.5)


@pytest.mark.timeout(420)
def test_the_nightly_fires(site: Site, case: Case, nightly: Path) -> None:
    """Last, as its minute comes meanwhile."""
    wait_until(lambda: scheduled(site, nightly) != [], what="the scheduler's first run", poll_s=0.5)
    first, *later = scheduled(site, nightly)
    assert all(run["state_type"] == "SCHEDULED" for run in later)
    assert site.end_of(first["id"], timeout_s=240)[0] == "COMPLETED"
    assert terminal_rows(nightly) == case.calm
    (folder,) = nightly.glob("segments/*/*/*/")
    assert folder.name == f"date={first['expected_start_time'][:10]}"
