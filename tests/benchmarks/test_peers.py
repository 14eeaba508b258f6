"""The comparison with peers is one only if all do the same work: a few images, good and broken, through each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    """The script, which finds the steps beside it."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import peers

    yield peers
    sys.path[:] = before


class Bench:
    """Seven photos and seven files that are none, and what each engine makes of them."""

    def __init__(self, peers: Any, folder: Path) -> None:
        self._peers = peers
        self._folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        peers.corpora.write_half_broken(self.images, 7)
        peers.write_model_file(folder / "model.safetensors")

    def rows(self, name: str) -> dict[str, dict[str, Any]]:
        dest = self._folder / name
        job = self._peers.Job(
            source=str(self.images), dest=str(dest), model=str(self._folder / "model.safetensors"), sleeps_s=0.0,
            batch_size=4, precision="fp32", cores=2, copies=1, reads=2,
        )  # fmt: skip
        turn = self._peers.run(name, job, self._folder, self._peers.environment())
        assert 0 < turn.work_s < turn.wall_s
        rows: dict[str, dict[str, Any]] = self._peers.rows_of(dest)
        return rows


@pytest.fixture(scope="module")
def bench(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(peers, tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def ours(bench: Bench) -> dict[str, dict[str, Any]]:
    return bench.rows("maskmill")


def test_ours_has_masks_and_what_is_wrong(ours: dict[str, dict[str, Any]]) -> None:
    assert len(ours) == 14
    good = [row for row in ours.values() if row["status"] == "ok"]
    assert len(good) == 7
    assert len({row["mask_crc32"] for row in good}) > 1, "an engine that mixes images up would not be found out"
    kinds = {row["error_kind"] for row in ours.values()} - {None}
    assert {"empty", "not_an_image", "truncated"} <= kinds


@pytest.mark.parametrize(
    "name", ["plain loop", "torch loader", pytest.param("Ray Data", marks=[pytest.mark.ray, pytest.mark.slow]), "Daft"]
)
def test_a_peer_makes_the_same_rows(peers: Any, bench: Bench, ours: dict[str, dict[str, Any]], name: str) -> None:
    if peers.interpreter(peers.PEERS[name]) is None:
        pytest.skip(f"{name} is not installed")
    agreed = peers.agreement(ours, bench.rows(name))
    assert (agreed.rows, agreed.of, agreed.pixels) == (14, 14, 1.0)


def test_other_masks_and_missing_images_are_found_out(peers: Any, ours: dict[str, dict[str, Any]]) -> None:
    names = [name for name, row in ours.items() if row["status"] == "ok"]
    masks = {name: ours[name]["mask"] for name in names}
    other = next(name for name in names if masks[name] != masks[names[0]])
    swapped = ours | {names[0]: ours[names[0]] | {"mask": masks[other]}}
    agreed = peers.agreement(ours, swapped)
    assert agreed.rows == 13
    assert 0 < agreed.pixels < 1
    with pytest.raises(peers.FailedError, match="1 of 14"):
        peers.agreement(ours, {name: row for name, row in ours.items() if name != other})
    with pytest.raises(peers.FailedError, match="ok None, error corrupt"):
        peers.agreement(ours, ours | {other: ours[other] | {"status": "error", "error_kind": "corrupt"}})


def test_a_peer_that_fails_says_so(peers: Any, bench: Bench, tmp_path: Path) -> None:
    job = peers.Job(
        source=str(tmp_path / "nothing"), dest=str(tmp_path / "out"), model="", sleeps_s=0.0, batch_size=4,
        precision="fp32", cores=2, copies=1, reads=2,
    )  # fmt: skip
    with pytest.raises(peers.FailedError, match="plain loop ended with status 1"):
        peers.run("plain loop", job, tmp_path, dict(os.environ) | peers.environment())


def test_what_was_measured_can_be_drawn(peers: Any, tmp_path: Path) -> None:
    svg = peers.chart.draw([("title", {"maskmill": 1234.0, "plain loop": 5.25})], ours="maskmill")
    for text in ("title", "1,234", "5.2", "plain loop"):
        assert text in svg


def test_turns_of_several_calls_are_joined(peers: Any) -> None:
    def result(seconds: float, images: int = 10) -> dict[str, Any]:
        turn = {"wall_s": 2 * seconds, "work_s": seconds, "core_s": 4 * seconds}
        few = turn | {"core_s": 2.0}
        peer = {"installed": True, "turns": [turn], "few": few, "agreement": None, "failure": None}
        return {"title": "t", "images": images, "batch_size": 1, "load": seconds, "peers": {"maskmill": peer}}

    both = peers.joined(peers.joined(None, result(1.0)), result(4.0))
    assert peers.medians(both) == ({"maskmill": 4.0}, {"maskmill": 5.0})
    assert peers.core_ms(both, "maskmill") == 800.0
    assert "medians of 2" in peers.markdown({"free": both})
    assert peers.joined(both, result(1.0, images=20)) == result(1.0, images=20)
    costs = peers.broken_costs({"free": both, "broken": result(3.0, images=20), "sleeping": both})
    assert costs == {"broken": pytest.approx({"maskmill": 0.2})}
