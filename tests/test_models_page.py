"""docs/models.md: what it names exists, and what it shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.architectures import ARCHITECTURES, card_for
from models.card import Card, DetectionsPostprocessing, WatershedPostprocessing
from models.file import load_module
from models.overrides import SETTABLE, parse_settings, with_settings
from models.preprocessing import VALUE_RANGES
from models.refinement import AugmentationSettings, CleanupSettings, CrfSettings

PAGE = Path(__file__).resolve().parents[1].joinpath("docs", "models.md").read_text(encoding="utf-8")
#: What is between fences.
COMMANDS = [block.replace("\\\n", " ") for block in re.split(r"^```", PAGE, flags=re.M)[1::2]]


def test_every_architecture_and_its_arguments_are_there() -> None:
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \| [^|]* \|([^|]*)\|$", PAGE, re.M)
    described = {
        name: set(re.findall(r"`([a-z_]+)`", arguments))
        for names, arguments in rows
        for name in re.findall(r"`([a-z0-9_]+)`", names)
        if name in ARCHITECTURES
    }
    assert described.keys() == ARCHITECTURES.keys()
    for name, arguments in described.items():
        fields = set(ARCHITECTURES[name].args.model_fields)
        assert fields - {"output_channels", "encoder_args"} == arguments, name


def test_everything_that_can_be_set_is_there() -> None:
    names = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    assert names >= set(SETTABLE)
    for kind in (CleanupSettings, CrfSettings, WatershedPostprocessing, DetectionsPostprocessing):
        assert names >= set(kind.model_fields) - {"kind"}
    assert names >= set(VALUE_RANGES)
    assert all(f"augmentation.{name}" in PAGE for name in AugmentationSettings.model_fields)


@pytest.mark.parametrize(
    "command", [line for block in COMMANDS for line in block.splitlines() if line.startswith("maskmill segment")]
)
def test_settings_shown_fit_the_models_they_are_shown_with(command: str) -> None:
    card: Card = card_for("nuclei", "unet", task="instance", canvas_multiple=32)
    if "objects" in command:
        card = card_for("objects", "maskrcnn_mobilenet_v3_large_fpn", canvas_multiple=1)
    lines = [quoted or plain for quoted, plain in re.findall(r"--set (?:'([^']*)'|(\S+))", command)]
    assert lines
    assert with_settings(card, parse_settings(lines)) != card


def test_the_python_shown_makes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    exec(code, {})
    card, _ = load_module(Path("fields.safetensors").read_bytes())
    assert card.input_channels == 4
