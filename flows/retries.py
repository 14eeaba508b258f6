"""What a task tries again. Owns: which failures may have passed meanwhile. Must not know: what the task does."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from pipeline.errors import InfrastructureError, ReconciliationError, StoppedError, SupersededError


def worth_another_try(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether it was the world that failed, which may have passed meanwhile. A retry continues what was begun."""
    from pipeline.learning.loop import TrainingError

    error = state.result(raise_on_failure=False)
    hopeless = (ReconciliationError, StoppedError, SupersededError, TrainingError)
    return isinstance(error, InfrastructureError) and not isinstance(error, hopeless)
