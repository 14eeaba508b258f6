"""`maskmill prune` and `maskmill forget` as a person meets them: what would go is said first."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tables import Table, whole_row

from pipeline import cli
from pipeline.commands import upkeep
from pipeline.storage import normalize_uri

Said = tuple[int, str, str]


@pytest.fixture
def maskmill(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["maskmill", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        heard = capfd.readouterr()
        return int(ended.value.code or 0), heard.out, heard.err

    return run


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two versions of one image, the newer with another one."""
    table = Table(normalize_uri(str(tmp_path / "dest")))
    table.run(whole_row("s3://b/a.jpg"), model_version="1" * 12)
    table.run(whole_row("s3://b/a.jpg"), whole_row("s3://b/[bold]it's.jpg"), model_version="2" * 12)
    return table


def count(table: Table) -> int:
    return int(table.ask("SELECT count(*) FROM segments")[0][0])


def test_prune(table: Table, maskmill: Callable[..., Said]) -> None:
    status, out, _ = maskmill("prune", table.dest, "--keep-versions", 1)
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and count(table) == 3
    assert [line[:6] for line in lines[1:3]] == [
        ["stays", "tiny-semantic", "2" * 12, "1", "1", lines[1][5]],
        ["goes", "tiny-semantic", "1" * 12, "1", "1", lines[2][5]],
    ]
    assert out.endswith("nothing was changed; --yes does it\n")
    status, out, _ = maskmill("prune", table.dest, "--keep-versions", 1, "--yes")
    assert status == 0 and "deleted; records of runs and evaluations stay" in out and count(table) == 2
    status, out, _ = maskmill("prune", table.dest, "--keep-versions", 1, "--yes")
    assert status == 0 and "goes" not in out and out.endswith("nothing to do\n")
    assert "pruned" in maskmill("runs", "list", table.dest)[1]
    assert maskmill("prune", table.dest, "--keep-versions", 0)[0] == 2
    assert maskmill("prune", table.dest)[0] == 2


def test_prune_in_json(table: Table, maskmill: Callable[..., Said]) -> None:
    body = json.loads(maskmill("prune", table.dest, "--keep-versions", 1, "--json")[1])
    assert not body["done"] and [one["goes"] for one in body["versions"]] == [False, True] and count(table) == 3
    assert json.loads(maskmill("prune", table.dest, "--keep-versions", 1, "--json", "--yes")[1])["done"]
    assert count(table) == 2


def test_forget(table: Table, maskmill: Callable[..., Said]) -> None:
    where = "image_uri = 's3://b/[bold]it''s.jpg'"
    status, out, _ = maskmill("forget", table.dest, "--where", where)
    assert status == 0 and count(table) == 3
    assert out == (
        "1 image to forget. In the table:\n  1 row in 1 Part\n  1 line in 1 list of runs\n"
        "nothing was changed; --yes does it\n"
    )
    status, out, _ = maskmill("forget", table.dest, "--where", where, "--yes")
    done = "forgotten: no file of the table names these images any more, and no plan will hold them"
    assert status == 0 and out.endswith(f"\n{done}\n")
    assert count(table) == 2
    assert maskmill("forget", table.dest, "--yes")[:2] == (0, "nothing to do\n")
    assert maskmill("verify", table.dest)[0] == 0
    status, _, err = maskmill("forget", table.dest, "--where", "image_url = 'x'")
    assert status == 2 and 'Referenced column "image_url" not found' in err


@pytest.mark.parametrize("answer", [True, False])
def test_somebody_at_a_terminal_is_asked(
    table: Table, maskmill: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    asked: list[str] = []

    class Terminal:
        def isatty(self) -> bool:
            return True

    def confirm(text: str, **_: Any) -> bool:
        asked.append(text)
        return answer

    monkeypatch.setattr(upkeep, "sys", type("sys", (), {"stdin": Terminal(), "stdout": Terminal()}))
    monkeypatch.setattr(typer, "confirm", confirm)
    maskmill("forget", table.dest, "--where", "image_uri = 's3://b/a.jpg'")
    assert asked == ["Take them out? It cannot be undone"] and count(table) == (1 if answer else 3)
    body = json.loads(maskmill("prune", table.dest, "--keep-versions", 1, "--json")[1])
    assert not body["done"] and len(asked) == 1  # a script is not asked
