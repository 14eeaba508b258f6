"""The server's automations: made once however often, and telling people of a run that failed."""

from __future__ import annotations

import json
import queue
from pathlib import Path

import cv2
import numpy as np
import pytest
from harness import SHAPE, in_process, write_tiny_model
from prefect_site import Site, client_of

pytest.importorskip("prefect")

from prefect import tags
from prefect.automations import Automation

from flows.automations import create
from flows.segment_corpus import segment_corpus
from pipeline.errors import ModelError

pytestmark = pytest.mark.prefect


def test_they_are_made_once_and_tell_of_failure_and_drift(
    site: Site, hook: tuple[str, queue.Queue[str]], tmp_path: Path
) -> None:
    url, said = hook
    with client_of(site):
        assert create(url) == create(url)
        with pytest.raises(ModelError), tags("maskmill"):
            segment_corpus(source=str(tmp_path), dest=str(tmp_path / "out"), model="nobody")
        text = said.get(timeout=60)
        assert "Failed" in text and "no model is called 'nobody'" in text
        settings = {"model": str(write_tiny_model(tmp_path / "tiny.safetensors")), "engine": "local"}
        settings |= {"dest": str(tmp_path / "out"), "shard_size": 60} | SHAPE
        with in_process():
            for name in ("bright", "dark"):
                segment_corpus.fn(
                    source=str(write_evenly(tmp_path / name, 255 if name == "bright" else 40)), **settings
                )
        text = said.get(timeout=60)
        while "'nobody'" in text:  # a server may tell twice of what happens right after an automation was updated
            text = said.get(timeout=60)
        assert "drift" in text and "brightness 0." in text and str(tmp_path / "out") in text
        made = sorted(one["name"] for one in site.api("automations/filter", {}))
        for name in made:  # each costs the server a write per event: too much for the tests that follow
            Automation.read(name=name).delete()
    assert made == [
        "maskmill: drift is told",
        "maskmill: failed and crashed runs are told",
        "maskmill: runs without heartbeats have crashed",
    ]
    (block,) = site.api("block_documents/filter", {"block_documents": {"name": {"any_": ["maskmill-notify"]}}})
    assert url not in json.dumps(block), "the address is a secret"


def write_evenly(folder: Path, light: int) -> Path:
    """Images enough to compare, none brighter than `light`."""
    generator = np.random.default_rng(light)
    folder.mkdir()
    for number in range(60):
        pixels = generator.integers(light // 2, light, (32, 32, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.png"), pixels)
    return folder
