"""What the Prefect server does by itself: `python -m flows.automations`. Owns: the automations and the block that they
notify through. Must not know: flows, runs.

Those about flow runs look at runs with the tag `maskmill` only, as infra/prefect.yaml gives it.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import cast
from uuid import UUID

import httpx
from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture, ResourceSpecification
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL

_TAG = "maskmill"
_BLOCK = "maskmill-notify"
#: Three heartbeats of 30 s, the least that Prefect knows.
_SILENCE = timedelta(seconds=90)
_ENDS = ("Completed", "Failed", "Crashed", "TimedOut", "Cancelled")
_BODY = """{{ flow.name }} / {{ flow_run.name }}: {{ flow_run.state.name }}
{{ flow_run.state.message }}
{{ flow_run|ui_url }}"""


def zombies() -> Automation:
    """A run that falls silent has died with its machine or its worker: nobody else would ever say so, and it would hold
    its deployment's slot for good."""
    return Automation(
        name="maskmill: runs without heartbeats have crashed",
        description="Frees the slot of a run whose process is gone. The next run continues its work.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in _ENDS)},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_SILENCE,
            **_ours(),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {_SILENCE.seconds} s: its process is gone. The next run continues its work.",
            )
        ],
    )


def failures(block_id: UUID) -> Automation:
    """Tells people of every run that failed or crashed."""
    return Automation(
        name="maskmill: failed and crashed runs are told",
        description="Sends the state's message to the block maskmill-notify.",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{end}" for end in ("Failed", "Crashed", "TimedOut")},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            **_ours(),
        ),
        actions=[SendNotification(block_document_id=block_id, subject="Maskmill", body=_BODY)],
    )


def drifts(block_id: UUID) -> Automation:
    """Tells people of every run whose images or masks are unlike those of the runs before it."""
    return Automation(
        name="maskmill: drift is told",
        description="Sends what has drifted to the block maskmill-notify.",
        trigger=EventTrigger(
            expect={"maskmill.drift"},
            match=ResourceSpecification({"prefect.resource.id": "maskmill.run.*"}),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block_id,
                subject="Maskmill: drift",
                body="{{ event.payload.text }} ({{ event.payload.dest }})",
            )
        ],
    )


def create(notify_url: str | None) -> list[str]:
    """Creates or updates the automations, and returns their names. Without `notify_url` nobody is told of anything."""
    wanted = [zombies()]
    if notify_url:
        block_id = _save_block(notify_url)
        wanted += [failures(block_id), drifts(block_id)]
    for automation in wanted:
        try:
            automation.id = cast(Automation, Automation.read(name=automation.name)).id
        except ValueError:
            automation.create()
        else:
            automation.update()
    return [automation.name for automation in wanted]


def main() -> None:
    """The command. Exit status 1 where the server is away, 2 where none is named."""
    if not PREFECT_API_URL.value():
        print("error: PREFECT_API_URL is not set: set it to the server's, http://HOST:PORT/api", file=sys.stderr)
        sys.exit(2)
    try:
        names = create(os.environ.get("MASKMILL_NOTIFY_URL") or None)
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        print(f"failed: the Prefect server at {PREFECT_API_URL.value()} does not answer: {error}", file=sys.stderr)
        sys.exit(1)
    for name in names:
        print(name)
    if len(names) == 1:
        print("MASKMILL_NOTIFY_URL is not set: nobody is told of failures or drift")


def _ours() -> dict[str, ResourceSpecification]:
    return {
        "match": ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        "match_related": ResourceSpecification(
            {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{_TAG}"}
        ),
    }


def _save_block(notify_url: str) -> UUID:
    """A webhook that gets `{"text": …}`, as Slack, Mattermost and Teams take it. The URL is stored as a secret."""
    block = CustomWebhookNotificationBlock(
        name="maskmill", url="{{address}}", json_data={"text": "{{subject}}: {{body}}"}, secrets={"address": notify_url}
    )
    return cast(UUID, block.save(_BLOCK, overwrite=True))


if __name__ == "__main__":
    main()
