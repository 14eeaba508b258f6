"""What is fuzzed: everything that reads bytes which somebody else wrote. Owns: for each reader a corpus to start from,
made by code, and the claim that whatever the bytes are it answers, or raises one of the project's own errors. Must not
know: how bytes are mutated (`__main__`).

Also claimed: what `peek` says of an image's size is what `decode` gives; rows of manifests have absolute URIs. Anything
else that is raised is a finding; so are a hang, a crash of the process and a blow-up of memory, which the fuzzer sees.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from awkward_corpus import _pictures, blocks, encode, oriented, png_with_late_exif
from handmade import CREATED_AT, make_row
from PIL import Image
from tables import Table

from models.architectures import build, untrained_card
from models.card import TilePolicy
from models.file import CARD_KEY, ModelFileError, read_card
from pipeline.corpus.decode import decode, peek
from pipeline.corpus.entries import read_entries
from pipeline.corpus.inventory import find_parts, query_parts, read_parts
from pipeline.corpus.raw import peek_bands, read_bands
from pipeline.corpus.signatures import split_signatures
from pipeline.corpus.windows import open_windows
from pipeline.errors import ImageError, MaskmillError
from pipeline.learning.labels.source import open_labels
from pipeline.registry.history import entry_uri, read_entry, read_state
from pipeline.storage import LISTING_SCHEMA, open_storage
from pipeline.table.parts import PartBuilder

MAX_PIXELS = 1 << 20
_WINDOW_PX = 64
_SCRATCH = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


class Target(NamedTuple):
    """`run` returns, or raises what is a finding."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], None]


def _decode(data: bytes) -> None:
    try:
        pixels = decode(data, max_pixels=MAX_PIXELS).pixels
    except ImageError:
        _quietly(lambda: peek(data))
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert peek(data) == pixels.shape[:2], f"peek says {peek(data)}, decode gives {pixels.shape[:2]}"


def _bands(data: bytes) -> None:
    _quietly(lambda: peek_bands(data))
    _quietly(lambda: read_bands(data, max_pixels=MAX_PIXELS))


def _windows(data: bytes) -> None:
    def read() -> None:
        reader = open_windows(data)
        if reader is None:
            return
        try:
            height, width = min(reader.height, _WINDOW_PX), min(reader.width, _WINDOW_PX)
            places = {(0, 0), (reader.height - height, reader.width - width), (reader.height // 2, 0)}
            for y, x in sorted(places):
                if y + height > reader.height or height * width * reader.bands > MAX_PIXELS:
                    continue
                window = reader.read(y, x, height, width)
                assert window.shape == (height, width, reader.bands) and window.dtype == reader.dtype
        finally:
            reader.close()

    _quietly(read)


def _manifest(data: bytes) -> None:
    """The first byte chooses the kind of file."""
    suffix = (".parquet", ".csv", ".jsonl", ".txt")[data[0] % 4] if data else ".txt"
    with _Folder({f"list{suffix}": data[1:]}) as (uri, storage):

        def read() -> None:
            for batch in read_entries(f"{uri}/list{suffix}", storage):
                rows, _ = split_signatures(batch)
                assert all("://" in text for text in rows.column("uri").to_pylist())

        _quietly(read)


def _inventory(data: bytes) -> None:
    """The manifest, a NUL byte, and its part, which `part.parquet` names."""
    manifest, _, part = data.partition(b"\0")
    with _Folder({"manifest.json": manifest, "part.parquet": part}) as (uri, storage):

        def read() -> None:
            parts = find_parts(f"{uri}/manifest.json", storage, folder=Path(_SCRATCH))
            pa.Table.from_batches(read_parts(parts), LISTING_SCHEMA)
            # As if the store had written what is damaged: then the two may differ, but neither may fail otherwise.
            digests = [hashlib.md5(Path(part.path).read_bytes()).hexdigest() for part in parts]
            signed = [part._replace(md5=digest) for part, digest in zip(parts, digests, strict=True)]
            query = query_parts(signed, where="true")
            if query is not None:
                with duckdb.connect() as connection, contextlib.suppress(duckdb.Error):  # a sentence, in planning
                    assert len(connection.sql(f"SELECT * FROM {query.sql}").to_arrow_table()) == query.rows

        _quietly(read)


def _model_file(data: bytes) -> None:
    """The file as it is; then the same JSON in a header of the right length."""
    for file in (data, _safetensors(data[8:].partition(b"\0")[0])):
        try:
            read_card(file)
        except ModelFileError:
            continue


def _model_card(data: bytes) -> None:
    """The card's JSON. A network of a card that is valid is built, as long as it is a small one."""
    try:
        card = read_card(
            _safetensors(json.dumps({"__metadata__": {CARD_KEY: data.decode("utf-8", "replace")}}).encode())
        )
    except ModelFileError:
        return
    try:
        build(card, blank=True, most_bytes=16 << 20)
    except ValueError:
        return


def _history(data: bytes) -> None:
    with _Folder({"_history/00000001.json": data, "aliases.json": data}) as (uri, storage):
        _quietly(lambda: read_entry(storage, uri, 1))
        _quietly(lambda: read_state(storage, uri, [1], None))
        _quietly(lambda: read_state(storage, uri, [], f"{uri}/aliases.json"))
        assert entry_uri(uri, 1).endswith("/00000001.json")


_LAYOUTS = ("coco", "masks", "voc", "cityscapes", "segments")


def _labels(data: bytes) -> None:
    """The first byte chooses the layout; then a text, a NUL byte and a label image."""
    layout = _LAYOUTS[data[0] % len(_LAYOUTS)] if data else "coco"
    text, _, image = data[1:].partition(b"\0")
    street = "gtFine/train/x/a_gtFine"
    files: dict[str, dict[str, bytes]] = {
        "coco": {"annotations.json": text, "images/a.png": b""},
        "masks": {"classes.json": text, "images/a.png": b"", "masks/a.png": image},
        "voc": {"ImageSets/Segmentation/train.txt": text, "JPEGImages/a.jpg": b"",
                "SegmentationClass/a.png": image, "SegmentationObject/a.png": image},
        "cityscapes": {"leftImg8bit/train/x/a_leftImg8bit.png": b"", f"{street}_labelIds.png": image,
                       f"{street}_instanceIds.png": image, "splits.json": text},
        "segments": {},
    }  # fmt: skip
    with _Folder(files[layout]) as (uri, _):
        if layout == "segments":
            _write_table(uri, image, text)

        def read() -> None:
            labels = open_labels(uri)
            assert labels.layout == layout
            for entry in labels.entries.values():
                _quietly(lambda entry=entry: labels.labels(labels.item(entry)).class_ids())

        _quietly(read)


def _write_table(dest: str, mask: bytes, counts: bytes) -> None:
    """A table of one image, whose mask and whose object's RLE are these."""
    card = untrained_card("tiny", task="instance")
    rle = {"size": [12, 16], "counts": counts}
    thing = {"class_id": card.classes[-1].id, "name": "x", "score": 0.9, "bbox": [0.0] * 4, "area": 9, "rle": rle}
    row = make_row(
        "file:///a.png",
        "e",
        task="instance",
        width=16,
        height=12,
        mask={"bytes": mask, "path": None},
        instances=[thing],
    )
    plan = Table(dest).run(row)
    builder = PartBuilder(model_name=plan.model_name, card_json=card.model_dump_json())
    builder.add([row | {"run_id": plan.run_id}])
    open_storage(dest).put(plan.part_uri(0), bytes(builder.finish().data))


def _image_seeds() -> list[bytes]:
    """Small pictures of every format that is read, good and damaged."""
    small = blocks(16, 12)
    gray16 = Image.fromarray(np.linspace(0, 65535, 192).reshape(12, 16).astype(np.uint16))
    rgba = small.convert("RGBA")
    rgba.putalpha(128)
    seeds = [encode(small, name) for name in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")]
    seeds += [
        encode(image, name)
        for image in (rgba, small.quantize(4), small.convert("1"))
        for name in ("PNG", "TIFF", "GIF")
    ]
    seeds += [
        encode(gray16, "PNG"),
        encode(gray16, "TIFF"),
        encode(small.convert("CMYK"), "JPEG"),
        encode(rgba, "WEBP"),
    ]
    seeds += [encode(small, "JPEG", progressive=True), encode(small, "WEBP", lossless=True), png_with_late_exif(6)]
    seeds += [oriented(6), oriented(5, "WEBP"), oriented(8, "PNG")]
    seeds += [data for data, _ in _pictures().values() if len(data) < 2000]
    return seeds + _tiff_seeds()


def _tiff_seeds() -> list[bytes]:
    """Tiles and strips, planes, predictors, compressions, byte orders, BigTIFF."""
    rng = np.random.default_rng(0)
    color = rng.integers(0, 255, (48, 40, 3), dtype=np.uint8)
    kinds: list[tuple[np.ndarray, dict[str, Any]]] = [
        (color, {"tile": (16, 16), "photometric": "rgb", "compression": "zlib"}),
        (color, {"rowsperstrip": 8, "photometric": "rgb", "compression": "lzw", "predictor": True}),
        (color, {"photometric": "rgb", "compression": "jpeg", "tile": (16, 16)}),
        (color.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate", "compression": "packbits"}),
        (color[:, :, 0].astype(np.uint16), {"photometric": "minisblack", "bigtiff": True, "rowsperstrip": 5}),
        (color[:, :, 0].astype(np.float32), {"photometric": "minisblack", "byteorder": ">", "compression": "zstd"}),
        (color[:, :, 0] > 99, {"photometric": "miniswhite"}),
        (color[:, :, 0], {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}),
    ]
    seeds = []
    for pixels, options in kinds:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, pixels, **options)
        seeds.append(buffer.getvalue())
    return seeds


def _manifest_seeds() -> list[bytes]:
    uris = ["a.jpg", "s3://b/x.jpg", "/abs/ü.png", "../up.jpg", "file:/x.png", "https://u:p@h/a.jpg?sig=1&sv=2"]
    table = pa.table(
        {"uri": uris, "etag": ['"e"', "W/\"f\"", "", "g", "h", "i"], "size_bytes": [1, 2, 3, 4, 5, 6],
         "modified": [CREATED_AT] * 6}
    )  # fmt: skip
    plain = [b'uri,etag,size_bytes,modified\na.jpg,e1,5,2026-01-02T03:04:05Z\n"b,\n.jpg",,,\n', b"path\n/x/y.jpg\n"]
    lines = [b'{"uri": "a.jpg", "etag": "e", "size_bytes": 3}\n{"uri": "b.jpg", "more": [1]}\n', b'"a.jpg"\n"b.jpg"\n']
    return [
        b"\0" + _parquet(table),
        b"\0" + _parquet(table.select(["uri"]), compression="none"),
        *(b"\1" + text for text in plain),
        *(b"\2" + text for text in lines),
        b"\3# a list\n" + "\r\n".join(uris).encode(),
        b"\3\xef\xbb\xbfa.jpg\n",
    ]


def _inventory_seeds() -> list[bytes]:
    part = _parquet(
        pa.table(
            {"bucket": ["b", "b"], "key": ["k/1.jpg", "k/2.jpg"], "size": [1, 2], "e_tag": ["x", "y"],
             "is_latest": [True, False], "is_delete_marker": [False, False], "last_modified_date": [CREATED_AT] * 2}
        )
    )  # fmt: skip
    body = {
        "destinationBucket": "arn:aws:s3:::b",
        "fileFormat": "Parquet",
        "files": [{"key": "part.parquet", "size": 1}],
    }
    return [json.dumps(body).encode() + b"\0" + part, json.dumps(body | {"files": []}).encode() + b"\0"]


def _cards() -> list[str]:
    instance = untrained_card("tiny", task="instance")
    tiled = instance.model_copy(update={"size_policy": TilePolicy(tile_px=64, overlap_px=8)})
    return [untrained_card("tiny").model_dump_json(), instance.model_dump_json(), tiled.model_dump_json()]


def _model_file_seeds() -> list[bytes]:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return [
        _safetensors(json.dumps({"__metadata__": {CARD_KEY: card}, "w": tensor}).encode(), b"\0" * 8)
        for card in _cards()
    ]


def _history_seeds() -> list[bytes]:
    entry = {
        "format": 1, "number": 1, "id": "0", "at": CREATED_AT.isoformat(), "by": "a@b", "action": "push",
        "version": "0123456789ab", "champion_before": None, "aliases": {"champion": "0123456789ab"},
        "former_champions": ["ba9876543210"], "reason": "r", "decision": {"metric": 0.5},
    }  # fmt: skip
    return [json.dumps(entry).encode(), json.dumps(entry["aliases"]).encode()]


def _label_seeds() -> list[bytes]:
    image = {"id": 1, "file_name": "a.png", "height": 12, "width": 16}
    shapes: list[Any] = [
        [[1, 1, 8, 1, 8, 8]],
        {"size": [12, 16], "counts": [10, 20, 162]},
        {"size": [12, 16], "counts": "l5`0"},
        [],
    ]
    coco = {
        "categories": [{"id": 3, "name": "cell"}],
        "images": [image],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 3, "segmentation": shape, "area": 5, "iscrowd": n % 2}
            for n, shape in enumerate(shapes)
        ],
    }
    one_by_one = [coco | {"annotations": [one]} for one in coco["annotations"]]
    classes = {"classes": [{"id": 0, "name": "sky"}, {"id": 2, "name": "sea"}], "ignore_index": 255}
    gray = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16) % 3)
    masks = [encode(gray, "PNG"), encode(gray.convert("P"), "PNG"), encode(gray.convert("1"), "PNG")]
    numbers = Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) // 64 * 1000 + 24000)
    splits = json.dumps({"train": ["train/x/a_leftImg8bit.png"]}).encode()
    return [
        *(b"\0" + json.dumps(body).encode() + b"\0" for body in (coco, *one_by_one)),
        *(b"\1" + json.dumps(body).encode() + b"\0" + mask
          for body, mask in zip((classes, ["a", "b"], classes), masks, strict=True)),
        *(b"\2a\n\0" + mask for mask in masks),
        *(b"\3" + splits + b"\0" + mask for mask in (masks[0], encode(numbers, "PNG"))),
        *(b"\4l5`0\0" + mask for mask in masks),
    ]  # fmt: skip


TARGETS: Mapping[str, Target] = {
    "decode": Target(_image_seeds, _decode),
    "bands": Target(_image_seeds, _bands),
    "windows": Target(_tiff_seeds, _windows),
    "manifest": Target(_manifest_seeds, _manifest),
    "inventory": Target(_inventory_seeds, _inventory),
    "model-file": Target(_model_file_seeds, _model_file),
    "model-card": Target(lambda: [card.encode() for card in _cards()], _model_card),
    "history": Target(_history_seeds, _history),
    "labels": Target(_label_seeds, _labels),
}


def _quietly(read: Callable[[], Any]) -> None:
    """The project's own errors are answers."""
    try:
        read()
    except MaskmillError as error:
        str(error).encode()
    except OSError as error:
        # So Arrow says that a file is damaged, and `read_source` makes a sentence of it.
        if error.errno is not None:
            raise


class _Folder:
    """Files in a folder of their own: its URI and its store."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-", dir=_SCRATCH)
        for name, data in files.items():
            path = Path(self._folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def __enter__(self) -> tuple[str, Any]:
        uri = f"file://{self._folder.name}"
        return uri, open_storage(uri)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _safetensors(header: bytes, rest: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()
