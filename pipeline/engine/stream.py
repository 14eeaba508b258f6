"""The stream: images of one process, from fetch to row, overlapped and bounded in bytes.
Owns: the threads, the batches, the budget, what happens to one image. Must not know: Ray, runs, shards' names, commits.

    refs ─▶ window of fetches ─▶ decode ─▶ batch slots ─▶ model thread ─▶ encode ─▶ rows

One pool of threads decodes and encodes, rows first: on few cores a second pool only fights the first for the
interpreter. Images are decoded straight into a slot of the batch of their canvas; the model thread takes full batches
(or, when nothing else can move, the fullest open one, padded to the frozen shape). The budget counts batches of decoded
pixels from the moment that they are opened until their rows are made, and the buffers kept for later ones.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from models.masks import Instance
from pipeline.corpus.decode import decode, image_statistics, peek
from pipeline.engine.rows import Picture, Ref, RowMaker
from pipeline.errors import WORLD_KINDS, DeviceLostError, ImageError, MaskmillError, StorageError
from pipeline.storage import Blob

log = logging.getLogger(__name__)

_CHUNK_IMAGES = 16
_CHUNK_BYTES = 32 << 20


class StreamConfig(BaseModel):
    """How a stream works. `batch_size` and `batch_pixels` are the frozen batch shape; the rest changes only the
    speed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(8, ge=1, description="Slots of a batch, at most.")
    batch_pixels: int = Field(4 << 20, ge=1, description="Pixels of a batch, at most; a larger image goes alone.")
    memory_bytes: int = Field(1 << 30, ge=1, description="Bytes of batches in flight; one larger batch goes alone.")
    threads: int = Field(2, ge=1, description="Threads that decode and encode.")
    fetch_threads: int = Field(0, ge=0, description="Fetches in flight; 0: the decoding threads read by themselves.")
    max_pixels: int = Field(200_000_000, ge=1, description="Larger images become `too_large`.")
    breaker_images: int = Field(1000, ge=1, description="Outcomes over which failures of the world are watched.")


class SegmenterLike(Protocol):
    """What the stream asks of a model: `models.segmenter.Segmenter`, or a stand-in in a benchmark."""

    @property
    def card(self) -> Any: ...
    def canvas(self, height: int, width: int) -> tuple[int, int]: ...
    def submit(self, images_NHWC: np.ndarray, sizes_N2: np.ndarray, statistics_N2: np.ndarray) -> Any: ...
    def finish(self, pending: Any) -> Sequence[Any]: ...
    def postprocess(self, prediction: Any) -> tuple[np.ndarray, Sequence[Instance]]: ...


class Work(NamedTuple):
    """One submitted list: its columns, where its rows go, and its promise."""

    uris: list[str]
    etags: list[str]
    attempts: list[int]
    sizes_bytes: list[int]
    add_rows: Callable[[Sequence[Mapping[str, Any]]], None]
    lock: threading.Lock
    left: list[int]
    done: Future[None]

    def ref(self, row: int) -> Ref:
        """One of its images."""
        return Ref(self.uris[row], self.etags[row], self.attempts[row], self.sizes_bytes[row])


class _Item(NamedTuple):
    work: Work
    row: int
    blob: Blob
    picture: Picture
    timings: dict[str, float]


class _Batch:
    """Slots for images of one canvas. `writing` counts slots that a decode thread holds."""

    __slots__ = (
        "canvas",
        "free",
        "images_NHWC",
        "items",
        "size_bytes",
        "sizes_N2",
        "statistics_N2",
        "writing",
    )

    def __init__(self, canvas: tuple[int, int], images_NHWC: np.ndarray) -> None:
        slots = len(images_NHWC)
        self.canvas = canvas
        self.images_NHWC = images_NHWC
        self.sizes_N2 = np.zeros((slots, 2), np.int32)
        self.statistics_N2 = np.tile(np.array([0.0, 1.0], np.float32), (slots, 1))
        self.items: list[_Item | None] = [None] * slots
        self.free = list(range(slots - 1, -1, -1))
        self.writing = 0
        self.size_bytes = images_NHWC.nbytes

    def filled(self) -> int:
        return len(self.items) - len(self.free) - self.writing


class _StreamEndedError(Exception):
    """Told to a thread that waits while the stream ends; never leaves this module."""


class _Answered(NamedTuple):
    """A batch that the model is done with. An answer is a prediction, or the exception that stands for one."""

    batch: _Batch
    answers: Sequence[Any]
    infer_ms: float


class StreamCounts(NamedTuple):
    """What a stream has done since it began: `busy_s` of the model's `active_s`, and rows made."""

    rows: int
    errors: int
    busy_s: float
    active_s: float


class Stream:
    """Turns references into rows with one model, until closed.

    Guarantees: each submitted reference yields exactly one row; an image's mask depends on the image, the model and the
    frozen batch shape only, never on its neighbours. Holds at most `memory_bytes` of decoded pixels, or one batch.
    `submit` may be called from several threads, and several lists may be under way at once.
    """

    def __init__(
        self,
        segmenter: SegmenterLike,
        *,
        fetch: Callable[[str], Blob],
        config: StreamConfig,
        stamp: Mapping[str, Any],
    ) -> None:
        self._segmenter = segmenter
        self._fetch = fetch
        self._config = config
        self._rows_of = RowMaker(segmenter, stamp)

        self._state = threading.Condition()
        self._feed: deque[tuple[Work, list[int]]] = deque()
        self._window: deque[list[tuple[Work, int, Future[Blob] | None]]] = deque()
        self._window_images = 0
        self._open: dict[tuple[int, int], _Batch] = {}
        self._ready: deque[_Batch] = deque()
        self._to_encode: deque[_Answered] = deque()
        self._window_bytes = 0
        self._spare: deque[np.ndarray] = deque()
        self._spare_bytes = 0
        self._in_use_bytes = 0
        self._outstanding = 0
        self._decoding = 0
        self._blocked = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._live: dict[int, Work] = {}

        self._outcomes: deque[bool] = deque(maxlen=config.breaker_images)
        self._rows = 0
        self._errors = 0
        self._busy_s = 0.0
        self._began_s: float | None = None

        self._fetchers = ThreadPoolExecutor(config.fetch_threads, "fetch") if config.fetch_threads else None
        self._threads = [
            threading.Thread(target=self._pool_loop, name=f"stream-{i}", daemon=True) for i in range(config.threads)
        ]
        self._threads.append(threading.Thread(target=self._model_loop, name="model", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, refs: pa.Table, add_rows: Callable[[Sequence[Mapping[str, Any]]], None]) -> Future[None]:
        """Takes up `refs` (schema `WORK`). `add_rows` gets every row once, one caller at a time; then the future is
        done.

        The future carries an exception only where the stream itself broke: an image never breaks it.
        """
        work = Work(
            uris=refs["uri"].to_pylist(),
            etags=refs["etag"].to_pylist(),
            attempts=refs["attempt"].to_pylist(),
            sizes_bytes=refs["size_bytes"].to_pylist(),
            add_rows=add_rows,
            lock=threading.Lock(),
            left=[len(refs)],
            done=Future(),
        )
        if not len(refs):
            work.done.set_result(None)
            return work.done
        with self._state:
            if self._failure or self._closed:
                work.done.set_exception(self._failure or RuntimeError("the stream is closed"))
                return work.done
            self._began_s = self._began_s or time.monotonic()
            self._live[id(work)] = work
            for chunk in _chunks(work.sizes_bytes):
                self._feed.append((work, chunk))
            self._state.notify_all()
        return work.done

    def counts(self) -> StreamCounts:
        """A snapshot; safe from any thread."""
        active_s = time.monotonic() - self._began_s if self._began_s else 0.0
        return StreamCounts(self._rows, self._errors, self._busy_s, active_s)

    def world_is_failing(self) -> bool:
        """More than half of the last `breaker_images` outcomes are failures of the world (and so many are known)."""
        outcomes = self._outcomes
        return len(outcomes) == outcomes.maxlen and sum(outcomes) * 2 > len(outcomes)

    def close(self) -> None:
        """Ends the threads. Lists still under way get an exception."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        for thread in self._threads:
            thread.join()
        if self._fetchers:
            self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._fail_all(RuntimeError("the stream was closed with work under way"))

    # ── input ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _top_up(self) -> None:
        """Keeps fetches in flight ahead of the decoders. Called with the lock held."""
        ahead = self._config.fetch_threads * 2 if self._fetchers else 1
        limit_bytes = self._config.memory_bytes // 4
        while self._feed and self._window_images < ahead and (not self._window or self._window_bytes < limit_bytes):
            work, indices = self._feed.popleft()
            self._window_bytes += sum(work.sizes_bytes[index] or 0 for index in indices)
            chunk: list[tuple[Work, int, Future[Blob] | None]] = []
            for index in indices:
                fetched = self._fetchers.submit(self._fetch, work.uris[index]) if self._fetchers else None
                chunk.append((work, index, fetched))
            self._window.append(chunk)
            self._window_images += len(chunk)

    def _next_task(self) -> _Answered | list[tuple[Work, int, Future[Blob] | None]] | None:
        """Rows before pixels: what leaves makes room."""
        with self._state:
            while not self._failure:
                if self._to_encode:
                    return self._to_encode.popleft()
                if self._closed:
                    return None
                self._top_up()
                if self._window and len(self._ready) < 2 * self._config.threads:
                    chunk = self._window.popleft()
                    self._window_images -= len(chunk)
                    self._window_bytes -= sum(work.sizes_bytes[index] or 0 for work, index, _ in chunk)
                    self._top_up()
                    self._decoding += 1
                    return chunk
                self._state.wait()
            return None

    def _pool_loop(self) -> None:
        while (task := self._next_task()) is not None:
            if isinstance(task, _Answered):
                self._encode(task)
                continue
            try:
                for work, index, fetched in task:
                    self._load(work, index, fetched)
            except _StreamEndedError:
                continue
            except BaseException as error:  # noqa: BLE001 - the per-actor boundary: every waiting list is told
                self._break(error)
            finally:
                with self._state:
                    self._decoding -= 1
                    if not self._decoding:
                        self._state.notify_all()

    def _load(self, work: Work, index: int, fetched: Future[Blob] | None) -> None:
        """Fetches and decodes one image into a slot, or makes its error row."""
        blob: Blob | None = None
        began_s = fetched_s = time.perf_counter()
        held: tuple[_Batch, int] | None = None
        failure: tuple[str, str] | None = None
        try:
            blob = self._fetched(work.uris[index], fetched)
            fetched_s = time.perf_counter()
            height, width = peek(blob.data)
            if height * width > self._config.max_pixels:
                raise ImageError(
                    f"{width}×{height} is more than max_pixels={self._config.max_pixels}", kind="too_large"
                )
            held = batch, slot = self._acquire(self._canvas(height, width))
            view = batch.images_NHWC[slot]
            exact = batch.canvas == (height, width)
            decoded = decode(blob.data, max_pixels=self._config.max_pixels, out=view if exact else None)
            pixels = decoded.pixels
            if pixels.shape[:2] != (height, width):
                raise ImageError(
                    f"header says {width}×{height}, pixels are {pixels.shape[1]}×{pixels.shape[0]}",
                    kind="corrupt",
                )
            if not exact:
                view[:height, :width] = pixels
                view[height:, :width] = view[height - 1, :width]
                view[:, width:] = view[:, width - 1 : width]
            mean, std, brightness, contrast = image_statistics(pixels)
        except (ImageError, StorageError) as error:
            failure = (error.kind, str(error))
        except MemoryError as error:
            failure = ("out_of_memory", f"no memory to decode: {error}")
        except _StreamEndedError:
            raise
        except Exception as error:  # noqa: BLE001 - the per-image boundary: it becomes a row
            log.warning("decoding %r failed in an unforeseen way: %r", work.uris[index], error)
            failure = ("corrupt", f"{type(error).__name__}: {error}")
        decoded_s = time.perf_counter()
        timings = {"fetch_ms": (fetched_s - began_s) * 1e3, "decode_ms": (decoded_s - fetched_s) * 1e3}
        if failure is not None:
            if held is not None:
                self._give_back(*held)
            self._emit(work, [self._rows_of.error(work.ref(index), blob, *failure) | timings])
            return
        assert blob is not None
        item = _Item(
            work=work,
            row=index,
            blob=blob._replace(data=b""),
            picture=Picture(height, width, decoded.format, brightness, contrast),
            timings=timings,
        )
        with self._state:
            batch.sizes_N2[slot] = (height, width)
            batch.statistics_N2[slot] = (mean, std)
            batch.items[slot] = item
            self._release_slot(batch)

    def _fetched(self, uri: str, fetched: Future[Blob] | None) -> Blob:
        """The image's bytes. What the caller's own set-up gets wrong is no fault of the bytes either."""
        try:
            return fetched.result() if fetched else self._fetch(uri)
        except StorageError:
            raise
        except MaskmillError as error:
            raise StorageError(str(error), kind="fetch_failed") from error

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        try:
            return self._segmenter.canvas(height, width)
        except ValueError as error:
            raise ImageError(str(error), kind="unsupported") from error

    def _give_back(self, batch: _Batch, slot: int) -> None:
        """A slot that no image came into."""
        with self._state:
            batch.free.append(slot)
            self._open.setdefault(batch.canvas, batch)
            self._release_slot(batch)

    # ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _slots(self, canvas: tuple[int, int]) -> int:
        return max(1, min(self._config.batch_size, self._config.batch_pixels // (canvas[0] * canvas[1])))

    def _acquire(self, canvas: tuple[int, int]) -> tuple[_Batch, int]:
        """A free slot for `canvas`. While opening one more batch would pass the budget, helps to make rows, or
        waits."""
        slots = self._slots(canvas)
        size_bytes = slots * canvas[0] * canvas[1] * 3
        waiting = False
        while True:
            with self._state:
                if waiting and (self._failure or self._closed):
                    self._decoding += 1
                    self._blocked -= 1
                if self._failure or self._closed:
                    raise _StreamEndedError from self._failure
                batch = self._open.get(canvas)
                fits = not self._in_use_bytes or self._in_use_bytes + size_bytes <= self._config.memory_bytes
                if batch is not None or fits:
                    if waiting:
                        self._decoding += 1
                        self._blocked -= 1
                    if batch is None:
                        batch = _Batch(canvas, self._buffer((slots, *canvas, 3)))
                        self._open[canvas] = batch
                        self._in_use_bytes += size_bytes
                    slot = batch.free.pop()
                    batch.writing += 1
                    if not batch.free:
                        del self._open[canvas]
                    return batch, slot
                if not waiting:
                    waiting = True
                    self._blocked += 1
                    self._decoding -= 1
                    self._state.notify_all()
                if not self._to_encode:
                    self._state.wait()
                answered = self._to_encode.popleft() if self._to_encode else None
            if answered is not None:
                self._encode(answered)

    def _buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """A used buffer of this shape where there is one: fresh pages cost more than the copy into them. Others make
        room. Called with the lock held.
        """
        for position, spare in enumerate(self._spare):
            if spare.shape == shape:
                del self._spare[position]
                self._spare_bytes -= spare.nbytes
                return spare
        size_bytes = math.prod(shape)
        while self._spare and self._in_use_bytes + self._spare_bytes + size_bytes > self._config.memory_bytes:
            self._spare_bytes -= self._spare.popleft().nbytes
        return np.empty(shape, np.uint8)

    def _release_slot(self, batch: _Batch) -> None:
        """One writer of `batch` less. Called with the lock held."""
        batch.writing -= 1
        if batch.writing == 0 and self._open.get(batch.canvas) is not batch:
            if batch.filled():
                self._ready.append(batch)
            else:
                self._in_use_bytes -= batch.size_bytes
            self._state.notify_all()

    def _next_batch(self, *, wait: bool) -> _Batch | None:
        """The next batch to run; None where the stream has ended, or nothing is ready and `wait` is false."""
        with self._state:
            while not self._failure:
                if self._ready:
                    self._outstanding += 1
                    return self._ready.popleft()
                stuck = self._decoding == 0 and (self._blocked == 0 or self._outstanding == 0)
                idle = not self._window and not self._feed
                if stuck and (idle or self._blocked):
                    batch = max(self._open.values(), key=_Batch.filled, default=None)
                    if batch is not None:
                        del self._open[batch.canvas]
                        if batch.filled():
                            self._outstanding += 1
                            return batch
                        self._in_use_bytes -= batch.size_bytes
                        self._state.notify_all()
                        continue
                if self._closed or not wait:
                    return None
                self._state.wait()
            return None

    # ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _model_loop(self) -> None:
        """Keeps one batch on the device while the one before is being brought back."""
        under_way: tuple[_Batch, Any, float] | None = None
        try:
            while True:
                batch = self._next_batch(wait=under_way is None)
                if batch is None and under_way is None:
                    return
                started = (batch, *self._start(batch)) if batch is not None else None
                if under_way is not None:
                    self._hand_over(*under_way)
                under_way = started
        except BaseException as error:  # noqa: BLE001 - the per-actor boundary: every waiting list is told
            self._break(error)

    def _start(self, batch: _Batch) -> tuple[Any, float]:
        began_s = time.perf_counter()
        try:
            pending = self._segmenter.submit(batch.images_NHWC, batch.sizes_N2, batch.statistics_N2)
        except Exception as error:  # noqa: BLE001 - tried again one by one, and recorded there
            pending = error
        spent_s = time.perf_counter() - began_s
        self._busy_s += spent_s
        return pending, spent_s

    def _hand_over(self, batch: _Batch, pending: Any, spent_s: float) -> None:
        began_s = time.perf_counter()
        outcome: Sequence[Any]
        try:
            if isinstance(pending, Exception):
                raise pending
            outcome = self._segmenter.finish(pending)
        except Exception as error:  # noqa: BLE001 - tried again one by one, and recorded there
            _raise_if_device_is_lost(error)
            log.warning("a batch of %d failed (%s); trying its images one by one", batch.filled(), error)
            outcome = self._one_by_one(batch)
        finish_s = time.perf_counter() - began_s
        self._busy_s += finish_s
        infer_ms = (spent_s + finish_s) * 1e3 / batch.filled()
        with self._state:
            self._to_encode.append(_Answered(batch, outcome, infer_ms))
            self._state.notify()

    def _one_by_one(self, batch: _Batch) -> list[Any]:
        """Each image alone in a batch of the same shape, so that one poisoned image costs only itself."""
        outcome: list[Any] = []
        for slot, item in enumerate(batch.items):
            if item is None:
                continue
            sizes_N2 = np.zeros_like(batch.sizes_N2)
            sizes_N2[slot] = batch.sizes_N2[slot]
            try:
                pending = self._segmenter.submit(batch.images_NHWC, sizes_N2, batch.statistics_N2)
                outcome.extend(self._segmenter.finish(pending))
            except Exception as error:  # noqa: BLE001 - the per-image boundary: it becomes a row
                _raise_if_device_is_lost(error)
                outcome.append(error)
        return outcome

    # ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _encode(self, answered: _Answered) -> None:
        batch = answered.batch
        try:
            rows: list[tuple[Work, dict[str, Any]]] = []
            processed_at = dt.datetime.now(dt.UTC)
            items = [item for item in batch.items if item is not None]
            for item, prediction in zip(items, answered.answers, strict=True):
                began_s = time.perf_counter()
                try:
                    if isinstance(prediction, Exception):
                        raise prediction
                    row = self._rows_of.ok(item.work.ref(item.row), item.blob, item.picture, prediction)
                except Exception as error:  # noqa: BLE001 - the per-image boundary: it becomes a row
                    memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
                    kind = "out_of_memory" if memory else "model_failed"
                    message = f"{type(error).__name__}: {error}"
                    row = self._rows_of.error(item.work.ref(item.row), item.blob, kind, message)
                    row |= item.picture._asdict()
                row["processed_at"] = processed_at
                row |= item.timings
                row["infer_ms"] = answered.infer_ms
                row["encode_ms"] = (time.perf_counter() - began_s) * 1e3
                rows.append((item.work, row))
            for work in {id(item.work): item.work for item in items}.values():
                self._emit(work, [row for owner, row in rows if owner is work])
        except BaseException as error:  # noqa: BLE001 - the per-actor boundary: every waiting list is told
            self._break(error)
        finally:
            with self._state:
                self._in_use_bytes -= batch.size_bytes
                self._outstanding -= 1
                if self._in_use_bytes + self._spare_bytes + batch.size_bytes <= self._config.memory_bytes:
                    self._spare.append(batch.images_NHWC)
                    self._spare_bytes += batch.size_bytes
                self._state.notify_all()

    def _emit(self, work: Work, rows: list[dict[str, Any]]) -> None:
        if self._failure:
            return
        with work.lock:
            work.add_rows(rows)
            work.left[0] -= len(rows)
            finished = work.left[0] == 0
        with self._state:
            self._rows += len(rows)
            for row in rows:
                self._errors += row["status"] == "error"
                self._outcomes.append(row.get("error_kind") in WORLD_KINDS)
            if finished:
                self._live.pop(id(work), None)
        if finished and not work.done.done():
            work.done.set_result(None)

    def _break(self, error: BaseException) -> None:
        log.error("the stream broke: %r", error, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)
        with self._state:
            self._failure = self._failure or error
            self._state.notify_all()
        self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        with self._state:
            live, self._live = list(self._live.values()), {}
        for work in live:
            if not work.done.done():
                work.done.set_exception(error)


def _chunks(sizes_bytes: Sequence[int | None]) -> Iterator[list[int]]:
    """Positions in pieces of a few images or a few megabytes: what one thread takes up at a time."""
    chunk: list[int] = []
    chunk_bytes = 0
    for index, size_bytes in enumerate(sizes_bytes):
        chunk.append(index)
        chunk_bytes += size_bytes or 0
        if len(chunk) >= _CHUNK_IMAGES or chunk_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
    if chunk:
        yield chunk


def _raise_if_device_is_lost(error: Exception) -> None:
    """After some CUDA errors every later call of the process fails: no image is to blame, and the process must go."""
    text = str(error)
    lost = any(sign in text for sign in ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS"))
    if lost and "out of memory" not in text.lower():
        raise DeviceLostError(f"the device failed: {text.splitlines()[0]}") from error
