"""The stream: images of one process, from fetch to row, overlapped and bounded in bytes.
Owns: the threads, the batches, the budget, what happens to one image. Must not know: Ray, runs, shards' names, commits.

    refs ─▶ window of fetches ─▶ decode ─▶ batch slots ─▶ model thread ─▶ encode ─▶ rows

One pool of threads decodes and encodes, half of it rows first: on few cores a second pool only fights the first for the
interpreter. Images are decoded straight into a slot of the batch of their canvas; the model thread takes full batches
(or, when nothing else can move, the fullest open one, padded to the frozen shape). The budget counts batches of decoded
pixels from the moment that they are opened until their rows are made, and the buffers kept for later ones.

Longer than most modules: every method here waits on, or wakes, the one condition variable that the others hold.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from models.mosaic import DetectionMosaic, Mosaic
from models.tiling import Window
from pipeline.engine.batches import Batch, Rack, Shape, Slot
from pipeline.engine.breaker import Breaker, world_kinds
from pipeline.engine.feed import Fetched, Work, chunks, mean_bytes
from pipeline.engine.forward import Answered, Forward, SegmenterLike, Started, is_out_of_memory
from pipeline.engine.intake import Tiles, check_size, check_tiles, place_image, size_of
from pipeline.engine.messages import StreamConfig, StreamCounts
from pipeline.engine.rows import Picture, RowMaker
from pipeline.errors import ExpiredCredentialsError, ImageError, MaskmillError, StorageError, WorldFailingError
from pipeline.storage import Blob

log = logging.getLogger(__name__)

_T = TypeVar("_T")
# Of images up to this size and area two threads make fewer rows than one: they hand the interpreter to and fro.
_SMALL_BYTES = 8 << 10
_SMALL_PIXELS = 128 * 128
# Threads that wait for a slow disk wait better together.
_QUICK_FETCH_S = 0.0005
# A piece of sixteen small images is made in a fifth of that, unless one does not come.
_SMALL_LATE_S = 0.05


class _Item(NamedTuple):
    """A whole image in a slot."""

    work: Work
    row: int
    blob: Blob
    picture: Picture
    timings: dict[str, float]


class _Tiled:
    """An image that is in tiles. Its row is made once, by whoever settles it."""

    def __init__(self, work: Work, row: int, blob: Blob, mosaic: Mosaic | DetectionMosaic) -> None:
        self.work = work
        self.row = row
        self.blob = blob
        self.mosaic = mosaic
        self.picture: Picture | None = None
        self.timings = {"fetch_ms": 0.0, "decode_ms": 0.0}
        self.infer_ms = 0.0
        self.tiles_done = 0
        self._settled = threading.Lock()

    @property
    def is_settled(self) -> bool:
        return self._settled.locked()

    def settle(self) -> bool:
        """True for the first who asks."""
        return self._settled.acquire(blocking=False)


class _Tile(NamedTuple):
    """A tile in a slot."""

    owner: _Tiled
    window: Window


class _StreamEndedError(Exception):
    """Told to a thread that waits while the stream ends; never leaves this module."""


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
        self._window: deque[list[Fetched]] = deque()
        self._window_images = 0
        self._rack = Rack(
            batch_size=config.batch_size,
            batch_pixels=config.batch_pixels,
            memory_bytes=config.memory_bytes,
            channels=segmenter.input_channels,
            dtype=segmenter.input_dtype,
        )
        self._large_is_busy = False
        self._in_tiles: dict[int, _Tiled] = {}
        self._to_encode: deque[Answered] = deque()
        self._window_bytes = 0
        self._outstanding = 0
        self._decoding = 0
        self._area_px = 1 << 30  # of the last image; none was seen yet
        self._fetch_s = 0.0  # what the last few took to fetch, each
        self._small_under_way = False
        self._small_since_s = 0.0
        self._blocked = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._live: dict[int, Work] = {}

        self._breaker = Breaker(config.breaker_images)
        self._world_kinds = world_kinds(listed=config.listed)
        self._rows = 0
        self._errors = 0
        self._forward = Forward(segmenter)
        self._began_s: float | None = None

        self._fetchers = ThreadPoolExecutor(config.fetch_threads, "fetch") if config.fetch_threads else None
        self._threads = [
            threading.Thread(target=self._pool_loop, name=f"stream-{i}", daemon=True) for i in range(config.threads)
        ]
        self._threads.append(threading.Thread(target=self._model_loop, name="model", daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(
        self, refs: pa.Table, add_rows: Callable[[Sequence[Mapping[str, Any]]], None], *, watched: bool = True
    ) -> Future[None]:
        """Takes up `refs` (schema `WORK`, and perhaps a column `address`: what to read an image by, where its URI is
        not enough). `add_rows` gets every row once, one caller at a time; then the future is done.

        The future carries an exception only where the stream itself broke, or where WorldFailingError says that more
        than half of the last `breaker_images` outcomes failed for reasons outside them: an image alone never breaks it.
        With `watched` false its outcomes are not looked at in this way.
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
            watched=watched,
            addresses=refs["address"].to_pylist() if "address" in refs.column_names else None,
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
            for chunk in chunks(work.sizes_bytes):
                self._feed.append((work, chunk))
            self._state.notify_all()
        return work.done

    def counts(self) -> StreamCounts:
        """A snapshot; safe from any thread."""
        active_s = time.monotonic() - self._began_s if self._began_s else 0.0
        in_tiles = list(self._in_tiles.values())
        tiles = sum(len(one.mosaic.grid) for one in in_tiles)
        done = sum(one.tiles_done for one in in_tiles)
        return StreamCounts(self._rows, self._errors, self._forward.busy_s, active_s, tiles, done)

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
            chunk: list[Fetched] = []
            for index in indices:
                fetched = self._fetchers.submit(self._fetch, work.address(index)) if self._fetchers else None
                chunk.append((work, index, fetched))
            self._window.append(chunk)
            self._window_images += len(chunk)

    def _next_task(self, *, after_small: bool) -> tuple[Answered | list[Fetched], bool] | None:
        """What to do next. And whether these are small images, of which one thread at a time makes all there is;
        `after_small`: the caller was that one."""
        with self._state:
            if after_small:
                self._small_under_way = False
            found = None
            while found is None and not self._failure:
                found = self._found_task()
                if after_small and not (found and found[1]):
                    self._state.notify_all()  # somebody else may be it
                    after_small = False
                if found is None:
                    if self._closed and not self._to_encode:
                        break
                    self._state.wait(_SMALL_LATE_S if self._small_under_way else None)
            return found

    def _found_task(self) -> tuple[Answered | list[Fetched], bool] | None:
        """What there is to do now, rows first. Called with the lock held."""
        return self._found_rows() or self._found_pixels()

    def _found_rows(self) -> tuple[Answered, bool] | None:
        """Called with the lock held."""
        if not self._to_encode:
            return None
        batch = self._to_encode[0].batch
        # Rows are of the size of their images, whatever canvas these were on.
        small = not batch.shape.tiles and int(batch.image_sizes_N2.prod(axis=1).max()) <= _SMALL_PIXELS
        if not self._admitted(small):
            return None
        return self._to_encode.popleft(), small

    def _found_pixels(self) -> tuple[list[Fetched], bool] | None:
        """Called with the lock held."""
        if self._closed:
            return None
        self._top_up()
        if not self._window or len(self._rack.ready) >= 2 * self._config.threads:
            return None
        small = (
            self._area_px <= _SMALL_PIXELS
            and self._fetch_s <= _QUICK_FETCH_S
            and mean_bytes(self._window[0]) <= _SMALL_BYTES
        )
        if not self._admitted(small):
            return None
        chunk = self._window.popleft()
        self._window_images -= len(chunk)
        self._window_bytes -= sum(work.sizes_bytes[index] or 0 for work, index, _ in chunk)
        self._top_up()
        self._decoding += 1
        return chunk, small

    def _admitted(self, small: bool) -> bool:
        """Called with the lock held. Who is late, as with a file that does not come, holds nobody up."""
        now_s = time.monotonic()
        if small and self._small_under_way and now_s - self._small_since_s < _SMALL_LATE_S:
            return False
        if small:
            self._small_under_way, self._small_since_s = True, now_s
        return True

    def _pool_loop(self) -> None:
        small = False
        while (found := self._next_task(after_small=small)) is not None:
            task, small = found
            if isinstance(task, Answered):
                self._encode(task)
            else:
                self._load_chunk(task)

    def _load_chunk(self, chunk: list[Fetched]) -> None:
        work, failed = chunk[0][0], []
        try:
            for _, index, fetched in chunk:
                if (row := self._load(work, index, fetched)) is not None:
                    failed.append(row)
            if failed:
                self._emit(work, failed)
        except _StreamEndedError:
            pass
        except BaseException as error:  # noqa: BLE001 - the per-actor boundary: every waiting list is told
            self._break(error)
        finally:
            with self._state:
                self._decoding -= 1
                if not self._decoding:
                    self._state.notify_all()

    def _load(self, work: Work, index: int, fetched: Future[Blob] | None) -> dict[str, Any] | None:
        """Fetches and decodes one image into a slot, or into many; its row where that fails."""
        blob: Blob | None = None
        began_s = fetched_s = time.perf_counter()
        tiled: _Tiled | None = None
        try:
            try:
                blob = self._fetched(work.address(index), fetched)
            finally:
                fetched_s = time.perf_counter()
                self._fetch_s += (fetched_s - began_s - self._fetch_s) / 16  # a lost update is no harm
            height, width = size_of(self._segmenter, blob.data)
            limits = {"max_pixels": self._config.max_pixels, "max_tiled_pixels": self._config.max_tiled_pixels}
            check_size(blob.data, height, width, **limits)
            mosaic = self._segmenter.mosaic(height, width)
            if mosaic is not None:
                whole = height * width <= self._config.max_pixels
                most = self._config.max_pixels if whole else self._config.max_tiled_pixels
                check_tiles(self._segmenter, mosaic, max_pixels=most)
                tiled = _Tiled(work, index, blob._replace(data=b""), mosaic)
                self._in_tiles[id(tiled)] = tiled
                tiled.timings["fetch_ms"] = (fetched_s - began_s) * 1e3
                self._load_tiles(tiled, blob.data)
                return None
            timings = {"fetch_ms": (fetched_s - began_s) * 1e3}
            self._area_px = height * width
            with self._slot(Shape(*self._canvas(height, width))) as slot:
                placed, picture = place_image(
                    self._segmenter,
                    blob.data,
                    slot.canvas_pixels,
                    height=height,
                    width=width,
                    max_pixels=self._config.max_pixels,
                )
                timings["decode_ms"] = (time.perf_counter() - fetched_s) * 1e3
                slot.fill(
                    _Item(work, index, blob._replace(data=b""), picture, timings),
                    size=(placed.height, placed.width),
                    image_size=(height, width),
                    statistics=(placed.mean, placed.std),
                )
            return None
        except ExpiredCredentialsError:
            raise
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
        if tiled is not None and not self._settle(tiled):
            return None
        return self._rows_of.error(work.ref(index), blob, *failure) | timings

    def _load_tiles(self, tiled: _Tiled, data: bytes) -> None:
        """Puts one large image into slots, tile by tile; one such image at a time, for its pixels are in no budget."""
        self._wait_for(self._take_large)
        try:
            began_s = time.perf_counter()
            tiles = Tiles(self._segmenter, data, tiled.mosaic, max_pixels=self._config.max_pixels)
            try:
                tiled.picture, mean, std = tiles.measure()
                for window in tiles.windows():
                    if tiled.is_settled:
                        return
                    shape = Shape(*self._canvas(window.height, window.width), tiles=True)
                    with self._slot(shape) as slot:
                        size = tiles.place(window, slot.canvas_pixels)
                        tiled.timings["decode_ms"] = (time.perf_counter() - began_s) * 1e3
                        slot.fill(
                            _Tile(tiled, window),
                            size=size,
                            image_size=(window.height, window.width),
                            statistics=(mean, std),
                        )
            finally:
                tiles.close()
        finally:
            with self._state:
                self._large_is_busy = False
                self._state.notify_all()

    def _take_large(self) -> bool:
        """Called with the lock held."""
        free = not self._large_is_busy
        self._large_is_busy = True
        return free

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

    # ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _slot(self, shape: Shape) -> Iterator[Slot]:
        """A slot to be filled in the body; where that raises, it goes back."""
        slot = self._wait_for(lambda: self._take(shape))
        try:
            yield slot
        except BaseException:
            with self._state:
                if self._rack.give_back(slot):
                    self._state.notify_all()
            raise
        with self._state:
            if self._rack.written(slot):
                self._state.notify_all()

    def _take(self, shape: Shape) -> Slot | None:
        """Called with the lock held. Tiles of one image would fill the budget far ahead of the model."""
        if shape.tiles and len(self._rack.ready) >= 2 * self._config.threads:
            return None
        return self._rack.take(shape)

    def _wait_for(self, take: Callable[[], _T | None]) -> _T:
        """What `take` gives, called with the lock held. While it gives nothing, helps to make rows, or waits."""
        waiting = False
        while True:
            with self._state:
                ended = bool(self._failure or self._closed)
                taken = None if ended else take()
                if waiting and (ended or taken):
                    self._decoding += 1
                    self._blocked -= 1
                if ended:
                    raise _StreamEndedError from self._failure
                if taken:
                    return taken
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

    def _next_batch(self, *, wait: bool) -> Batch | None:
        """The next batch to run; None where the stream has ended, or nothing is ready and `wait` is false."""
        with self._state:
            while not self._failure:
                batch = self._rack.ready.popleft() if self._rack.ready else None
                stuck = self._decoding == 0 and (self._blocked == 0 or self._outstanding == 0)
                if batch is None and stuck and (self._blocked or not (self._window or self._feed)):
                    batch = self._rack.fullest()
                    if batch is None and self._blocked:
                        self._state.notify_all()
                if batch is not None:
                    self._outstanding += 1
                    return batch
                if self._closed or not wait:
                    return None
                self._state.wait()
            return None

    def _model_loop(self) -> None:
        """Keeps one batch on the device while the one before is being brought back."""
        under_way: Started | None = None
        try:
            while True:
                batch = self._next_batch(wait=under_way is None)
                if batch is None and under_way is None:
                    return
                started = self._forward.start(batch) if batch is not None else None
                if under_way is not None:
                    answered = self._forward.finish(under_way)
                    with self._state:
                        if answered.slots < len(answered.batch.items):
                            self._rack.limit(answered.batch.shape, answered.slots)
                        self._to_encode.append(answered)
                        # Of several that wait, only the one that makes small images may be free to take it.
                        self._state.notify(len(self._threads) if self._small_under_way else 1)
                under_way = started
        except BaseException as error:  # noqa: BLE001 - the per-actor boundary: every waiting list is told
            self._break(error)

    # ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _encode(self, answered: Answered) -> None:
        batch = answered.batch
        try:
            rows: list[tuple[Work, dict[str, Any]]] = []
            items = [item for item in batch.items if item is not None]
            for item, answer in zip(items, answered.answers, strict=True):
                if isinstance(item, _Tile):
                    if (row := self._tile_row(item, answer, answered.infer_ms)) is not None:
                        rows.append((item.owner.work, row))
                else:
                    row = self._row(item, item.picture, answer, answered.infer_ms)
                    rows.append((item.work, row))
            for work in {id(work): work for work, _ in rows}.values():
                self._emit(work, [row for owner, row in rows if owner is work])
        except BaseException as error:  # noqa: BLE001 - the per-actor boundary: every waiting list is told
            self._break(error)
        finally:
            with self._state:
                self._rack.retire(batch)
                self._outstanding -= 1
                self._state.notify_all()

    def _row(self, item: _Item | _Tiled, picture: Picture, answer: Any, infer_ms: float) -> dict[str, Any]:
        """The row of an image that was decoded. `answer`: a prediction, a Mosaic, or an exception."""
        began_s = time.perf_counter()
        ref = item.work.ref(item.row)
        try:
            if isinstance(answer, Exception):
                raise answer
            prediction = self._segmenter.assemble(answer) if isinstance(answer, (Mosaic, DetectionMosaic)) else answer
            row = self._rows_of.ok(ref, item.blob, picture, prediction)
        except Exception as error:  # noqa: BLE001 - the per-image boundary: it becomes a row
            row = self._rows_of.error(ref, item.blob, *_blame(error)) | picture._asdict()
        row["processed_at"] = dt.datetime.now(dt.UTC)
        row |= item.timings
        row["infer_ms"] = infer_ms
        row["encode_ms"] = (time.perf_counter() - began_s) * 1e3
        return row

    def _tile_row(self, tile: _Tile, answer: Any, infer_ms: float) -> dict[str, Any] | None:
        """The whole image's row, with its last tile or its first that failed; None before and after."""
        owner = tile.owner
        if owner.is_settled:
            return None
        assert owner.picture is not None
        # Lost updates between threads cost a figure its last digit, and a progress bar a tile, not a row.
        owner.infer_ms += infer_ms
        try:
            if isinstance(answer, Exception):
                raise answer
            whole = owner.mosaic.add(tile.window, answer)
            owner.tiles_done += 1
            if not whole:
                return None
            result: Any = owner.mosaic
        except Exception as error:  # noqa: BLE001 - the per-image boundary: it becomes a row
            result = error
        return self._row(owner, owner.picture, result, owner.infer_ms) if self._settle(owner) else None

    def _settle(self, tiled: _Tiled) -> bool:
        """True for the first who asks: the image is no more in tiles, and its row is his to make."""
        first = tiled.settle()
        if first:
            self._in_tiles.pop(id(tiled), None)
        return first

    def _emit(self, work: Work, rows: list[dict[str, Any]]) -> None:
        if self._failure:
            return
        with work.lock:
            work.add_rows(rows)
            work.left[0] -= len(rows)
            finished = work.left[0] == 0
        with self._state:
            self._rows += len(rows)
            self._errors += sum(row["status"] == "error" for row in rows)
            if work.watched:
                failed = [row for row in rows if row.get("error_kind") in self._world_kinds]
                self._breaker.note(len(rows), len(failed), failed[0]["error_message"] if failed else "")
            tripped = self._breaker.tripped
            if finished and not tripped:
                self._live.pop(id(work), None)
        if tripped:
            self._break(WorldFailingError.like(self._breaker.example))
        elif finished and not work.done.done():
            work.done.set_result(None)

    def _break(self, error: BaseException) -> None:
        level = logging.INFO if isinstance(error, WorldFailingError) else logging.ERROR  # that one speaks for itself
        log.log(level, "the stream broke: %r", error, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)
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


def _blame(error: Exception) -> tuple[str, str]:
    """`error_kind` and message of what a model, or the work after it, did to one image."""
    message = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return "out_of_memory", (
            "even alone in its batch this image is too large for the device's memory; it would take less in tiles, "
            f"or in smaller ones (--set size_policy.kind=tile, size_policy.tile_px): {message}"
        )
    return "model_failed", message
