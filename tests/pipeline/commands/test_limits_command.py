"""`maskmill limits`, and `segment --limits` with its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from command_line import Maskmill

FLIPS = ("--set", 'augmentation.flips=["horizontal"]')


def test_a_file_is_made_and_runs_of_the_same_settings_are_compared_with_it(
    tmp_path: Path, maskmill: Maskmill, semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    images, file, dest = image_folder(4), tmp_path / "limits.json", tmp_path / "dest"
    options = ("--model", semantic_model, "--precision", "fp32")

    def reached(*more: str) -> set[str]:
        status, out, err = maskmill("segment", images, dest, *options, *more, "--limits", file, "--json")
        assert status == 0, err
        run_id = json.loads(out)["run_id"]
        shown = json.loads(maskmill("runs", "show", dest, run_id).out)
        return set(shown["limits"]["reached"])

    status, out, err = maskmill("limits", images, *options, "--out", file, "--seconds", "0.02")
    assert status == 0, err
    assert "decode PNG" in out and f"written to {file}" in out.replace("\n", "")
    assert {"model", "encode", "cores"} <= reached()
    assert not {"model", "encode", "cores"} & reached(*FLIPS)
    status, out, err = maskmill("limits", images, *options, *FLIPS, "--out", file, "--seconds", "0.02", "--json")
    assert status == 0, err
    assert json.loads(out) == json.loads(file.read_text())
    assert {"model", "encode", "cores"} <= reached("--force", *FLIPS)


def test_settings_that_do_not_fit_are_wrong_usage(
    maskmill: Maskmill, semantic_model: Path, image_folder: Callable[..., Path]
) -> None:
    for wrong, says in (("augmentation.flip=1", "did you mean 'flips'"), ("nothing", "is not KEY=VALUE")):
        status, _, err = maskmill("limits", image_folder(1), "--model", semantic_model, "--set", wrong)
        assert status == 2 and says in err, err
