"""Reaching a Ray cluster, or not, and the same answers there as without it. What happens when actors die is in
test_kills."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import psutil
import pytest
from awkward_corpus import make_awkward_corpus
from handmade import answers_of
from harness import SHAPE, write_images, write_tiny_model

import pipeline
from pipeline.errors import InfrastructureError, UsageError


@pytest.mark.ray
def test_an_address_where_nobody_answers_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # taken, and nobody listens
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InfrastructureError, match=f"no Ray cluster at '{address}'"):
            pipeline.segment(
                source=str(write_images(tmp_path / "images", 1)),
                dest=str(tmp_path / "out"),
                model=str(write_tiny_model(tmp_path / "tiny.safetensors")),
                ray_address=address,
                precision="fp32",
            )
    assert not (tmp_path / "out" / "runs").exists()


def test_memory_cannot_be_seen_by_actors(tmp_path: Path) -> None:
    import fsspec

    image = next(write_images(tmp_path / "images", 1).iterdir())
    fsspec.filesystem("memory").pipe(f"/photos-for-ray/{image.name}", image.read_bytes())
    with pytest.raises(UsageError, match="memory://"):
        pipeline.segment(
            source="memory://photos-for-ray",
            dest=str(tmp_path / "out"),
            model=str(write_tiny_model(tmp_path / "tiny.safetensors")),
            engine="ray",
            precision="fp32",
        )


@pytest.mark.ray
def test_ray_and_local_processes_give_the_same_answers_bit_for_bit(tmp_path: Path) -> None:
    """Over images and names of every awkward kind, cut into other shards, and so with other neighbours in each
    batch."""
    expected = make_awkward_corpus(tmp_path / "awkward")
    model = write_tiny_model(tmp_path / "tiny.safetensors", task="instance")
    answers, listening = {}, set[str]()
    for engine, shard_size in (("local", 7), ("ray", 5)):
        outcome = pipeline.segment(
            source=str(tmp_path / "awkward"), dest=str(tmp_path / engine), model=str(model), engine=engine,
            actors=1, shard_size=shard_size, max_pixels=100_000_000, max_error_rate=1.0, **SHAPE,
            listen=lambda _: listening.update(listening_addresses()),
        )  # fmt: skip
        assert outcome.engine == {"local": "local processes", "ray": "Ray"}[engine]
        answers[engine] = answers_of(tmp_path / engine)
    ok = sum(one.outcome == "ok" for one in expected.values())
    assert len(answers["local"]) == len(expected)
    assert sum(status == "ok" for status, *_ in answers["local"].values()) == ok
    assert answers["ray"] == answers["local"]
    # Of Ray's processes, on a cluster that the run has started for itself.
    assert listening == {"127.0.0.1"}


def listening_addresses() -> set[str]:
    """Where this process and those below it listen."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("inet")
            found |= {one.laddr.ip.rpartition(":")[2] for one in sockets if one.status == psutil.CONN_LISTEN}
    return found
