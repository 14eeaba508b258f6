"""The event `maskmill.model.promoted`, for every promotion in a registry's history. Owns: which of them the server was
told of. Must not know: why a model was promoted.

The history remembers what was promoted, a Prefect variable how far of it was told; so a kill between the two, or a
server that is away, makes the event late and does not lose it.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import httpx
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.events.filters import EventFilter, EventIDFilter, EventOccurredFilter
from prefect.exceptions import PrefectException
from prefect.variables import Variable

import pipeline
from pipeline.learning.promotion import promotion_of
from pipeline.registry import Entry
from pipeline.storage import normalize_uri

_ARRIVAL_TIMEOUT_S = 20.0
_POLL_S = 0.2


def announce_promotions(name: str, registry: str, logger: Any, *, profile: str | None = None) -> int:
    """Tells the server of the promotions of `name` that it has not heard of, the oldest first, and returns how many.

    The first call for a registry tells nothing: it notes where its history ends. From then on each promotion, a
    person's too, is told at least once, and under an id that is always the same. Raises no error of the server: what
    could not be told is told by the next call.
    """
    entries = pipeline.model_history(name, registry, profile=profile)
    try:
        return _announce(name, _variable(name, registry), entries)
    except (httpx.HTTPError, PrefectException, RuntimeError, TimeoutError) as error:
        logger.warning("promotions of %s could not be told, the next run tells them: %s", name, error)
        return 0


def _announce(name: str, variable: str, entries: list[Entry]) -> int:
    told, last = Variable.get(variable), entries[-1].number if entries else 0
    if not isinstance(told, int) or told > last:  # greater where a damaged entry was deleted
        Variable.set(variable, last, overwrite=True)
        return 0
    number = 0
    for entry in entries:
        if entry.number <= told:
            continue
        if entry.action == "promote":
            _tell(name, entry)
            number += 1
        Variable.set(variable, entry.number, overwrite=True)
    return number


def _tell(name: str, entry: Entry) -> None:
    """Returns when the server has the event. Raises TimeoutError."""
    event_id = uuid5(NAMESPACE_URL, f"maskmill:promotion:{name}:{entry.id}")
    if _has_arrived(event_id, entry):
        return
    done = promotion_of(name, entry)
    emit_event(
        "maskmill.model.promoted",
        resource={"prefect.resource.id": f"maskmill.model.{name}", "prefect.resource.name": name},
        occurred=entry.at,
        payload=done.model_dump(mode="json") | {"text": f"{name} {done.version} is the champion: {done.why}"},
        id=event_id,
    )
    deadline_s = time.monotonic() + _ARRIVAL_TIMEOUT_S
    while not _has_arrived(event_id, entry):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the server has no event {event_id}, {_ARRIVAL_TIMEOUT_S:.0f} s after it was sent")
        time.sleep(_POLL_S)


def _has_arrived(event_id: UUID, entry: Entry) -> bool:
    when = EventOccurredFilter(since=entry.at, until=entry.at)
    with get_client(sync_client=True) as client:
        found = client.read_events(filter=EventFilter(id=EventIDFilter(id=[event_id]), occurred=when), limit=1)
    return bool(found.events)


def _variable(name: str, registry: str) -> str:
    digest = hashlib.blake2b(f"{normalize_uri(registry)} {name}".encode(), digest_size=6).hexdigest()
    return f"maskmill_promotions_{name.replace('-', '_')}_{digest}"
