"""What a GPU does for the stream: forward alone and whole stream, against the library as it comes and the chip's limit.

    PYTHONPATH=. python benchmarks/gpu.py [--models NAME ...] [--sizes 512 1024] [--compile] [--seconds 2] [--json FILE]
    PYTHONPATH=. python benchmarks/gpu.py --cpu      tiny inputs on the CPU: only that it runs; so without a GPU

One process, no Ray, no Prefect, no object store, no database, nothing from the network (needed beside torch and
torchvision: numpy, pyarrow, pydantic, opencv, pillow, rich, scipy, scikit-image, tifffile, timm, safetensors, and
segmentation-models-pytorch, pycocotools, connected-components-3d, numba, simplejpeg, zlib-ng); under 8 minutes on an
H200 (what is left at `--budget-s` is skipped, by name). Images are JPEGs made here, on local disk. For each network
and size, images/s:

- `fp32 eager`: the library's network called on a batch that is on the device already, NCHW, as torch is shipped (which
  lets convolutions use TensorFloat-32), and `strict`, without that; detectors with their own post-processing.
- `network`: ours alone, likewise: bf16, channels_last, normalisation folded; and compiled, where asked for.
- `forward`: `Segmenter.submit` and `finish` of batches in host memory, one ahead, as the stream calls them: upload,
  normalise, network, class ids and figures, download.
- `stream`: `pipeline.engine.stream.Stream` over files read through `pipeline.storage`: decode, forward, post-process,
  mask PNG, rows, Parquet bytes.

`of peak` is the arithmetic of the network (torch.utils.flop_counter, 2 for a multiplication and an addition) times the
images/s of `forward`, over what a bf16 product of two large matrices reaches here. Stages are milliseconds an image,
each alone: those of the device for a batch, those of the CPU on one core. Weights are random, but settled so that
masks have regions and detectors find 20 objects.

Goals: stream at least 95 % of forward; forward at least 4 times fp32 eager.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
import torchvision
from architectures import library_input, photos, settled_network
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from models.architectures import architecture, card_for
from models.card import Card
from models.preprocessing import normalize, picture_statistics
from models.segmenter import Segmenter
from models.tally import tally
from pipeline.engine.intake import place_image
from pipeline.engine.messages import StreamConfig
from pipeline.engine.rows import Ref, RowMaker
from pipeline.engine.stream import Stream
from pipeline.storage import Blob, file_uri, open_storage
from pipeline.table.parts import PartBuilder
from pipeline.table.schema import WORK

ARGS: Mapping[str, dict[str, Any]] = {
    "deeplabv3_resnet50": {},
    "unet": {"encoder": "resnet34"},
    "maskrcnn_resnet50_fpn_v2": {},
}
CLASSES, OBJECTS = 21, 20
STAMP = {"model_version": "0" * 12, "settings_digest": "0" * 12, "run_id": "20260101T000000Z-000000", "node": "here"}
UNIQUE_FILES = 48


class Bench:
    """What all measurements share: the device, the clock, and how long each may take."""

    def __init__(self, *, device: str, seconds: float, threads: int, console: Console) -> None:
        self.device, self.seconds, self.threads, self.console = device, seconds, threads, console
        self.on_cuda = device == "cuda"
        self.precision = "bf16"
        #: Calls that are not counted, and those that count at least.
        self._warm, self._least = (2, 3) if self.on_cuda else (0, 1)

    def sync(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds_of(self, action: Callable[[], Any]) -> float:
        """Median of a call, the device's work included; as many calls as fit."""
        for _ in range(self._warm):
            action()
        self.sync()
        taken: list[float] = []
        until_s = time.perf_counter() + self.seconds
        while len(taken) < self._least or time.perf_counter() < until_s:
            began_s = time.perf_counter()
            action()
            self.sync()
            taken.append(time.perf_counter() - began_s)
        return statistics.median(taken)

    def rate_of_many(self, action: Callable[[], Any]) -> float:
        """Calls per second, without waiting for the device between them."""
        once_s = self.seconds_of(action)
        count = max(self._least, int(self.seconds / once_s))
        self.sync()
        began_s = time.perf_counter()
        for _ in range(count):
            action()
        self.sync()
        return count / (time.perf_counter() - began_s)

    def peak_gib(self, action: Callable[[], Any]) -> tuple[Any, float]:
        """What `action` gives, and the most memory that tensors took on the device meanwhile."""
        if not self.on_cuda:
            return action(), 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        answer = action()
        return answer, torch.cuda.max_memory_allocated() / 2**30

    def matmul_flops(self) -> float:
        """FLOP/s of a bf16 matrix product on random data."""
        side = 8192 if self.on_cuda else 512
        left, right = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return 2 * side**3 * self.rate_of_many(lambda: left @ right)


def case_card(name: str, size_px: int, *, tiny: bool) -> Card:
    """The architecture with its defaults; detections limited to what a photo has."""
    names = ("background", *(f"class-{index}" for index in range(1, CLASSES)))
    args = dict(ARGS.get(name, {}))
    fields: dict[str, Any] = {"preprocessing": {"normalization": "imagenet"}}
    if architecture(name).detects:
        fields["postprocessing"] = {"kind": "detections", "top_k": OBJECTS}
        if tiny:
            args |= {"min_size_px": size_px, "max_size_px": size_px}
    return card_for("benchmark", name, args, class_names=names, **fields)


def calm(network: Any) -> None:
    """Takes the finest skip connections out of a U-Net's sums, not out of its work: masks then have regions of a
    plausible size rather than noise, which is dear to encode.
    """
    decoder = getattr(network, "decoder", None)
    for block in getattr(decoder, "blocks", [])[-4:]:
        first = block.conv1[0]
        if first.out_channels < first.in_channels:
            with torch.no_grad():
                first.weight[:, first.in_channels // 2 :] = 0


def write_files(folder: Path, count: int, size_px: int) -> pa.Table:
    """Photo-like JPEGs of quality 90, as a work list."""
    folder.mkdir()
    unique = photos(min(count, UNIQUE_FILES), size_px)
    encoded = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes() for image in unique]
    paths = [folder / f"{index:06d}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(encoded[index % len(encoded)])
    columns = {
        "uri": [file_uri(str(path)) for path in paths],
        "etag": ["x"] * count,
        "size_bytes": [len(encoded[index % len(encoded)]) for index in range(count)],
        "modified": pa.nulls(count, pa.timestamp("us", "UTC")),
        "attempt": [1] * count,
    }
    return pa.table(columns).cast(WORK)


class Case:
    """One network at one size."""

    def __init__(self, bench: Bench, name: str, size_px: int, *, batch: int, tiny: bool) -> None:
        self._bench, self._size_px, self._batch = bench, size_px, batch
        self.card = case_card(name, size_px, tiny=tiny)
        self._detects = architecture(name).detects
        self._images = photos(batch, size_px)
        self._source: Any = settled_network(self.card, self._images)
        calm(self._source)
        self._sizes = np.full((batch, 2), size_px, np.int32)
        self._statistics = np.tile(np.array([0, 1], np.float32), (batch, 1))

    def _copy(self) -> Any:
        return copy.deepcopy(self._source)

    # ── the library ──────────────────────────────────────────────────────────────────────────────────────────────────

    def library(self, *, strict: bool) -> tuple[float, float]:
        """Images/s and GiB."""
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = not strict
        try:
            return self._bench.peak_gib(self._library)
        finally:
            torch.backends.cudnn.allow_tf32 = tf32

    def _library(self) -> float:
        network, inputs = self._on_device()
        with torch.inference_mode():
            return self._batch * self._bench.rate_of_many(lambda: network(inputs))

    def _on_device(self) -> tuple[Any, Any]:
        network = self._copy().to(self._bench.device)
        inputs: Any = library_input(self._images, normalised=not self._detects).to(self._bench.device)
        if self._detects:
            network.roi_heads.score_thresh = self.card.postprocessing.score_threshold  # type: ignore[union-attr]
            network.roi_heads.detections_per_img = OBJECTS
            inputs = list(inputs)
        return network, inputs

    def flops_per_image(self) -> float:
        """Counted on one image."""
        network, inputs = self._on_device()
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network(inputs[:1])
        return float(counter.get_total_flops())

    # ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def segmenter(self, *, compile_it: bool) -> Segmenter:
        bench = self._bench
        return Segmenter(self._copy(), self.card, device=bench.device, precision=bench.precision, compile=compile_it)

    def network(self, segmenter: Segmenter) -> float:
        """Images/s of the network alone; of a detector with what `models.detection` does on the device."""
        inputs = self._inputs(segmenter)
        with torch.inference_mode():
            return self._batch * self._bench.rate_of_many(lambda: self._run_network(segmenter, inputs))

    def _inputs(self, segmenter: Segmenter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            images, sizes, statistics = segmenter._transfer.upload(self._images, self._sizes, self._statistics)
            if not self._detects:
                images = normalize(images, statistics, self.card.preprocessing, dtype=segmenter._dtype)
        return images, sizes, statistics

    def _run_network(self, segmenter: Segmenter, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Any:
        if self._detects:
            return segmenter._detect(inputs[0], inputs[2], self._sizes)
        return segmenter._logits(inputs[0])

    def forward(self, segmenter: Segmenter) -> float:
        """Images/s of submit and finish, one batch ahead."""
        ahead: list[Any] = [segmenter.submit(self._images, self._sizes, self._statistics)]

        def step() -> None:
            ahead.append(segmenter.submit(self._images, self._sizes, self._statistics))
            segmenter.finish(ahead.pop(0))

        rate = self._batch * self._bench.rate_of_many(step)
        segmenter.finish(ahead.pop())
        return rate

    def stream(self, segmenter: Segmenter, refs: pa.Table, warm: pa.Table) -> dict[str, float]:
        """Images/s of files to Parquet bytes, the share of the time that the model's thread spent in the model, and
        bytes of a row."""
        batch_pixels = self._batch * self._size_px**2
        config = StreamConfig(
            batch_size=self._batch,
            batch_pixels=batch_pixels,
            memory_bytes=max(1 << 30, 12 * 3 * batch_pixels),
            threads=self._bench.threads,
        )
        store = open_storage(refs["uri"][0].as_py().rpartition("/")[0])
        stream = Stream(segmenter, fetch=store.get, config=config, stamp=self._stamp())
        try:
            self._part(stream, warm)
            before = stream.counts()
            began_s = time.perf_counter()
            size_bytes = self._part(stream, refs)
            spent_s = time.perf_counter() - began_s
            after = stream.counts()
        finally:
            stream.close()
        if after.errors:
            raise RuntimeError(f"{after.errors} of {after.rows} images failed")
        rows = len(refs)
        return {
            "images_per_s": rows / spent_s,
            "busy": (after.busy_s - before.busy_s) / spent_s,
            "row_bytes": size_bytes / rows,
        }

    def _part(self, stream: Stream, refs: pa.Table) -> int:
        builder = PartBuilder(model_name=self.card.name, card_json=self.card.model_dump_json())
        stream.submit(refs, builder.add).result()
        part = builder.finish()
        assert part.rows == len(refs)
        return int(part.data.size)

    def _stamp(self) -> dict[str, str]:
        return STAMP | {"task": self.card.task}

    # ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def stages_ms(self, segmenter: Segmenter, refs: pa.Table) -> dict[str, float]:
        """Milliseconds an image of each stage alone; `cpu` ones on one core."""
        bench, found = self._bench, {}

        def note(name: str, action: Callable[[], Any]) -> None:
            found[name] = bench.seconds_of(action) / self._batch * 1e3

        inputs = self._inputs(segmenter)
        with torch.inference_mode():
            note("upload", lambda: segmenter._transfer.upload(self._images, self._sizes, self._statistics))
            if self._detects:
                note("normalise and network", lambda: self._run_network(segmenter, inputs))
                results: Any = self._run_network(segmenter, inputs)
            else:
                images, _, statistics = segmenter._transfer.upload(self._images, self._sizes, self._statistics)
                settings = self.card.preprocessing
                note("normalise", lambda: normalize(images, statistics, settings, dtype=segmenter._dtype))
                note("network", lambda: self._run_network(segmenter, inputs))
                logits = self._run_network(segmenter, inputs).clone()
                note("figures", lambda: segmenter._reduce(logits, inputs[1], self._sizes, self._sizes))
                results = segmenter._reduce(logits, inputs[1], self._sizes, self._sizes)
            note("download", lambda: segmenter._transfer.download(results))
        found |= self._cpu_stages_ms(segmenter, refs)
        return found

    def _cpu_stages_ms(self, segmenter: Segmenter, refs: pa.Table) -> dict[str, float]:
        """Of a few images, one after the other in one thread."""
        uris = refs["uri"].to_pylist()[: min(self._batch, 8)]
        store = open_storage(uris[0].rpartition("/")[0])
        maker = RowMaker(segmenter, self._stamp())
        canvas = np.empty((*segmenter.canvas(self._size_px, self._size_px), 3), np.uint8)
        pending = segmenter.submit(self._images, self._sizes, self._statistics)
        predictions = segmenter.finish(pending)
        blobs: list[Blob] = []
        pictures: list[Any] = []
        picture_statistics(np.zeros((1, 1, 3), np.uint8))  # the first figures of a process compile their machine code
        tally(np.zeros((1, 1), np.uint8))
        spent = {"cpu read": 0.0, "cpu decode": 0.0, "cpu rows": 0.0}

        def timed(name: str, action: Callable[[], Any]) -> Any:
            began_s = time.thread_time()
            answer = action()
            spent[name] += (time.thread_time() - began_s) * 1e3 / len(uris)
            return answer

        size = {"height": self._size_px, "width": self._size_px, "max_pixels": 10**9}
        for uri in uris:
            blobs.append(timed("cpu read", lambda uri=uri: store.get(uri)))
            pictures.append(timed("cpu decode", lambda: place_image(segmenter, blobs[-1].data, canvas, **size)[1]))
        for uri, blob, picture, prediction in zip(uris, blobs, pictures, predictions, strict=False):
            ref = Ref(uri, "x", 1, blob.size_bytes)
            timed("cpu rows", lambda r=ref, b=blob, p=picture, a=prediction: maker.ok(r, b, p, a))
        return spent


def measure(bench: Bench, name: str, size_px: int, options: argparse.Namespace, peak_flops: float) -> dict[str, Any]:
    batch = max(1, options.batch_pixels // size_px**2)
    case = Case(bench, name, size_px, batch=batch, tiny=options.cpu)
    found: dict[str, Any] = {"network": name, "size_px": size_px, "batch": batch}
    found["flops_per_image"] = case.flops_per_image()
    found["fp32_eager"], found["fp32_eager_gib"] = case.library(strict=False)
    found["fp32_strict"], _ = case.library(strict=True)
    segmenter = case.segmenter(compile_it=False)
    found["network_alone"] = case.network(segmenter)
    found["forward"], found["forward_gib"] = bench.peak_gib(lambda: case.forward(segmenter))
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        count = max(4 * batch, min(options.max_images, int(found["forward"] * bench.seconds * 1.5)))
        refs = write_files(Path(scratch) / "images", count, size_px)
        warm = refs.slice(0, min(count, 2 * batch))
        found["stages_ms"] = case.stages_ms(segmenter, refs)
        found["stream_images"] = count
        runs = [case.stream(segmenter, refs, warm) for _ in range(options.repeat)]
        found["stream"] = statistics.median(run["images_per_s"] for run in runs)
        found["busy"] = statistics.median(run["busy"] for run in runs)
        found["row_bytes"] = runs[0]["row_bytes"]
    found["of_peak"] = found["flops_per_image"] * found["forward"] / peak_flops
    cpu_ms = sum(ms for stage, ms in found["stages_ms"].items() if stage.startswith("cpu"))
    found["cpu_limit"] = bench.threads * 1e3 / cpu_ms
    if options.compile:
        del segmenter
        gc.collect()
        compiled = case.segmenter(compile_it=True)
        found["compiled_network_alone"] = case.network(compiled)
        found["compiled_forward"] = case.forward(compiled)
    return found


def tables(results: list[dict[str, Any]], *, compiled: bool) -> list[Table]:
    rates = Table(title="images/s")
    columns = ["fp32 eager", "strict", "network", "forward", "× eager", "× strict", "stream", "of forward",
               "CPU's limit", "of peak", "GiB, eager", "GiB, ours"]  # fmt: skip
    columns += ["compiled network", "compiled forward"] if compiled else []
    stages = Table(title="milliseconds an image, each stage alone")
    for table, names in ((rates, ["network, batch × pixels", *columns]), (stages, ["network", "stages"])):
        for index, name in enumerate(names):
            table.add_column(name, justify="right" if index and table is rates else "left", overflow="fold")
    for one in results:
        title = f"{one['network']}, {one['batch']} × {one['size_px']}²"
        cells = [
            f"{one['fp32_eager']:.1f}", f"{one['fp32_strict']:.1f}", f"{one['network_alone']:.1f}",
            f"{one['forward']:.1f}", f"{one['forward'] / one['fp32_eager']:.2f}",
            f"{one['forward'] / one['fp32_strict']:.2f}", f"{one['stream']:.1f}",
            f"{one['stream'] / one['forward']:.1%}", f"{one['cpu_limit']:.0f}", f"{one['of_peak']:.1%}",
            f"{one['fp32_eager_gib']:.1f}", f"{one['forward_gib']:.1f}",
        ]  # fmt: skip
        if compiled:
            cells += [f"{one['compiled_network_alone']:.1f}", f"{one['compiled_forward']:.1f}"]
        rates.add_row(title, *cells)
        parts = ", ".join(f"{stage} {ms:.3f}" for stage, ms in one["stages_ms"].items())
        extra = f"model's thread busy {one['busy']:.0%}, {one['row_bytes'] / 1e3:.1f} kB a row"
        stages.add_row(title, f"{parts}; {extra}")
    return [rates, stages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ARGS), metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="PX")
    parser.add_argument("--batch-pixels", type=int, help="pixels of a batch; as runs have on a GPU by default")
    parser.add_argument("--compile", action="store_true", help="measure compiled networks as well: a minute for each")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--repeat", type=int, default=3, help="streams, of which the median counts")
    parser.add_argument("--max-images", type=int, default=20_000, help="files of a stream, at most")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget-s", type=float, default=400.0, help="no network and size begins after this")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--cpu", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()
    began_s = time.monotonic()
    console = Console(width=200 if not sys.stdout.isatty() else None)
    if not options.cpu and not torch.cuda.is_available():
        console.print("No CUDA device that torch can use: tiny, on the CPU, as with --cpu. The figures mean nothing.")
        options.cpu = True
    if options.cpu:
        options.seconds, options.repeat, options.max_images = 0.0, 1, 8
    options.sizes = options.sizes or ([64] if options.cpu else [512, 1024])
    options.batch_pixels = options.batch_pixels or (2 * 64 * 64 if options.cpu else 32 * 512 * 512)
    cv2.setNumThreads(1)
    torch.set_num_threads(options.threads)
    # As runs have it; the library's own default is turned on where that is measured.
    torch.backends.cudnn.allow_tf32 = False
    bench = Bench(
        device="cpu" if options.cpu else "cuda", seconds=options.seconds, threads=options.threads, console=console
    )
    name = torch.cuda.get_device_name() if bench.on_cuda else platform.machine()
    peak_flops = bench.matmul_flops()
    console.print(
        f"{name}, {options.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}; a bf16 matrix product reaches {peak_flops / 1e12:.3g} TFLOP/s"
    )
    results: list[dict[str, Any]] = []
    for size_px in options.sizes:
        for model in options.models:
            if time.monotonic() - began_s > options.budget_s:
                console.print(f"skipped, the time is up: {model}, {size_px}²")
                continue
            results.append(measure(bench, model, size_px, options, peak_flops))
            if options.json:
                options.json.write_text(json.dumps({"device": name, "matmul_flops": peak_flops, "cases": results}))
            console.print(f"{model}, {size_px}²: {time.monotonic() - began_s:.0f} s so far", style="dim")
            gc.collect()
    for table in tables(results, compiled=options.compile):
        console.print(table)


if __name__ == "__main__":
    main()
