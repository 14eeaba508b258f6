"""What changes an answer, and what of it changes how long that takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.engine.settings import asked_of, digest_of, settings_of, setup_digest
from pipeline.registry import resolve


def test_a_digest_is_of_what_is_asked_not_of_how_it_is_asked(semantic_model: Path) -> None:
    shipped = resolve(str(semantic_model))

    def digests(changes: dict[str, Any] | None = None, **other: Any) -> tuple[str, str]:
        options: dict[str, Any] = {"precision": "fp32", "max_pixels": 100, "compile": False} | other
        settings = settings_of(shipped.card, asked_of(shipped, changes or {}).card, **options)
        return digest_of(settings), setup_digest(settings)

    rows, setup = digests()
    assert digests({"size_policy": {"kind": "native"}}) == (rows, setup)
    for same_work in ({"precision": "bf16"}, {"max_pixels": 99}):
        assert digests(**same_work)[0] != rows and digests(**same_work)[1] == setup
    flips = digests({"augmentation": {"flips": ["horizontal"]}})
    resized = digests({"size_policy": {"kind": "resize", "short_side_px": 96}})
    compiled = digests(compile=True)
    assert len({setup, flips[1], resized[1], compiled[1]}) == 4 == len({rows, flips[0], resized[0], compiled[0]})
