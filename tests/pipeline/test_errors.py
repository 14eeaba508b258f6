"""The error tree and the closed list of row error kinds."""

from __future__ import annotations

import pickle

import pytest

from pipeline import errors
from pipeline.errors import (
    ALWAYS_RETRIED_KINDS,
    BYTES_KINDS,
    WORLD_KINDS,
    ImageError,
    MaskmillError,
    ModelError,
    StorageError,
)


def test_the_kinds_are_closed_and_disjoint() -> None:
    assert not BYTES_KINDS & WORLD_KINDS
    assert ALWAYS_RETRIED_KINDS < WORLD_KINDS
    assert {
        "empty", "truncated", "not_an_image", "unsupported", "too_large", "corrupt", "model_failed",
        "missing", "denied", "fetch_failed", "out_of_memory", "crashed_worker",
    } == BYTES_KINDS | WORLD_KINDS  # fmt: skip


@pytest.mark.parametrize("kind", [StorageError, ImageError])
def test_errors_with_a_kind_keep_it_between_processes(kind: type[StorageError | ImageError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("it broke", kind="denied")))
    assert (type(copy), str(copy), copy.kind) == (kind, "it broke", "denied")


@pytest.mark.parametrize(
    ("kind", "told"), [("missing", ModelError), ("denied", ModelError), ("fetch_failed", StorageError)]
)
def test_only_what_the_caller_can_mend_is_wrong_usage(kind: str, told: type[MaskmillError]) -> None:
    found = StorageError("503", kind=kind).told("no model: 503", ModelError)
    assert (type(found), str(found)) == (told, "no model: 503")


def test_every_error_is_in_the_tree_and_in_its_drawing() -> None:
    found = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, Exception)]
    assert len(found) >= 9
    for cls in found:
        assert issubclass(cls, MaskmillError)
        assert cls.__name__ in str(errors.__doc__)
