from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.engine.crew import Host, InlineMember, LocalCrew, ProcessMember, WorkerDiedError
from pipeline.engine.messages import StreamConfig, WorkerSpec, code_digest

PATIENCE_S = 120


@pytest.fixture
def member() -> Iterator[ProcessMember]:
    member = ProcessMember()
    yield member
    member.stop()


def spec(dest: Path) -> WorkerSpec:
    return WorkerSpec(
        code_digest=code_digest(), dest=f"file://{dest}", create_only=True, source_profile=None, dest_profile=None,
        model_name="tiny", model_version="0", settings_digest="0", run_id="r", card_settings={}, compile=False,
        precision="fp32", threads=1, stream=StreamConfig(batch_size=1),
    )  # fmt: skip


def frozen_objects(member: ProcessMember) -> int:
    assert member.call("ask", gc.isenabled).result(PATIENCE_S)
    frozen: int = member.call("ask", gc.get_freeze_count).result(PATIENCE_S)
    return frozen


def test_a_worker_looks_for_garbage_in_nothing_that_it_started_with(
    member: ProcessMember, tmp_path: Path, semantic_model: Path
) -> None:
    assert frozen_objects(member) == 0
    member.call("describe").result(PATIENCE_S)
    described = frozen_objects(member)
    assert described > 100_000  # PyTorch's
    model = semantic_model.read_bytes()
    member.call("load", spec(tmp_path), model).result(PATIENCE_S)
    loaded = frozen_objects(member)
    assert loaded > described
    member.call("load", spec(tmp_path), model).result(PATIENCE_S)
    # The first model is garbage now, and what is frozen is never collected; its plain objects are gone at once.
    assert frozen_objects(member) <= loaded


def test_a_worker_in_somebodys_own_process_leaves_the_garbage_to_him(tmp_path: Path, semantic_model: Path) -> None:
    before = gc.get_freeze_count()
    member = InlineMember(Host())
    member.call("describe").result(PATIENCE_S)
    member.call("load", spec(tmp_path), semantic_model.read_bytes()).result(PATIENCE_S)
    member.stop()
    assert (gc.get_freeze_count(), gc.isenabled()) == (before, True)


def test_a_worker_takes_arrows_memory_from_the_system(member: ProcessMember) -> None:
    pool = "__import__('pyarrow').default_memory_pool().backend_name"
    assert member.call("ask", eval, pool).result(PATIENCE_S) == "system"
    before = pa.default_memory_pool().backend_name
    InlineMember(Host()).stop()
    assert pa.default_memory_pool().backend_name == before


def test_a_workers_death_is_told_to_all_who_wait(member: ProcessMember) -> None:
    assert member.call("ask", os.getpid).result(PATIENCE_S) == member.pid
    waiting = member.call("ask", signal.pause)
    os.kill(member.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match="signal SIGKILL"):
        waiting.result(PATIENCE_S)
    with pytest.raises(WorkerDiedError, match="is gone"):
        member.call("describe").result(PATIENCE_S)


def test_workers_are_gone_when_their_crew_is_closed() -> None:
    crew = LocalCrew(actors=3)
    members = [crew.start() for _ in range(3)]
    waiting = [member.call("ask", signal.pause) for member in members]
    members[0].stop()
    crew.close()
    for member, future in zip(members, waiting, strict=True):
        assert not Path(f"/proc/{member.pid}").exists()
        with pytest.raises(WorkerDiedError, match=r"SIGKILL|is gone"):
            future.result(PATIENCE_S)
