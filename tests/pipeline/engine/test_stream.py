"""The stream with a stand-in model at its seam: no torch, real decoding, real rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from handmade import EightBitRgb

from models.architectures import untrained_card
from models.card import Card
from models.masks import decode_mask_png
from models.segmenter import Prediction
from pipeline.engine.intake import place_image
from pipeline.engine.messages import StreamConfig
from pipeline.engine.rows import RowMaker
from pipeline.engine.stream import Stream
from pipeline.errors import DeviceLostError, StorageError, UsageError, WorldFailingError
from pipeline.storage import Blob, open_storage
from pipeline.table.schema import WORK


class Threshold(EightBitRgb):
    """A model that is one comparison: class 1 where the image is bright. Records the batches that it is given."""

    def __init__(self, *, multiple: int = 32, before: Callable[[np.ndarray, np.ndarray], None] | None = None) -> None:
        self.card: Card = untrained_card("threshold")
        self._multiple = multiple
        self._before = before
        self.shapes: list[tuple[int, ...]] = []
        self.filled: list[int] = []

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        step = self._multiple
        return -(-height // step) * step, -(-width // step) * step

    def submit(self, images_NHWC: np.ndarray, sizes_N2: np.ndarray, *_: np.ndarray, tiles: bool) -> Any:
        if self._before:
            self._before(images_NHWC, sizes_N2)
        self.shapes.append(images_NHWC.shape)
        self.filled.append(int((sizes_N2[:, 0] > 0).sum()))
        return [
            (image[:height, :width, 0] > 128).astype(np.uint8)
            for image, (height, width) in zip(images_NHWC, sizes_N2.tolist(), strict=True)
            if height
        ]

    def finish(self, pending: Any) -> list[Prediction]:
        return [
            Prediction(
                ids, np.bincount(ids.reshape(-1), minlength=2).astype(np.int64), np.array([0.5, 0.5]), 0.5, 0.1, None
            )
            for ids in pending
        ]

    def postprocess(self, prediction: Prediction) -> tuple[np.ndarray, list[Any]]:
        return prediction.class_ids, []


def write(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    random = np.random.default_rng(0)
    uris = []
    for i, (height, width) in enumerate(sizes):
        path = folder / f"{i:04d}.png"
        cv2.imwrite(str(path), random.integers(0, 255, (height, width, 3)).astype(np.uint8))
        uris.append(f"file://{path}")
    return uris


def refs(uris: list[str]) -> pa.Table:
    count = len(uris)
    columns = {
        "uri": uris,
        "etag": ["e"] * count,
        "size_bytes": [1] * count,
        "modified": [None] * count,
        "attempt": [1] * count,
    }
    return pa.table(columns, schema=WORK)


def run(model: Any, lists: list[list[str]], *, fetch: Any = None, **config: Any) -> list[dict[str, Any]]:
    stream = Stream(
        model, fetch=fetch or open_storage("file:///").get, config=StreamConfig(**config), stamp={"task": "semantic"}
    )
    rows: list[dict[str, Any]] = []
    try:
        for future in [stream.submit(refs(uris), rows.extend) for uris in lists]:
            future.result(timeout=60)
    finally:
        stream.close()
    return rows


def masks(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    return {row["image_uri"]: row["mask"]["bytes"] for row in rows}


SIZES = [(40, 50), (64, 64), (33, 64), (10, 10), (64, 64), (40, 50), (96, 32), (1, 1)] * 5


def test_every_image_becomes_one_true_row(tmp_path: Path) -> None:
    uris = write(tmp_path, SIZES)
    rows = run(Threshold(), [uris], batch_size=4)
    assert sorted(row["image_uri"] for row in rows) == sorted(uris)
    for row in rows:
        pixels = cv2.imread(row["image_uri"].removeprefix("file://"))[:, :, ::-1]
        truth = (pixels[:, :, 0] > 128).astype(np.uint8)
        assert np.array_equal(decode_mask_png(row["mask"]["bytes"]), truth)
        assert (row["height"], row["width"]) == truth.shape
        assert sum(one["pixels"] for one in row["classes"]) == truth.size
        assert row["foreground_fraction"] == pytest.approx(truth.mean())


@pytest.mark.parametrize(
    "config", [{"batch_size": 1}, {"batch_size": 3, "threads": 1}, {"batch_size": 16, "fetch_threads": 4}]
)
def test_batching_changes_no_mask(tmp_path: Path, config: dict[str, int]) -> None:
    uris = write(tmp_path, SIZES)
    assert masks(run(Threshold(), [uris], **config)) == masks(run(Threshold(), [uris[::-1]], batch_size=4))


def test_batches_have_the_frozen_shape_even_when_short(tmp_path: Path) -> None:
    model = Threshold()
    run(model, [write(tmp_path, [(64, 64)] * 6)], batch_size=4)
    assert set(model.shapes) == {(4, 64, 64, 3)}
    assert sum(model.filled) == 6


def test_batch_pixels_bound_the_batch_of_large_images(tmp_path: Path) -> None:
    model = Threshold()
    run(model, [write(tmp_path, [(64, 64), (320, 320), (320, 320)])], batch_size=8, batch_pixels=64 * 64 * 4)
    assert set(model.shapes) == {(4, 64, 64, 3), (1, 320, 320, 3)}


def test_lists_share_batches_but_not_rows(tmp_path: Path) -> None:
    uris = write(tmp_path, [(64, 64)] * 20)
    stream = Stream(Threshold(), fetch=open_storage("file:///").get, config=StreamConfig(batch_size=8), stamp={})
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    futures = [stream.submit(refs(uris[:7]), first.extend), stream.submit(refs(uris[7:]), second.extend)]
    for future in futures:
        future.result(timeout=30)
    stream.close()
    assert {row["image_uri"] for row in first} == set(uris[:7])
    assert {row["image_uri"] for row in second} == set(uris[7:])


def test_an_image_larger_than_the_budget_goes_alone(tmp_path: Path) -> None:
    """The budget holds two small batches; the large image is five times the budget. All come through."""
    budget = 2 * 4 * 64 * 64 * 3
    uris = write(tmp_path, [(64, 64)] * 40 + [(64 * 8, 64 * 4)] + [(32, 64)] * 40)
    seen: list[int] = []
    stream: Stream

    def note(images_NHWC: np.ndarray, sizes_N2: np.ndarray) -> None:
        seen.append(stream._rack.in_use_bytes)
        time.sleep(0.002)

    stream = Stream(
        Threshold(before=note),
        fetch=open_storage("file:///").get,
        config=StreamConfig(batch_size=4, memory_bytes=budget, threads=3),
        stamp={},
    )
    rows: list[dict[str, Any]] = []
    stream.submit(refs(uris), rows.extend).result(timeout=60)
    stream.close()
    assert len(rows) == len(uris)
    large = 4 * 512 * 256 * 3
    assert max(seen) == large, "the large image was never in flight, or not alone"
    assert all(bytes_in_use <= budget or bytes_in_use == large for bytes_in_use in seen)


def peak_growth_bytes(uris: list[str], memory_bytes: int) -> int:
    """By how much this process grew at most while a slow model worked on `uris`, as the kernel counts. For a process of
    its own.
    """

    def slowly(images_NHWC: np.ndarray, sizes_N2: np.ndarray) -> None:
        time.sleep(0.02)

    def resident_bytes(name: str) -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) << 10

    cv2.setNumThreads(1)
    stream = Stream(
        Threshold(before=slowly),
        fetch=open_storage("file:///").get,
        config=StreamConfig(batch_size=4, memory_bytes=memory_bytes, threads=2),
        stamp={"task": "semantic"},
    )
    kinds: list[str] = []

    def drop(rows: Any) -> None:
        kinds.extend(row["status"] for row in rows)

    stream.submit(refs(uris[:1]), drop).result(timeout=60)  # what every process needs once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_bytes("VmRSS")
    stream.submit(refs(uris), drop).result(timeout=120)
    peak = resident_bytes("VmHWM")
    stream.close()
    assert kinds == ["ok"] * (1 + len(uris))
    return peak - before


def test_the_budget_bounds_the_memory_of_the_process(tmp_path: Path) -> None:
    """400 MB of decoded pixels of many sizes, which is when batches are open side by side, in 32 MB. The margin is for
    what is not pixels: each thread's image, mask and label map. Without the budget the same images take far more.
    """
    shades = np.tile(np.linspace(0, 255, 1024).astype(np.uint8)[:, None, None], (1, 1024, 3))
    uris = []
    for i in range(160):
        path = tmp_path / f"{i}.jpg"
        cv2.imwrite(str(path), shades[: 1024 - 32 * (i % 8), : 1024 - 32 * (i // 8 % 8)])
        uris.append(f"file://{path}")
    budget, margin = 32 << 20, 96 << 20
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        bounded, unbounded = pool.map(peak_growth_bytes, [uris] * 2, [budget, 10 << 30])
    print(f"grew by {bounded / 2**20:.0f} MiB; without a budget by {unbounded / 2**20:.0f} MiB")
    assert bounded < budget + margin
    assert unbounded > 2 * (budget + margin), "the test would not notice a budget that is ignored"


def test_many_canvases_within_a_small_budget_do_not_stop_the_stream(tmp_path: Path) -> None:
    sizes = [(32 * (1 + i % 9), 32 * (1 + i % 7)) for i in range(120)]
    rows = run(Threshold(), [write(tmp_path, sizes)], batch_size=8, memory_bytes=8 * 288 * 224 * 3, threads=4)
    assert len(rows) == 120 and all(row["status"] == "ok" for row in rows)


def test_failures_are_rows_and_cost_no_neighbour(tmp_path: Path) -> None:
    uris = write(tmp_path, [(64, 64)] * 12)
    Path(uris[2].removeprefix("file://")).write_bytes(b"")
    Path(uris[3].removeprefix("file://")).write_bytes(b"hello, I am a text")
    good = Path(uris[4].removeprefix("file://")).read_bytes()
    Path(uris[4].removeprefix("file://")).write_bytes(good[: len(good) // 2])
    uris.append(f"file://{tmp_path}/nothing.png")
    rows = {row["image_uri"]: row for row in run(Threshold(), [uris], batch_size=4)}
    assert len(rows) == 13
    kinds = {uri: row["error_kind"] for uri, row in rows.items() if row["status"] == "error"}
    assert kinds == {uris[2]: "empty", uris[3]: "not_an_image", uris[4]: "truncated", uris[12]: "missing"}
    assert all(rows[uri]["error_message"] for uri in kinds)


def test_too_large_is_said_before_decoding(tmp_path: Path) -> None:
    (row,) = run(Threshold(), [write(tmp_path, [(100, 100)])], max_pixels=9_999)
    assert (row["status"], row["error_kind"]) == ("error", "too_large")


def test_a_poisoned_image_fails_alone_in_its_batch(tmp_path: Path) -> None:
    uris = write(tmp_path, [(64, 64)] * 7)
    poison = Path(uris[5].removeprefix("file://"))
    cv2.imwrite(str(poison), np.full((64, 64, 3), 7, np.uint8))

    def before(images_NHWC: np.ndarray, sizes_N2: np.ndarray) -> None:
        for image, (height, _) in zip(images_NHWC, sizes_N2.tolist(), strict=True):
            if height and (image == 7).all():
                raise RuntimeError("poison")

    rows = {row["image_uri"]: row for row in run(Threshold(before=before), [uris], batch_size=4)}
    assert rows[uris[5]]["error_kind"] == "model_failed" and "poison" in rows[uris[5]]["error_message"]
    assert [rows[uri]["status"] for uri in uris if uri != uris[5]] == ["ok"] * 6


def test_running_out_of_memory_is_the_worlds_fault(tmp_path: Path) -> None:
    def before(images_NHWC: np.ndarray, sizes_N2: np.ndarray) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate everything")

    (row,) = run(Threshold(before=before), [write(tmp_path, [(64, 64)])])
    assert row["error_kind"] == "out_of_memory" and "too large for the device's memory" in row["error_message"]
    assert "less in tiles" in row["error_message"]


def test_a_batch_that_memory_does_not_hold_is_halved_for_good(tmp_path: Path) -> None:
    """The device holds two 64×64 images at once: no row is lost, and later batches are no larger."""

    def before(images_NHWC: np.ndarray, sizes_N2: np.ndarray) -> None:
        if len(images_NHWC) > 2:
            raise MemoryError("Unable to allocate")

    uris = write(tmp_path, [(64, 64)] * 40)
    model = Threshold(before=before)
    rows = run(model, [uris], batch_size=8, memory_bytes=2 * 8 * 64 * 64 * 3)
    assert masks(rows) == masks(run(Threshold(), [uris], batch_size=8))
    assert {shape[1:3] for shape in model.shapes} == {(64, 64)}
    assert {shape[0] for shape in model.shapes} == {2}, "only batches of two ever went through"


def test_the_world_is_failing_after_enough_failures_only(tmp_path: Path) -> None:
    def fetch(uri: str) -> Blob:
        raise StorageError("the store is away", kind="fetch_failed")

    stream = Stream(Threshold(), fetch=fetch, config=StreamConfig(breaker_images=10), stamp={})
    rows: list[dict[str, Any]] = []
    stream.submit(refs([f"file:///{i}" for i in range(9)]), rows.extend).result(timeout=30)
    stream.submit(refs([f"file:///{i}" for i in range(50)]), rows.extend, watched=False).result(timeout=30)
    with pytest.raises(WorldFailingError, match=r"more than half .* such as: the store is away\."):
        stream.submit(refs(["file:///9"]), rows.extend).result(timeout=30)
    stream.close()
    assert {row["error_kind"] for row in rows} == {"fetch_failed"}


def test_a_world_that_fails_ends_a_long_list_early(tmp_path: Path) -> None:
    tried: list[str] = []

    def fetch(uri: str) -> Blob:
        tried.append(uri)
        raise StorageError("the store is away", kind="fetch_failed")

    stream = Stream(Threshold(), fetch=fetch, config=StreamConfig(breaker_images=10), stamp={})
    with pytest.raises(WorldFailingError):
        stream.submit(refs([f"file:///{i}" for i in range(5000)]), lambda rows: None).result(timeout=30)
    stream.close()
    assert len(tried) < 500


@pytest.mark.parametrize(("kind", "stops"), [("missing", False), ("denied", True), ("fetch_failed", True)])
def test_images_that_somebody_named_may_be_missing(kind: str, stops: bool) -> None:
    def fetch(uri: str) -> Blob:
        raise StorageError("no", kind=kind)

    uris = [f"file:///{i}" for i in range(30)]
    if stops:
        with pytest.raises(WorldFailingError):
            run(Threshold(), [uris], fetch=fetch, breaker_images=10, listed=False)
    else:
        assert len(run(Threshold(), [uris], fetch=fetch, breaker_images=10, listed=False)) == 30
        with pytest.raises(WorldFailingError):
            run(Threshold(), [uris], fetch=fetch, breaker_images=10)


def test_a_signed_image_is_read_by_its_address_and_known_by_its_uri(tmp_path: Path) -> None:
    uris = write(tmp_path, [(16, 16), (16, 16)])
    table = refs(["https://h/0.png", uris[1]]).append_column("address", pa.array([uris[0], None], pa.string()))
    stream = Stream(Threshold(), fetch=open_storage("file:///").get, config=StreamConfig(), stamp={})
    rows: list[dict[str, Any]] = []
    stream.submit(table, rows.extend).result(timeout=30)
    stream.close()
    assert {(row["image_uri"], row["status"]) for row in rows} == {("https://h/0.png", "ok"), (uris[1], "ok")}


def test_bytes_faults_never_stop_a_run(tmp_path: Path) -> None:
    uris = [f"file://{tmp_path}/{i}.png" for i in range(20)]
    for uri in uris:
        Path(uri.removeprefix("file://")).write_bytes(b"no image")
    rows = run(Threshold(), [uris], breaker_images=10)
    assert {row["error_kind"] for row in rows} == {"not_an_image"} and len(rows) == 20


def test_a_bug_in_the_sink_reaches_the_caller(tmp_path: Path) -> None:
    def sink(rows: Any) -> None:
        raise KeyError("bug")

    stream = Stream(Threshold(), fetch=open_storage("file:///").get, config=StreamConfig(), stamp={})
    with pytest.raises(KeyError, match="bug"):
        stream.submit(refs(write(tmp_path, [(64, 64)])), sink).result(timeout=30)
    stream.close()


def test_close_ends_every_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    stream = Stream(Threshold(), fetch=open_storage("file:///").get, config=StreamConfig(fetch_threads=4), stamp={})
    stream.submit(refs(write(tmp_path, [(64, 64)] * 9)), lambda rows: None).result(timeout=30)
    stream.close()
    deadline_s = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_output_of_nan_is_the_models_failure(tmp_path: Path) -> None:
    class Broken(Threshold):
        def finish(self, pending: Any) -> list[Prediction]:
            return [one._replace(mean_confidence=float("nan")) for one in super().finish(pending)]

    (row,) = run(Broken(), [write(tmp_path, [(64, 64)])])
    assert (row["status"], row["error_kind"]) == ("error", "model_failed")


def test_a_lost_device_blames_no_image(tmp_path: Path) -> None:
    def before(images_NHWC: np.ndarray, sizes_N2: np.ndarray) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows: list[Any] = []
    stream = Stream(Threshold(before=before), fetch=open_storage("file:///").get, config=StreamConfig(), stamp={})
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        stream.submit(refs(write(tmp_path, [(64, 64)] * 3)), rows.extend).result(timeout=30)
    stream.close()
    assert rows == []


def test_a_wrong_setup_is_no_fault_of_the_bytes() -> None:
    def fetch(uri: str) -> Blob:
        raise UsageError("no package serves this scheme")

    (row,) = run(Threshold(), [["strange://place/a.png"]], fetch=fetch)
    assert row["error_kind"] == "fetch_failed"


def test_close_ends_a_stream_that_is_full_to_the_brim(tmp_path: Path) -> None:
    """Decoders wait for the budget, the model is busy: the threads end all the same, and the list is told."""
    began = threading.Event()

    def before(images_NHWC: np.ndarray, sizes_N2: np.ndarray) -> None:
        began.set()
        time.sleep(0.2)

    stream = Stream(
        Threshold(before=before),
        fetch=open_storage("file:///").get,
        config=StreamConfig(batch_size=2, memory_bytes=2 * 64 * 64 * 3, threads=3),
        stamp={},
    )
    future = stream.submit(refs(write(tmp_path, [(64, 64), (32, 32), (96, 96)] * 10)), lambda rows: None)
    assert began.wait(30)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        future.result(timeout=1)


@pytest.mark.parametrize(
    ("size", "waits_s", "alone"),
    [(24, 0.0, True), (24, 0.03, False), (256, 0.0, False)],
    ids=["small", "slow disk", "large"],
)
def test_small_images_are_made_by_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, waits_s: float, alone: bool
) -> None:
    """Two would hand the interpreter to and fro. The first ones tell how large they are."""
    inside, most, seen, lock = 0, 0, 0, threading.Lock()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal inside, most, seen
            with lock:
                inside, seen = inside + 1, seen + 1
                most = max(most, inside) if seen > 200 else 0
            time.sleep(0.002)
            try:
                return call(*arguments, **options)
            finally:
                with lock:
                    inside -= 1

        return wrapped

    def fetch(uri: str) -> Blob:
        time.sleep(waits_s)
        return open_storage("file:///").get(uri)

    monkeypatch.setattr("pipeline.engine.stream._SMALL_LATE_S", 20.0)  # all are slow here
    monkeypatch.setattr("pipeline.engine.stream._QUICK_FETCH_S", 0.02)
    monkeypatch.setattr("pipeline.engine.stream.place_image", counted(place_image))
    monkeypatch.setattr(RowMaker, "ok", counted(RowMaker.ok))
    uris = write(tmp_path, [(size, size)] * 4)
    rows = run(Threshold(), [uris * 80], threads=4, batch_size=4, fetch=fetch)
    assert len(rows) == 320 and (most == 1) == alone


class OnSmallCanvas(Threshold):
    """Whatever the size of an image, it is shown to the model on 32×32 pixels, as by a card that resizes."""

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        return 32, 32

    def fit(self, pixels: np.ndarray, out: np.ndarray) -> tuple[int, int]:
        out[:] = cv2.resize(pixels, (32, 32))
        return 32, 32


def test_rows_of_large_images_on_a_small_canvas_are_made_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4)
    ok = RowMaker.ok

    def wait_for_others(*arguments: Any) -> Any:
        together.wait(20)
        return ok(*arguments)

    monkeypatch.setattr(RowMaker, "ok", wait_for_others)
    uris = write(tmp_path, [(256, 256)] * 4)
    rows = run(OnSmallCanvas(), [uris * 16], threads=4, batch_size=4)
    assert [row["status"] for row in rows] == ["ok"] * 64


@pytest.mark.parametrize("fetch_threads", [0, 8])
def test_a_small_image_that_does_not_come_holds_nobody_up(tmp_path: Path, fetch_threads: int) -> None:
    uris = write(tmp_path, [(24, 24)] * 4)
    rows: list[dict[str, Any]] = []
    late = threading.Event()
    fetched = 0

    def fetch(uri: str) -> Blob:
        nonlocal fetched
        fetched += 1
        if fetched == 300:
            assert late.wait(20), "the others wait for it"
        return open_storage("file:///").get(uri)

    def take(some: Any) -> None:
        rows.extend(some)
        if len(rows) >= 560:
            late.set()

    config = StreamConfig(threads=4, batch_size=4, fetch_threads=fetch_threads)
    stream = Stream(Threshold(), fetch=fetch, config=config, stamp={"task": "semantic"})
    try:
        stream.submit(refs(uris * 150), take).result(timeout=60)
    finally:
        stream.close()
    assert [row["status"] for row in rows] == ["ok"] * 600


@pytest.mark.parametrize("runs", [40, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
def test_whatever_the_sizes_threads_and_budget_it_ends(tmp_path: Path, runs: int) -> None:
    """Nobody waits for somebody who waits for him."""
    random = Random(runs)
    edges = [1, 10, 24, 40, 64, 96, 130, 200]
    uris = write(tmp_path, [(random.choice(edges), random.choice(edges)) for _ in range(60)])
    for _ in range(runs):
        lists = [random.choices(uris, k=random.choice([1, 5, 40, 120])) for _ in range(random.choice([1, 2, 4]))]
        rows = run(
            Threshold(multiple=random.choice([1, 32, 64])), lists, threads=random.choice([1, 2, 3, 5]),
            batch_size=random.choice([1, 2, 4, 9]), memory_bytes=random.choice([1, 20_000, 200_000, 1 << 24]),
            fetch_threads=random.choice([0, 0, 3]),
        )  # fmt: skip
        assert len(rows) == sum(map(len, lists))


def test_spare_buffers_count_too(tmp_path: Path) -> None:
    config = StreamConfig(batch_size=4, memory_bytes=6 * 64 * 64 * 3 * 4)
    stream = Stream(Threshold(), fetch=open_storage("file:///").get, config=config, stamp={})
    sizes = [(32 * (1 + i % 4), 32 * (1 + i % 3)) for i in range(80)]
    stream.submit(refs(write(tmp_path, sizes)), lambda rows: None).result(timeout=60)
    stream.close()
    assert sum(buffer.nbytes for buffer in stream._rack._spare) == stream._rack.spare_bytes <= config.memory_bytes
