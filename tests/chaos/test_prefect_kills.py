"""kill -9 of whatever a flow run needs: its worker, the server, a Ray node, worker and flow together. The data is safe,
the run ends by itself or is found out, the next one leaves one row per image, and no process stays behind.

What `make test` has of this (a run that is cancelled, a flow process that is killed) is in tests/flows.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SHAPE, Case, actors_on, kill_all, own_processes, part_count, terminal_rows, wait_until
from prefect_site import FINAL, Site, client_of, site, stop
from ray_site import RaySite, ray_site

__all__ = ["ray_site", "site"]
pytestmark = [pytest.mark.slow, pytest.mark.prefect]

IMAGES = 60
SETTINGS: dict[str, Any] = {"engine": "local", "actors": 1, "shard_size": 1, "lease_ttl_s": 4} | SHAPE


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES)


@pytest.fixture(autouse=True)
def paced(site: Site) -> Iterator[None]:
    with site.paced():
        yield


def asked(case: Case, dest: Path) -> dict[str, Any]:
    return {"source": str(case.images), "dest": str(dest), "model": str(case.model)} | SETTINGS


def under_way(site: Site, case: Case, dest: Path, **changes: Any) -> str:
    """A run of the ad hoc deployment in the middle of its work."""
    run_id = site.begin("adhoc", **asked(case, dest) | changes)
    before = part_count(dest)
    begun_s = time.monotonic()
    while part_count(dest) < before + 3:
        assert site.state(run_id)[0] not in FINAL and time.monotonic() < begun_s + 400, "\n".join(site.logs(run_id))
        time.sleep(0.1)
    return run_id


def nothing_left(site: Site) -> None:
    wait_until(lambda: not site.left_over(), timeout_s=60, what=f"the end of {site.left_over()}", poll_s=0.5)


def finishes(site: Site, case: Case, dest: Path, **changes: Any) -> None:
    """The next run completes, with one terminal row for each image."""
    assert site.end_of(site.begin("adhoc", **asked(case, dest) | changes), timeout_s=400)[0] == "COMPLETED"
    assert terminal_rows(dest) == case.calm
    nothing_left(site)


@pytest.mark.timeout(900)
def test_kill_the_server(site: Site, case: Case, tmp_path: Path) -> None:
    """The flow goes on without it, commits what it has, and ends by itself."""
    dest = tmp_path / "out"
    run_id = under_way(site, case, dest)
    flow = site.process_of(run_id)
    assert site.server is not None
    stop(site.server)
    killed_at = part_count(dest)
    assert killed_at < IMAGES
    try:
        flow.wait(timeout=600)
        assert part_count(dest) == IMAGES, "the work needs no server"
        assert terminal_rows(dest) == case.calm
    finally:
        site.start_server()
    if site.state(run_id)[0] not in {"COMPLETED", "CRASHED", "FAILED"}:
        site.api(f"flow_runs/{run_id}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    finishes(site, case, dest)


@pytest.mark.timeout(900)
def test_kill_worker_and_flow_together(site: Site, case: Case, tmp_path: Path) -> None:
    """As a machine that dies: only the missing heartbeats tell, and the automation frees the deployment's slot."""
    from flows.automations import create

    with client_of(site):
        create(None)
    dest = tmp_path / "out"
    run_id = under_way(site, case, dest)
    flow = site.process_of(run_id)
    family = [flow, *flow.children(recursive=True)]
    assert site.worker is not None
    stop(site.worker)
    kill_all(family)
    assert part_count(dest) < IMAGES
    assert site.state(run_id)[0] == "RUNNING", "nobody has told the server"
    nothing_left(site)
    site.start_worker()
    state, message = site.end_of(run_id, timeout_s=240)
    assert state == "CRASHED" and "heartbeat" in message
    finishes(site, case, dest)


@pytest.mark.timeout(600)
def test_kill_the_worker(site: Site, case: Case, tmp_path: Path) -> None:
    """Whether its flow goes on or dies with it: nothing is lost, and it does not outlast its work."""
    dest = tmp_path / "out"
    run_id = under_way(site, case, dest)
    flow = site.process_of(run_id)
    assert site.worker is not None
    stop(site.worker)
    assert part_count(dest) < IMAGES
    flow.wait(timeout=300)
    site.start_worker()
    if site.state(run_id)[0] not in {"COMPLETED", "CRASHED", "FAILED"}:
        site.api(f"flow_runs/{run_id}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    finishes(site, case, dest)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_cancel_and_kill_with_ray_in_the_flows_process(site: Site, case: Case, tmp_path: Path) -> None:
    """A cluster that the flow itself has started ends with it, however that ends."""
    dest = tmp_path / "out"
    run_id = under_way(site, case, dest, engine="ray")
    site.cancel(run_id)
    assert site.end_of(run_id)[0] == "CANCELLED"
    kept = part_count(dest)
    assert 3 <= kept < IMAGES
    assert not list(dest.glob("runs/*/lease.json")), "it was drained, not killed"
    nothing_left(site)
    run_id = under_way(site, case, dest, engine="ray")
    site.process_of(run_id).kill()
    assert site.end_of(run_id)[0] == "CRASHED"
    assert kept + 3 <= part_count(dest) < IMAGES
    nothing_left(site)
    finishes(site, case, dest)


@pytest.mark.timeout(600)
def test_two_nights_do_not_overlap(site: Site, case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    first = site.begin("nightly", **asked(case, dest))
    wait_until(lambda: part_count(dest) >= 3, what="three Parts", poll_s=0.05)
    second = site.begin("nightly", **asked(case, dest))
    assert site.end_of(second)[0] == "CANCELLED"
    assert site.state(first)[0] == "RUNNING"
    assert site.end_of(first, timeout_s=400)[0] == "COMPLETED"
    assert terminal_rows(dest) == case.calm


@pytest.fixture
def two_nodes(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any], str]]:
    """The address of a Ray cluster; its two nodes with a pretend GPU each, beside a head without any; their mark."""
    import ray
    from ray.cluster_utils import Cluster

    for name in ("PYTHONPATH", "MASKMILL_TEST_PACE"):
        monkeypatch.setenv(name, site.environment[name])
    with own_processes() as mark:
        head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster.address, [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)], mark
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_kill_a_ray_node(site: Site, case: Case, tmp_path: Path, two_nodes: tuple[str, list[Any], str]) -> None:
    """The run goes on with the other node, and completes."""
    address, nodes, mark = two_nodes
    dest = tmp_path / "out"
    changes = {"engine": "ray", "ray_address": address, "actors": 2, "shared_filesystem": True}
    run_id = under_way(site, case, dest, **changes)
    wait_until(lambda: all(actors_on(node, mark) for node in nodes), what="an actor on each node", poll_s=0.1)
    (raylet,) = nodes[0].all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGKILL)
    assert part_count(dest) < IMAGES
    assert site.end_of(run_id, timeout_s=400)[0] == "COMPLETED"
    assert terminal_rows(dest) == case.calm
    wait_until(lambda: any("a worker is gone" in line for line in site.logs(run_id)), what="its log", poll_s=0.5)
    nothing_left(site)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_cancel_and_kill_a_flow_that_follows_a_job(
    site: Site, case: Case, tmp_path: Path, ray_site: RaySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled, its job ends with it, drained; killed, the job goes on, and the next flow run follows that one."""
    for name, value in ray_site.access.items():
        monkeypatch.setenv(name, value)
    dest = tmp_path / "out"
    changes = {
        "environment": ray_site.access, "engine": "auto", "ray_jobs_address": ray_site.jobs_address,
        "shared_filesystem": True,
    }  # fmt: skip
    with ray_site.paced():
        run_id = under_way(site, case, dest, **changes)
        assert list(jobs(ray_site, dest).values()) == ["RUNNING"]
        site.cancel(run_id)
        assert site.end_of(run_id)[0] == "CANCELLED"
        wait_until(
            lambda: "RUNNING" not in jobs(ray_site, dest).values(), timeout_s=30, what="the job's end", poll_s=0.2
        )
        kept = part_count(dest)
        assert 3 <= kept < IMAGES
        assert not list(dest.glob("runs/*/lease.json")), "it was drained, not killed"
        nothing_left(site)

        run_id = under_way(site, case, dest, **changes)
        site.process_of(run_id).kill()
        assert site.end_of(run_id)[0] == "CRASHED"
        assert kept + 3 <= part_count(dest) < IMAGES
        assert list(jobs(ray_site, dest).values()).count("RUNNING") == 1, "nobody has told it to stop"
        run_id = site.begin("adhoc", **asked(case, dest) | changes)
        wait_until(
            lambda: any("following the running job" in line for line in site.logs(run_id)), what="its log", poll_s=0.5
        )
    assert site.end_of(run_id, timeout_s=400)[0] == "COMPLETED"
    assert terminal_rows(dest) == case.calm
    assert len(jobs(ray_site, dest)) == 2
    nothing_left(site)


def jobs(ray_site: RaySite, dest: Path) -> dict[str, str]:
    """Status of each job that writes to `dest`, by name."""
    from ray.job_submission import JobSubmissionClient

    found = JobSubmissionClient(ray_site.jobs_address).list_jobs()
    return {
        str(job.submission_id): str(job.status.value) for job in found if (job.metadata or {}).get("dest") == str(dest)
    }
