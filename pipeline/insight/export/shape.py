"""What a format is. Owns: the values that formats, the journal and the job hand each other. Must not know: any one
format, storage, SQL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

Kind = Literal["coco", "png", "overlay", "yolo", "hf", "labelstudio"]


class ClassInfo(NamedTuple):
    """A class of the model's card."""

    class_id: int
    name: str
    color: tuple[int, int, int]


class Subject(NamedTuple):
    """What an export is of: one version of one model."""

    model: str
    version: str
    task: str
    #: By class id.
    classes: tuple[ClassInfo, ...]
    background_id: int | None
    with_images: bool
    #: Where it goes.
    out: str

    @property
    def foreground(self) -> tuple[ClassInfo, ...]:
        """The classes that are something."""
        return tuple(one for one in self.classes if one.class_id != self.background_id)


class Source(NamedTuple):
    """One image of an export: its row, and what it is called there."""

    row: Mapping[str, Any]
    #: From 1 on, by its place in the frozen list: no other image has it, and some numbers may be of none.
    image_id: int
    #: Without suffix, and with that of the image itself.
    stem: str
    name: str
    #: Its bytes, where `with_images`.
    data: bytes | None


class Made(NamedTuple):
    """What a format makes of one image."""

    annotations: int = 0
    #: Paths below OUT, with their bytes.
    files: tuple[tuple[str, bytes], ...] = ()
    #: What goes into the streams of the index files, by stream: lines without their ends.
    lines: Mapping[str, Sequence[bytes]] = {}
    #: What `Format.gather` is given.
    record: Mapping[str, Any] | None = None


class Stream(NamedTuple):
    """A place in an index file where the lines of a stream come, in the order of the images."""

    name: str
    #: Between lines.
    separator: bytes = b"\n"
    #: After the last, if there is any.
    end: bytes = b"\n"
    #: Each line is preceded by `{"id":N,`, N counting from 1.
    is_numbered: bool = False


class Index(NamedTuple):
    """A file of the whole export, put together at its end."""

    path: str
    parts: tuple[bytes | Stream, ...]


class Format(Protocol):
    """Makes files of rows. Thread safe, and the same bytes for the same rows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table, beside those that every export reads."""
        ...

    def make(self, source: Source) -> Made:
        """Of one image. Raises Unavailable where it cannot be had."""
        ...

    def gather(self, records: Sequence[Mapping[str, Any]], digest: str) -> list[tuple[str, bytes]]:
        """Files of a piece, which `digest` names, of the records of its images."""
        ...

    def indexes(self) -> list[Index]: ...


class Unavailable(Exception):  # noqa: N818 - no failure of the export
    """An image is left out. `reason` is one word, which is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
