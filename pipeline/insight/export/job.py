"""An export from end to end. Owns: what may be asked, the order of things, and the counts. Must not know: how a format
looks, SQL, where its state is kept.

The list of rows is frozen first; then piece after piece is made and receipted; then the index files are put together.
The same command continues what was killed and skips pieces that have their receipts. What comes out depends on the
table, the images and the question alone: the same bytes, however often it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.insight.export.coco import Coco
from pipeline.insight.export.hugging_face import HuggingFace
from pipeline.insight.export.journal import Asked, ExportPlan, Journal, Receipt
from pipeline.insight.export.label_studio import LabelStudio
from pipeline.insight.export.names import file_stem, image_suffix
from pipeline.insight.export.originals import Originals
from pipeline.insight.export.overlays import Overlays
from pipeline.insight.export.png import Png
from pipeline.insight.export.rows import Piece, RowReader, list_digest, pieces
from pipeline.insight.export.selection import Selection, choose, read_subject
from pipeline.insight.export.shape import Format, Index, Kind, Made, Source, Stream, Subject, Unavailable
from pipeline.insight.export.yolo import Yolo
from pipeline.storage import normalize_uri, open_storage
from pipeline.table.scratch import scratch_folder

_COLUMNS = ("image_uri", "image_etag", "image_format", "width", "height", "task")
_AT_ONCE = 8
_PIECE_BYTES = 64 << 20
#: When so many images or more are asked for and most are denied, it is not about these images.
_TELLING = 16
#: Of what is written: pieces of another revision are not taken up again.
_REVISION = 1

Listen = Callable[[int, int], None]


class ExportConfig(BaseModel):
    """One `maskmill export` command. Holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dest: str = Field(description="The table: the DEST of earlier segmentations.")
    out: str = Field(description="Where files go: a new or empty folder or URL, or that of the same export.")
    format: Kind = Field(description=f"One of {', '.join(get_args(Kind))}.")
    where: str | None = Field(None, description="An SQL condition on the view `images`: which images.")
    images: bool = Field(False, description="Take the images along, as they are in their source.")
    edge_px: int = Field(2048, ge=16, description="Long edge of an overlay, at most.")
    piece_images: int = Field(256, ge=1, description="Images that are done again at most after a kill.")
    source_profile: str | None = Field(None, description="AWS profile for the images.")
    dest_profile: str | None = Field(None, description="AWS profile for the table.")
    out_profile: str | None = Field(None, description="AWS profile for OUT.")


class ExportOutcome(NamedTuple):
    """What is in OUT. `skipped`: images by the reason why they are not; `error` are rows without a mask, the others are
    named in `skipped.jsonl`. `was_there`: nothing was left to do."""

    out: str
    format: Kind
    model: str
    version: str
    images: int
    annotations: int
    skipped: dict[str, int]
    was_there: bool


def export(config: ExportConfig, *, listen: Listen | None = None) -> ExportOutcome:
    """Writes the masks of `config.dest` to `config.out` in a format of other tools.

    Changes nothing in the table. `images` + everything in `skipped` is exactly what the condition chooses of the view
    `images`. Images that are gone, replaced, denied or cannot be decoded are left out and counted, where the format or
    `images` needs them. The same call continues after any kill, on the list that was frozen first, and skips what has
    its receipt; on a finished export it does nothing, as long as the table gives the same list. Memory: a few times 64
    MB of rows and images, or one image, and a Part where the table is remote. `listen` is told images done, and in all.

    Raises UsageError for a condition that is none or chooses nothing, masks of several models, and an OUT that holds
    anything else; InfrastructureError and StorageError where a store fails, or no image at all can be had: the same
    call continues.
    """
    dest, out = normalize_uri(config.dest).rstrip("/"), normalize_uri(config.out).rstrip("/")
    for name in ("segments", "runs", "evaluations"):
        if f"{out}/".startswith(f"{dest}/{name}/"):
            raise UsageError(f"--out is {config.out!r}, inside the table itself: give another folder")
    table = open_storage(dest, profile=config.dest_profile)
    journal = Journal(open_storage(out, profile=config.out_profile), out)
    asked = Asked(
        dest=dest, format=config.format, where=config.where, images=config.images, edge_px=config.edge_px,
        piece_images=config.piece_images,
    )  # fmt: skip
    with scratch_folder() as scratch:
        list_path = scratch / "list.parquet"
        finished = journal.finished()
        if finished is not None:
            return _was_there(config, asked, journal, finished, list_path)
        plan = journal.open_plan()
        if plan is None:
            journal.check_empty()
            chosen = choose(
                table, dest, config.where, list_path, with_images=_needs_images(config), profile=config.dest_profile
            )
            plan = _freeze(journal, asked, chosen, config)
        if plan.asked != asked:
            raise _other(config, plan.asked)
        journal.fetch_list(plan, list_path)
        subject = read_subject(
            table, dest, plan.run_id, model=plan.model, version=plan.version, task=plan.task,
            with_images=config.images, out=out,
        )  # fmt: skip
        format_ = _format(config, subject)
        reader = RowReader(table, dest, dict.fromkeys((*_COLUMNS, *format_.columns)))
        work = _Work(config, plan, list_path, journal, format_)
        work.make_pieces(reader, listen)
        return work.assemble(out)


class _Work:
    """The pieces of one export."""

    def __init__(
        self, config: ExportConfig, plan: ExportPlan, list_path: Path, journal: Journal, makes: Format
    ) -> None:
        self._config = config
        self._plan = plan
        self._list_path = list_path
        self._journal = journal
        self._format = makes
        self._originals = Originals(config.source_profile)
        text = json.dumps([_REVISION, plan.model_dump(mode="json")], sort_keys=True)
        self._asked = hashlib.sha256(text.encode()).hexdigest()

    def make_pieces(self, reader: RowReader, listen: Listen | None) -> None:
        """Those that have no receipt yet."""
        done, made = self._journal.done(), 0
        with ThreadPoolExecutor(_AT_ONCE, "export") as pool:
            for piece in self._pieces():
                if piece.digest not in done:
                    self._make_piece(piece, reader.read(piece), pool)
                made += len(piece.rows)
                if listen:
                    listen(made, self._plan.chosen)

    def assemble(self, out: str) -> ExportOutcome:
        """The index files and the counts, from the receipts."""
        images = annotations = 0
        skipped: Counter[str] = Counter({"error": self._plan.error_rows} if self._plan.error_rows else {})
        streams: list[tuple[str, tuple[str, ...]]] = []
        for digest, receipt in self._journal.receipts(piece.digest for piece in self._pieces()):
            images += receipt.images
            annotations += receipt.annotations
            skipped.update(receipt.skipped)
            streams.append((digest, receipt.streams))
        if not images:
            raise InfrastructureError(
                f"none of the {self._plan.chosen:,} images could be had: {reasons(skipped)}. Give them back, or "
                "--source-profile, and a new --out"
            )
        indexes = self._format.indexes()
        if images < self._plan.chosen:
            indexes.append(Index("skipped.jsonl", (Stream("skipped"),)))
        for index in indexes:
            self._journal.write_index(index, lambda stream: (digest for digest, names in streams if stream in names))
        counts = {"images": images, "annotations": annotations, "skipped": dict(sorted(skipped.items()))}
        self._journal.finish(counts | self._plan.model_dump(mode="json"))
        return _outcome(self._config, out, self._plan.model_dump() | counts, was_there=False)

    def _pieces(self) -> Any:
        return pieces(self._list_path, self._asked, images=self._config.piece_images, size_bytes=_PIECE_BYTES)

    def _make_piece(self, piece: Piece, rows: Sequence[Mapping[str, Any]], pool: ThreadPoolExecutor) -> None:
        futures = [pool.submit(self._make, row, piece.first_image_id + index) for index, row in enumerate(rows)]
        lines: dict[str, list[bytes]] = {}
        records: list[Mapping[str, Any]] = []
        skipped: Counter[str] = Counter()
        annotations = 0
        try:
            for row, future in zip(rows, futures, strict=True):
                try:
                    made = future.result()
                except Unavailable as error:
                    skipped[error.reason] += 1
                    lines.setdefault("skipped", []).append(_skip_line(row["image_uri"], error))
                    continue
                annotations += made.annotations
                for stream, some in made.lines.items():
                    if some:
                        lines.setdefault(stream, []).extend(some)
                if made.record is not None:
                    records.append(made.record)
        finally:
            for future in futures:
                future.cancel()
        if len(rows) >= _TELLING and skipped["denied"] * 2 > len(rows):
            raise InfrastructureError(
                f"{skipped['denied']} of {len(rows)} images are denied, such as {rows[0]['image_uri']!r}: check the "
                "credentials (--source-profile); the same command continues"
            )
        for path, data in self._format.gather(records, piece.digest):
            self._journal.put(path, data)
        receipt = Receipt(
            images=len(rows) - skipped.total(), annotations=annotations, skipped=dict(sorted(skipped.items())),
            streams=tuple(sorted(lines)),
        )  # fmt: skip
        self._journal.finish_piece(piece.digest, lines, receipt)

    def _make(self, row: Mapping[str, Any], image_id: int) -> Made:
        """Of one image: makes its files and puts them."""
        stem = file_stem(row["image_uri"])
        name = stem + image_suffix(row["image_format"])
        data = self._originals.data(row) if _needs_images(self._config) else None
        made = self._format.make(Source(row, image_id, stem, name, data))
        for path, content in made.files:
            self._journal.put(path, content)
        if self._config.images and data is not None and self._config.format != "hf":
            self._journal.put(f"images/{name}", data)
        return made._replace(files=())


def reasons(skipped: Mapping[str, int]) -> str:
    """`3 gone, 1 replaced`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


def _needs_images(config: ExportConfig) -> bool:
    return config.images or config.format == "overlay"


def _format(config: ExportConfig, subject: Subject) -> Format:
    if config.format == "overlay":
        return Overlays(subject, edge_px=config.edge_px)
    kinds: dict[str, Callable[[Subject], Format]] = {
        "coco": Coco, "png": Png, "yolo": Yolo, "hf": HuggingFace, "labelstudio": LabelStudio,
    }  # fmt: skip
    return kinds[config.format](subject)


def _freeze(journal: Journal, asked: Asked, chosen: Selection, config: ExportConfig) -> ExportPlan:
    plan = ExportPlan(
        asked=asked, list_digest=list_digest(chosen.list_path), chosen=chosen.images, error_rows=chosen.error_rows,
        model=chosen.model, version=chosen.version, task=chosen.task, run_id=chosen.run_id,
    )  # fmt: skip
    try:
        return journal.freeze(plan, chosen.list_path)
    except StorageError as error:
        if "://" in config.out:
            raise
        raise UsageError(f"--out cannot be written: {error}") from error


def _was_there(
    config: ExportConfig, asked: Asked, journal: Journal, finished: Mapping[str, Any], list_path: Path
) -> ExportOutcome:
    """The outcome of an export that is finished, if it is this one and still the same."""
    before = Asked.model_validate(finished["asked"])
    if before != asked:
        raise _other(config, before)
    table = open_storage(asked.dest, profile=config.dest_profile)
    choose(table, asked.dest, config.where, list_path, with_images=_needs_images(config), profile=config.dest_profile)
    if list_digest(list_path) != finished["list_digest"]:
        raise UsageError(f"{config.out} holds this export of the table as it was before: give a new --out")
    journal.clear()
    return _outcome(config, normalize_uri(config.out).rstrip("/"), finished, was_there=True)


def _other(config: ExportConfig, there: Asked) -> UsageError:
    where = f" --where {there.where!r}" if there.where is not None else ""
    images = " --images" if there.images else ""
    return UsageError(
        f"{config.out} holds another export, of {there.dest} --format {there.format}{where}{images}: give a new --out"
    )


def _outcome(config: ExportConfig, out: str, body: Mapping[str, Any], *, was_there: bool) -> ExportOutcome:
    return ExportOutcome(
        out, config.format, body["model"], body["version"], body["images"], body["annotations"], body["skipped"],
        was_there,
    )  # fmt: skip


def _skip_line(uri: str, error: Unavailable) -> bytes:
    body = {"image_uri": uri, "reason": error.reason, "message": str(error)}
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
