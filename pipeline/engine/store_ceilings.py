"""What a store gives at most. Owns: timing its listing and its reads, on a sample of somebody's own images, and the
processes in which anything is measured.
Must not know: models, masks, how a ceiling is used or shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import duckdb
import numpy as np

from pipeline.config import DEFAULT_SUFFIXES
from pipeline.corpus.manifest import Corpus, read_source
from pipeline.engine.crew import ProcessMember, WorkerDiedError, stop_all
from pipeline.engine.limits import StoreCeiling
from pipeline.errors import ExpiredCredentialsError, InfrastructureError, StorageError, UsageError
from pipeline.machine import cores
from pipeline.storage import Blob, open_storage, recorded_uri, store_root, uri_scheme

_T = TypeVar("_T")
_SAMPLE_IMAGES = 64
_GETS_AT_ONCE = 32
_MOST_S = 3600


class Turn(NamedTuple, Generic[_T]):
    """What a call took on average, and what it gave at last."""

    seconds: float
    cpu_s: float
    result: _T


class Read(NamedTuple):
    """What reading came to in one process."""

    gets_per_s: float
    mean_bytes: float
    core_ms_per_get: float


def rate(action: Callable[[], _T], seconds: float) -> Turn[_T]:
    """About `seconds` of calls, after one that warms up."""
    result = action()
    began_s, began_cpu_s, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - began_s < seconds:
        result = action()
        calls += 1
    return Turn((time.perf_counter() - began_s) / calls, (time.process_time() - began_cpu_s) / calls, result)


def in_processes(count: int, function: Callable[..., _T], *args: Any) -> list[_T]:
    """What `function`, of a module that any process can import, answers in each of `count` of them at the same time.

    They are started as workers are: what multiprocessing spawns would run the caller's own script again. Raises what
    the first to fail raises, InfrastructureError where a process dies.
    """
    members: list[ProcessMember] = []
    try:
        for _ in range(count):
            members.append(ProcessMember())
        answers = [member.call("ask", function, *args) for member in members]
        for answer in as_completed(answers):
            answer.result()
        return [answer.result() for answer in answers]
    except WorkerDiedError as error:
        raise InfrastructureError(
            f"one of {count} measuring processes died ({error}): see that they have the memory, and measure again"
        ) from error
    finally:
        stop_all(members)


def measure_store(
    source: str,
    *,
    scratch: Path,
    seconds: float = 3.0,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    profile: str | None = None,
) -> dict[str, StoreCeiling]:
    """As `measure`, of the store alone: for one more store beside those of `Ceilings.stores`."""
    check_seconds(seconds)
    corpus, listed_per_s = listing_of(source, scratch, seconds, suffixes, profile)
    uris = sample_of(corpus)
    found = in_processes(cores(), _read_here, uris, seconds, profile)
    return {store_root(uris[0]): ceiling_of(found, listed_per_s)}


def check_seconds(seconds: float) -> None:
    """Raises UsageError for a time that no stage can be measured for."""
    if not 0 < seconds <= _MOST_S:
        raise UsageError(f"--seconds is {seconds:g}: give a number above 0, and {_MOST_S:,} at most")


def _read_here(uris: Sequence[str], seconds: float, profile: str | None) -> Read:
    return read_all(uris, seconds, profile)[0]


def listing_of(
    source: str, scratch: Path, seconds: float, suffixes: Sequence[str], profile: str | None
) -> tuple[Corpus, float | None]:
    """SOURCE, and how many objects a second its listing gave; None where it is no listing.

    A short one is done again for `seconds`: the first is mostly what a process pays once.
    """
    began_s = time.perf_counter()
    corpus = read_source(source, scratch=scratch, suffixes=suffixes, profile=profile)
    best_s = time.perf_counter() - began_s
    again = scratch / "again"
    while corpus.full_listing and time.perf_counter() - began_s < seconds:
        again.mkdir(parents=True, exist_ok=True)
        once_s = time.perf_counter()
        read_source(source, scratch=again, suffixes=suffixes, profile=profile)
        best_s = min(best_s, time.perf_counter() - once_s)
    return corpus, corpus.rows / best_s if corpus.full_listing else None


def sample_of(corpus: Corpus) -> list[str]:
    """Images from all over the corpus, of one store. Raises InfrastructureError where an inventory that is read in
    place is gone meanwhile."""
    step = max(1, corpus.rows // _SAMPLE_IMAGES)
    found: list[str] = []
    at = 0
    try:
        with duckdb.connect() as connection:
            for batch in connection.sql(f"SELECT uri FROM {corpus.sql}").to_arrow_reader():
                rows = range(-at % step, batch.num_rows, step)
                found += batch.column("uri").take(np.array(list(rows), np.int64)).to_pylist()
                at += batch.num_rows
    except duckdb.Error as error:
        why = str(error).strip().partition("\n")[0]
        raise InfrastructureError(f"{recorded_uri(corpus.source)} could not be read: {why}") from error
    return [uri for uri in found if store_root(uri) == store_root(found[0])][:_SAMPLE_IMAGES]


def read_all(uris: Sequence[str], seconds: float, profile: str | None) -> tuple[Read, list[Blob]]:
    """Reads all of `uris` that can be read, as many at once as a run does. Raises UsageError where none is there or may
    be read, StorageError where the store fails."""
    storage = open_storage(uris[0], profile=profile)
    left = list(uris)

    def get(uri: str) -> Blob | StorageError:
        try:
            return storage.get(uri)
        except ExpiredCredentialsError:  # says nothing of this image
            raise
        except StorageError as error:
            return error

    def get_all() -> list[Blob]:
        got = list(pool.map(get, left))
        # Asked for once: what cannot be read would cost each turn its time.
        left[:] = [uri for uri, one in zip(left, got, strict=True) if isinstance(one, Blob)]
        for one in got if not left else ():
            if isinstance(one, StorageError):
                raise one.told(f"no image of the sample can be read: {one}")
        return [one for one in got if isinstance(one, Blob)]

    with ThreadPoolExecutor(1 if uri_scheme(uris[0]) == "file" else _GETS_AT_ONCE) as pool:
        got = rate(get_all, seconds)
    count, mean_bytes = len(got.result), statistics.mean(len(blob.data) for blob in got.result)
    return Read(count / got.seconds, mean_bytes, got.cpu_s / count * 1e3), got.result


def ceiling_of(found: Sequence[Read], listed_per_s: float | None) -> StoreCeiling:
    return StoreCeiling(
        gets_per_s=sum(one.gets_per_s for one in found),
        mean_bytes=found[0].mean_bytes,
        core_ms_per_get=statistics.mean(one.core_ms_per_get for one in found),
        listed_per_s=listed_per_s,
    )
