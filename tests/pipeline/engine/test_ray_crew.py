"""Reaching a Ray cluster, or not. What actors do on one is in test_kills."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from harness import write_images, write_tiny_model

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
