"""What a peer is told, and how it says that it is done. Owns: the job. Must not know: what is done to an image, whose
libraries take longer to come than a driver, which does nothing to any, should wait.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Job(BaseModel):
    """What to do, and how much of the machine it may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: A folder, or `s3://bucket/prefix`; the store's address and keys are in the environment.
    source: str
    #: An empty folder.
    dest: str
    #: A model file.
    model: str
    #: The model is a stand-in that sleeps so long; None: the network in the file.
    sleeps_s: float | None
    batch_size: int
    precision: str
    cores: int
    #: Copies of the model. A stand-in is one device; a network on the CPU has a copy of one thread for each core,
    #: or one copy with as many threads where an engine has no workers.
    copies: int
    #: Reads in flight that hide a store's latency.
    reads: int

    @property
    def is_remote(self) -> bool:
        return self.source.startswith("s3://")


def given_job() -> Job:
    """The job that this process was started with."""
    return Job.model_validate_json(Path(sys.argv[1]).read_text())


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Says when the work ended: what follows is only the end of the process."""
    yield
    print(f"ended {time.time():.6f}", flush=True)
