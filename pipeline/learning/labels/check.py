"""What may be wrong with a data set, found before it costs a training run. Owns: the checks and their report.
Must not know: layouts, networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from pydantic import BaseModel, ConfigDict

from pipeline.corpus.decode import decode
from pipeline.errors import ImageError, StorageError
from pipeline.learning.dataset import MAX_PIXELS
from pipeline.learning.labels.place import in_order
from pipeline.learning.labels.source import LabelSource, Layout, open_labels
from pipeline.learning.labels.splits import Entry, Splitting
from pipeline.learning.labels.truth import IGNORE_ID, LabelError, Labels

Kind = Literal[
    "missing_image",
    "missing_label",
    "size_mismatch",
    "unknown_class",
    "empty_mask",
    "duplicate",
    "unreadable",
    "empty_split",
]
_SHOWN_OF_A_KIND = 10


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(_Frozen):
    """One thing that is wrong, with one image; `empty_split`: with one split."""

    kind: Kind
    #: An error breaks training or makes its figures wrong; a warning may be meant so.
    severity: Literal["error", "warning"]
    #: Of the image, or of the split.
    name: str
    detail: str


class ClassCount(_Frozen):
    """How often a class occurs."""

    name: str
    pixels: int
    #: Of the pixels that are not ignored, 0..1.
    share: float
    images: int
    #: None where no objects are told apart. Crowds are not counted.
    objects: int | None
    #: Images with the class, by split.
    images_by_split: dict[str, int]


class LabelReport(_Frozen):
    """What was found in all splits of a data set."""

    source: str
    layout: Layout
    images: int
    images_by_split: dict[str, int]
    ignored_pixels: int
    classes: tuple[ClassCount, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether it may be trained on: there is no error."""
        return not any(problem.severity == "error" for problem in self.problems)

    def text(self) -> str:
        """The report in lines for a terminal of any width above 60; long lists are cut short, and say so."""
        splits = ", ".join(f"{split} {count}" for split, count in self.images_by_split.items())
        errors = sum(problem.severity == "error" for problem in self.problems)
        lines = [f"{self.source} ({self.layout}): {self.images} images; {splits or 'no splits'}"]
        lines += ["", *self._class_lines(), ""]
        for kind in dict.fromkeys(problem.kind for problem in self.problems):
            found = [problem for problem in self.problems if problem.kind == kind]
            lines += [f"{one.severity:7} {kind}: {one.name}: {one.detail}" for one in found[:_SHOWN_OF_A_KIND]]
            if len(found) > _SHOWN_OF_A_KIND:
                lines.append(f"        {kind}: {len(found) - _SHOWN_OF_A_KIND} more")
        lines.append(f"{errors} errors, {len(self.problems) - errors} warnings")
        return "\n".join(lines)

    def _class_lines(self) -> Iterator[str]:
        width = max([len(one.name) for one in self.classes] + [5])
        heads = [f"{split} images" for split in self.images_by_split]
        yield f"{'class':{width}}  % pixels   images  objects  " + "  ".join(heads)
        for one in self.classes:
            objects = "-" if one.objects is None else str(one.objects)
            counts = [f"{one.images_by_split[split]:{len(split) + 7}}" for split in self.images_by_split]
            yield f"{one.name:{width}}  {100 * one.share:8.3f}  {one.images:7}  {objects:>7}  " + "  ".join(counts)


class _Finding(NamedTuple):
    """What one image and its label say."""

    name: str
    problems: list[Problem]
    digest: str | None
    #: int64 [classes], and the objects of each class.
    pixels: np.ndarray
    objects: np.ndarray
    ignored: int


def check_labels(
    source: str | Path | LabelSource,
    *,
    layout: Layout | None = None,
    splitting: Splitting | None = None,
    model: str | None = None,
    profile: str | None = None,
    used: Sequence[str] = ("train", "val"),
) -> LabelReport:
    """Reads every labelled image and its label once, and reports what is wrong with them. `used`: the splits that
    training takes.

    Errors: a split of `used` that names no image; an image that is missing or cannot be decoded; a label that is
    missing where a split names its image, or where every image should have one; sizes that differ; ids that are no
    class; one image, by its bytes, in two splits. Warnings: another split without images, images without a label that
    no split names, labels with nothing in them, one image twice in a split, labels that tell no objects apart where
    others do. Raises UsageError where it is no data set at all, StorageError where storage fails.
    """
    if isinstance(source, str | Path):
        source = open_labels(source, layout=layout, splitting=splitting, model=model, profile=profile)
    opened: LabelSource = source
    split_of: dict[str, list[str]] = {}
    for split, names in opened.splits.items():
        for name in names:
            split_of.setdefault(name, []).append(split)
    findings = list(in_order(lambda entry: _look_at(opened, entry), opened.entries.values()))
    problems = [
        *_empty_splits(opened, used),
        *_gaps(opened, split_of),
        *(problem for finding in findings for problem in finding.problems),
        *_duplicates(findings, split_of),
    ]
    return LabelReport(
        source=opened.title,
        layout=opened.layout,
        images=len(opened.entries),
        images_by_split={split: len(names) for split, names in opened.splits.items()},
        ignored_pixels=sum(finding.ignored for finding in findings),
        classes=tuple(_class_counts(opened, findings, split_of)),
        problems=tuple(problems),
    )


def _look_at(source: LabelSource, entry: Entry) -> _Finding:
    classes = len(source.class_names)
    pixels, objects = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    problems: list[Problem] = []
    digest, size, ignored = None, None, 0

    def report(kind: Kind, detail: str, severity: Literal["error", "warning"] = "error") -> None:
        problems.append(Problem(kind=kind, severity=severity, name=entry.name, detail=detail))

    try:
        data = source.image_bytes(entry.name)
        digest = hashlib.sha256(data).hexdigest()
        size = decode(data, max_pixels=MAX_PIXELS).pixels.shape[:2]
    except ImageError as error:
        report("unreadable", f"the image cannot be used: {error}")
    except LabelError as error:
        report(error.kind, str(error))  # type: ignore[arg-type]
    except StorageError as error:
        if error.kind != "missing":
            raise  # a missing image is among the gaps, or below
        if all(gap.name != entry.name for gap in source.gaps):
            report("missing_image", str(error))
    try:
        item = source.item(entry)
        labels = source.labels(item)
        class_ids = labels.class_ids()
    except LabelError as error:
        report(error.kind, str(error))  # type: ignore[arg-type]
        return _Finding(entry.name, problems, digest, pixels, objects, ignored)
    if size is not None and size != (item.height, item.width):
        report(
            "size_mismatch",
            f"the image is {size[1]} x {size[0]}, its label {item.width} x {item.height} (width x height)",
        )
    for raw, count in labels.unknown.items():
        report("unknown_class", f"id {raw} ({count} {'objects' if source.layout == 'coco' else 'pixels'}) is no class")
    counts = np.bincount(class_ids.ravel(), minlength=256)
    ignored, pixels = int(counts[IGNORE_ID]), counts[:classes]
    for one in labels.objects or ():
        objects[one.class_id] += not one.is_crowd
    if source.has_objects and labels.objects is None:
        report(
            "missing_label", "its classes are labelled, and not its objects, as those of other images are", "warning"
        )
    empty = _emptiness(source, labels, pixels)
    if empty and not labels.unknown:
        report("empty_mask", empty, "warning")
    return _Finding(entry.name, problems, digest, pixels, objects, ignored)


def _emptiness(source: LabelSource, labels: Labels, pixels: np.ndarray) -> str | None:
    if source.layout == "coco":
        nothing = sum(int(coco_mask.area(one.rle)) == 0 for one in labels.objects or ())
        if not labels.objects:
            return "it has no object"
        return f"{nothing} of its {len(labels.objects)} objects have no pixel" if nothing else None
    if not pixels.any():
        return "every pixel is ignored"
    if source.background_id is not None and pixels.sum() == pixels[source.background_id]:
        return "every pixel is background or ignored"
    return None


def _empty_splits(source: LabelSource, used: Sequence[str]) -> Iterator[Problem]:
    for split, names in source.splits.items():
        if not names:
            detail = "it names no image" + (": training would use it" if split in used else "")
            severity: Literal["error", "warning"] = "error" if split in used else "warning"
            yield Problem(kind="empty_split", severity=severity, name=split, detail=detail)


def _gaps(source: LabelSource, split_of: dict[str, list[str]]) -> Iterator[Problem]:
    every_image_needs_one = source.layout in ("masks", "cityscapes")
    known = set()
    for gap in source.gaps:
        known.add(gap.name)
        needed = gap.lacks == "image" or gap.name in split_of or every_image_needs_one
        yield Problem(
            kind="missing_image" if gap.lacks == "image" else "missing_label",
            severity="error" if needed else "warning",
            name=gap.name,
            detail=gap.detail,
        )
    for name, splits in split_of.items():
        if name not in source.entries and name not in known:
            detail = f"split {splits[0]!r} names it, and there is no label of that name"
            yield Problem(kind="missing_label", severity="error", name=name, detail=detail)


def _duplicates(findings: Iterable[_Finding], split_of: dict[str, list[str]]) -> Iterator[Problem]:
    names_of: dict[str, list[str]] = {}
    for finding in findings:
        if finding.digest is not None:
            names_of.setdefault(finding.digest, []).append(finding.name)
    for names in names_of.values():
        placed = [(split, name) for name in names for split in split_of.get(name, ())]
        splits = dict.fromkeys(split for split, _ in placed)
        if len(splits) > 1:
            detail = "the same image is in " + " and ".join(f"{split} ({name})" for split, name in placed)
            yield Problem(kind="duplicate", severity="error", name=names[0], detail=detail)
        elif len(names) > 1 or len(placed) > 1:
            detail = f"the same image is there {max(len(names), len(placed))} times: {', '.join(names)}"
            yield Problem(kind="duplicate", severity="warning", name=names[0], detail=detail)


def _class_counts(
    source: LabelSource, findings: list[_Finding], split_of: dict[str, list[str]]
) -> Iterator[ClassCount]:
    pixels = sum((finding.pixels for finding in findings), np.zeros(len(source.class_names), dtype=np.int64))
    objects = sum((finding.objects for finding in findings), np.zeros(len(source.class_names), dtype=np.int64))
    total = max(int(pixels.sum()), 1)
    for class_id, name in enumerate(source.class_names):
        holding = [finding.name for finding in findings if finding.pixels[class_id] or finding.objects[class_id]]
        by_split = dict.fromkeys(source.splits, 0)
        for image in holding:
            for split in split_of.get(image, ()):
                by_split[split] += 1
        yield ClassCount(
            name=name,
            pixels=int(pixels[class_id]),
            share=float(pixels[class_id] / total),
            images=len(holding),
            objects=int(objects[class_id]) if source.has_objects else None,
            images_by_split=by_split,
        )
