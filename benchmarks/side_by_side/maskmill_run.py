"""Maskmill itself: one `pipeline.segment`, with all that it does besides (a frozen list, a lease, committed Parts,
reconciliation), but for the report, which no peer makes.

A stand-in is put in the network's place by `worker/sitecustomize.py`, which its worker processes alone look at.
"""

from __future__ import annotations

import os
from pathlib import Path

from job import given_job, timed

import pipeline


def main() -> None:
    job = given_job()
    if job.sleeps_s is not None:
        hook = Path(__file__).parent / "worker"
        os.environ["PYTHONPATH"] = os.pathsep.join((str(hook), os.environ.get("PYTHONPATH", "")))
        os.environ["MASKMILL_STAND_IN_SLEEPS_S"] = str(job.sleeps_s)
    pipeline.segment(
        source=job.source,
        dest=job.dest,
        model=job.model,
        engine="local",
        actors=job.copies,
        batch_size=job.batch_size,
        precision=job.precision,
        report=False,
    )


if __name__ == "__main__":
    with timed():
        main()
