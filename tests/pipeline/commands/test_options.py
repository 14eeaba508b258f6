"""What options of several commands take and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Maskmill
from handmade import make_image
from tables import Table, whole_row

from pipeline.storage import normalize_uri

SECRET = "Sup3rS3cretThing"
ADDRESSES = (
    "s3://bucket/name", f"s3://KEY:{SECRET}@bucket/name", f"s3://bucket/name?X-Amz-Signature={SECRET}",
    f"http://me:{SECRET}@127.0.0.1:1/name?X-Amz-Signature={SECRET}", f"HTTP://me:{SECRET}/x@127.0.0.1:1/name",
    f"simplecache::http://me:{SECRET}@127.0.0.1:1/name", f"zip://a::http://me:{SECRET}@127.0.0.1:1/name",
    f"sftp://me:{SECRET}@127.0.0.1:1/name", f"file:///tmp/x::http://me:{SECRET}@127.0.0.1:1/name",
    f"./http://me:{SECRET}@127.0.0.1:1/name",
)  # fmt: skip
COMMANDS = {
    "--page": ("evaluate", "{photos}", "--model", "nuclei-unet"),
    "--out": ("sheet", "{dest}"),
    "--recipe": ("train", "{photos}", "--name", "t", "--registry", "{registry}"),
    "--preview": ("train", "{photos}", "--epochs", "1"),
    "--weights-file": ("models", "import", "smp:unet/resnet18", "--out", "{registry}.safetensors"),
}


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the commands are given; they run in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_image(tmp_path / "photos" / "a.png", 1)
    dest = tmp_path / "dest"
    Table(normalize_uri(str(dest))).run(whole_row((tmp_path / "photos" / "a.png").as_uri()))
    return {"photos": str(tmp_path / "photos"), "dest": str(dest), "registry": str(tmp_path / "models")}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("option", [*COMMANDS, "import --out"])
def test_no_address_is_taken_for_a_file_on_this_machine(
    option: str, address: str, names: dict[str, str], maskmill: Maskmill, tmp_path: Path
) -> None:
    command = ("models", "import", "smp:unet/resnet18", "--random") if " " in option else COMMANDS[option]
    flag = option.rpartition(" ")[2]
    before = sorted(tmp_path.rglob("*"))
    said = maskmill(*(word.format(**names) for word in command), flag, f"{address}.safetensors")
    assert said.status == 2 and said.err.count("\n") == 1, said
    assert f"'{flag}'" in said.err and said.err.endswith("://…' is an address: give a file on this machine\n"), said
    assert SECRET not in said.out + said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_uri_of_a_file_is_the_file(names: dict[str, str], maskmill: Maskmill, tmp_path: Path) -> None:
    for uri, path in (((tmp_path / "1.png").as_uri(), tmp_path / "1.png"), ("a:b/2.png", Path("a:b/2.png"))):
        said = maskmill("sheet", names["dest"], "--out", uri)
        assert said.status == 0 and said.out == f"{path}: 1 images\n" and path.is_file(), said
    said = maskmill("sheet", names["dest"], "--out", "file://here/3.png")
    assert said.status == 2 and "is not absolute" in said.err


HUGE = "9" * 20


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--shard-size", HUGE, "less than or equal to 1000000000"),
        ("--limit", HUGE, "less than or equal to 1000000000000"),
        ("--canary", HUGE, "less than or equal to 1000000000000"),
        ("--batch-size", HUGE, "less than or equal to 16384"),
        ("--threads", "100000", "less than or equal to 1024"),
        ("--actors", HUGE, "less than or equal to 100000"),
        ("--gpus-per-actor", "inf", "a finite number"),
        ("--max-pixels", HUGE, "less than or equal to 1000000000000"),
        ("--memory-mb", HUGE, "less than or equal to 16777216"),
        ("--memory-mb", "0", "greater than or equal to 1"),
        ("--lease-ttl", "inf", "a finite number"),
        ("--lease-ttl", "nan", "a finite number"),
        ("--lease-ttl", "86401", "less than or equal to 86400"),
    ],
)
def test_numbers_beyond_every_machine_are_refused_before_a_run_is_opened(
    option: str, value: str, told: str, names: dict[str, str], maskmill: Maskmill
) -> None:
    new = names["dest"] + "-new"
    commands: list[tuple[Any, ...]] = [("segment", names["photos"], new)]
    if option not in ("--limit", "--canary", "--lease-ttl"):
        commands.append(("evaluate", names["photos"]))
    for command in commands:
        said = maskmill(*command, "--model", "nuclei-unet", option, value)
        shown = float(value) if option in ("--lease-ttl", "--gpus-per-actor") else value
        assert said.status == 2 and said.err == f"error: {option} is {shown}: input should be {told}\n", said
    assert not Path(new).exists()


def test_an_evaluation_that_would_never_end_is_refused(names: dict[str, str], maskmill: Maskmill) -> None:
    said = maskmill("evaluate", names["photos"], "--model", "nuclei-unet", "--resamples", HUGE)
    assert said.status == 2 and said.err.startswith(f"error: --resamples is {HUGE}: input should be "), said


@pytest.mark.parametrize("change", [f"runs={HUGE}", "psi_threshold=Infinity", f"bins={HUGE}", f"sample_images={HUGE}"])
def test_limits_of_drift_beyond_sense_are_refused(change: str, names: dict[str, str], maskmill: Maskmill) -> None:
    said = maskmill("drift", names["dest"], "--drift", change)
    assert said.status == 2 and said.err.startswith(f"error: --drift {change.partition('=')[0]}="), said
    assert "Input should be " in said.err and said.err.count("\n") == 1


def test_training_refuses_them_too(names: dict[str, str], maskmill: Maskmill) -> None:
    command = ("train", names["photos"], "--name", "t", "--registry", names["registry"])
    for option, value in (("--threads", "100000"), ("--epochs", HUGE), ("--steps", HUGE), ("--minutes", "inf")):
        ends = () if option in ("--epochs", "--steps", "--minutes") else ("--epochs", "1")
        said = maskmill(*command, option, value, *ends)
        assert said.status == 2 and said.err.startswith(f"error: {option[2:]} is {value}: input should be "), said
