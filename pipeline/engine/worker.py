"""A worker: one process's Segmenter and Stream, fed with shards. Owns: a shard's way from references to a committed
Part. Must not know: Ray, leases, planning, other workers.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from models.preprocessing import picture_statistics
from models.tally import tally
from pipeline.engine.breaker import world_kinds
from pipeline.engine.forward import SegmenterLike
from pipeline.engine.messages import Device, Receipt, ShardTask, StreamCounts, WorkerSpec, code_digest
from pipeline.engine.rows import Ref, RowMaker
from pipeline.engine.stream import Stream
from pipeline.errors import InfrastructureError, ModelError
from pipeline.machine import cores
from pipeline.storage import Blob, Storage, open_storage, store_root
from pipeline.table.parts import PartBuilder, commit

log = logging.getLogger(__name__)

_SOFTWARE = (
    "maskmill", "torch", "torchvision", "segmentation-models-pytorch", "timm", "numpy", "scipy", "scikit-image",
    "opencv-python-headless", "pillow", "simplejpeg", "tifffile", "imagecodecs",
    "pycocotools", "connected-components-3d", "numba", "llvmlite", "zlib-ng", "pyarrow",
    "duckdb", "obstore", "ray",
)  # fmt: skip


def describe_device() -> Device:
    """This process's device, as the driver needs it to freeze a run."""
    import torch

    from models.devices import default_device, supports_bf16

    device = default_device()
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    software = {"python": platform.python_version()}
    for package in _SOFTWARE:
        try:
            software[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Device(socket.gethostname(), device, name, supports_bf16(device), cores(), software)


def cpu_name() -> str:
    """As its maker calls it, where Linux says so: `AMD EPYC 9R14`."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


class Worker:
    """One Segmenter, resident on its device, and the Stream around it.

    `run` may be called from several threads; the shards then share batches and the pipeline never runs dry between
    them.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        model: bytes,
        *,
        load: Callable[..., SegmenterLike] | None = None,
        on_rows: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None,
    ) -> None:
        here = code_digest()
        if here != spec.code_digest:
            raise InfrastructureError(
                f"{socket.gethostname()} runs Maskmill code {here}, the driver runs {spec.code_digest}: "
                "install the same version on every node"
            )
        # What it says of a damaged file is in that image's row already.
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        self._spec = spec
        self._on_rows = on_rows
        segmenter = (load or load_segmenter)(spec, model)
        self._card_json = segmenter.card.model_dump_json()
        self._node = socket.gethostname()
        self._dest = open_storage(spec.dest, profile=spec.dest_profile)
        self._dest.create_only_is_atomic = spec.create_only
        stamp = {
            "model_version": spec.model_version,
            "settings_digest": spec.settings_digest,
            "run_id": spec.run_id,
            "node": self._node,
            "task": segmenter.card.task,
        }
        self._stores: dict[str, Storage] = {}
        self._world_kinds = world_kinds(listed=spec.stream.listed)
        self._rows_of = RowMaker(segmenter, stamp)
        # The first array looks for pandas, the first figures compile their machine code: not in the middle of a shard.
        pa.array([], pa.null())
        picture_statistics(np.zeros((1, 1, 3), np.uint8))
        tally(np.zeros((1, 1), np.uint8))
        self._stream = Stream(segmenter, fetch=self._fetch, config=spec.stream, stamp=stamp)

    def run(self, task: ShardTask) -> Receipt:
        """Does `task` and commits its Part, unless the receipt says that it is doubtful. Raises StorageError where the
        commit fails, WorldFailingError where the world does; then this worker is of no more use.

        Safe to retry: a Part is never replaced.
        """
        builder = PartBuilder(model_name=self._spec.model_name, card_json=self._card_json)
        refs = task.refs
        if task.killers:
            message = "the process died each time that it touched this image"
            for index in sorted(task.killers):
                one = refs.slice(index, 1).to_pylist()[0]
                ref = Ref(one["uri"], one["etag"], one["attempt"], one["size_bytes"])
                builder.add([self._rows_of.error(ref, None, "crashed_worker", message)])
            refs = refs.take(pa.array([i for i in range(len(refs)) if i not in task.killers], pa.int64()))
        world_failures = 0
        example = ""

        def add_rows(rows: Sequence[Mapping[str, Any]]) -> None:
            nonlocal world_failures, example
            failed = [row for row in rows if row.get("error_kind") in self._world_kinds]
            world_failures += len(failed)
            example = failed[0]["error_message"] if failed else example
            builder.add(rows)
            self._on_rows(rows)

        self._stream.submit(refs, add_rows, watched=not (task.probe or task.accept)).result()
        part = builder.finish()
        receipt = Receipt(
            task.ordinal,
            part.rows,
            part.data.size,
            False,
            self._node,
            self._stream.counts(),
            world_failures,
            world_example=example,
        )
        if task.probe:
            return receipt
        if world_failures * 2 > part.rows and not task.accept:
            return receipt._replace(doubtful=True)
        return receipt._replace(created=commit(self._dest, task.part_uri, part))

    def _fetch(self, uri: str) -> Blob:
        """A manifest may name several stores: one client for each scheme and bucket."""
        root = store_root(uri)
        store = self._stores.get(root)
        if store is None:
            store = self._stores.setdefault(root, open_storage(root, profile=self._spec.source_profile))
        return store.get(uri)

    def counts(self) -> StreamCounts:
        """A snapshot, safe at any time."""
        return self._stream.counts()

    def close(self) -> None:
        """Ends the stream's threads."""
        self._stream.close()


def load_segmenter(spec: WorkerSpec, model: bytes) -> SegmenterLike:
    """The real model, on this process's device, with the frozen precision and thread count."""
    import cv2
    import torch

    from models.architectures import check_sizes
    from models.file import load_module
    from models.overrides import with_settings
    from models.segmenter import Segmenter, default_device

    cv2.setNumThreads(1)
    torch.set_num_threads(spec.threads)
    # fp32 means fp32: TensorFloat-32 would make the answer depend on the kind of GPU.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        card, module = load_module(model)
        card = with_settings(card, spec.card_settings)
        check_sizes(card, module)
        return Segmenter(module, card, device=default_device(), precision=spec.precision, compile=spec.compile)
    except ValueError as error:
        raise ModelError(f"model {spec.model_name} cannot run here: {error}") from error
