"""Changes of a registry: in order, at the same moment, and killed half-way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos.faultproxy import FaultProxy
from harness import file_digests

from models.file import model_version
from pipeline.errors import ChampionChangedError, ModelError, StorageError, UsageError
from pipeline.registry import listings, model_history, push_model, resolve, rollback_model, set_alias, shelf
from pipeline.registry.changes import change_champion, registry_warnings
from pipeline.storage.bucket import BucketStorage


def versions_of(paths: list[Path]) -> list[str]:
    return [model_version(path.read_bytes()) for path in paths]


def meaning(registry: str) -> dict[str, str]:
    return {
        alias: line.version for line in listings(registry=registry) if line.name == "street" for alias in line.aliases
    }


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def anywhere(request: pytest.FixtureRequest, registry: Path) -> str:
    """An empty registry, on disk and on S3."""
    return str(registry) if request.param == "disk" else f"{request.getfixturevalue('s3_bucket')}/models/"


def test_push_promote_roll_back(anywhere: str, street: list[Path]) -> None:
    a, b, c, _ = versions_of(street)
    pushed = push_model(street[0], anywhere)
    assert (pushed.name, pushed.version, pushed.aliases, pushed.new) == ("street", a, ("challenger",), True)
    assert resolve(pushed.uri).data == street[0].read_bytes()
    again = push_model(street[0].read_bytes(), anywhere)
    assert again == pushed._replace(new=False)
    assert change_champion(anywhere, "street", a, "promote", instead_of=None).champion_before is None
    assert meaning(anywhere) == {"champion": a}, "a champion is no challenger any more"
    for path, before in ((street[1], a), (street[2], b)):
        push_model(path, anywhere)
        change_champion(anywhere, "street", versions_of([path])[0], "promote", instead_of=before, decision={"why": "x"})
    assert push_model(street[2], anywhere).aliases == ("champion",)
    assert rollback_model("street", registry=anywhere, reason="it was worse").version == b
    assert rollback_model("street", registry=anywhere).version == a
    with pytest.raises(UsageError, match="nothing to go back to"):
        rollback_model("street", registry=anywhere)
    change_champion(anywhere, "street", c, "promote", instead_of=a)
    assert rollback_model("street", registry=anywhere).version == a
    told = model_history("street", registry=anywhere)
    assert [one.action for one in told] == [
        "push", "promote", "push", "promote", "push", "promote", "rollback", "rollback", "promote", "rollback",
    ]  # fmt: skip
    assert [one.number for one in told] == list(range(1, 11))
    assert told[5].decision == {"why": "x"} and told[6].reason == "it was worse"
    assert [(one.champion_before, one.aliases["champion"]) for one in told[-4:]] == [(c, b), (b, a), (a, c), (c, a)]


def test_nothing_is_overwritten_or_deleted(registry: Path, street: list[Path]) -> None:
    before: dict[str, Any] = {}
    a, b, *_ = versions_of(street)
    steps: list[Callable[[], Any]] = [
        lambda: push_model(street[0], str(registry)),
        lambda: change_champion(str(registry), "street", a, "promote", instead_of=None),
        lambda: push_model(street[1], str(registry)),
        lambda: change_champion(str(registry), "street", b, "keep", instead_of=a),
        lambda: change_champion(str(registry), "street", b, "promote", instead_of=a),
        lambda: rollback_model("street", registry=str(registry)),
        lambda: set_alias(f"street@{b}", "canary", registry=str(registry)),
        lambda: push_model(street[0], str(registry)),
    ]
    for step in steps:
        step()
        after = file_digests(registry / "street")
        assert before.items() <= after.items()
        before = after
    assert len(before) == 2 + 7


def test_aliases_of_any_name(registry: Path, street: list[Path]) -> None:
    a, b, *_ = versions_of(street)
    push_model(street[0], str(registry), alias="canary")
    assert push_model(street[1], str(registry), alias=None).aliases == ()
    assert meaning(str(registry)) == {"canary": a}
    made = set_alias(f"street@{b}", "canary", registry=str(registry), reason="try it")
    assert made is not None and made.reason == "try it" and meaning(str(registry)) == {"canary": b}
    assert set_alias("street@canary", "canary", registry=str(registry)) is None
    for alias, words in [("champion", "given by a promotion"), ("A B", "'A B' is no alias"), ("a" * 12, "no alias")]:
        with pytest.raises(UsageError, match=words):
            set_alias(f"street@{b}", alias, registry=str(registry))
        with pytest.raises(UsageError, match=words):
            push_model(street[2], str(registry), alias=alias)
    assert len(listings(registry=str(registry))) == 2 + 1


def test_a_push_that_was_killed_before_its_entry_is_told_by_the_next(registry: Path, street: list[Path]) -> None:
    """Also where it gave no alias, so that nothing else would tell that the version came."""
    a, b, *_ = versions_of(street)
    push_model(street[0], str(registry))
    (registry / "street" / f"{b}.safetensors").write_bytes(street[1].read_bytes())
    for _ in range(2):
        assert not push_model(street[1], str(registry), alias=None).new
        told = [(one.action, one.version) for one in model_history("street", registry=str(registry))]
        assert told == [("push", a), ("push", b)]


def test_what_cannot_be_pushed(registry: Path, street: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no registry is named: give --registry"):
        push_model(street[0])
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(street[0].read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut off"):
        push_model(cut, str(registry))
    with pytest.raises(ModelError, match="cannot be read"):
        push_model(tmp_path / "nothing.safetensors", str(registry))
    assert not (registry / "street").exists()


@pytest.mark.s3
def test_a_bucket_that_is_not_there(s3_environment: str, street: list[Path]) -> None:
    with pytest.raises((ModelError, StorageError), match="no-such-bucket"):
        push_model(street[0], "s3://no-such-bucket/models")


def test_a_model_whose_file_was_replaced_is_not_used(registry: Path, street: list[Path]) -> None:
    a, b, *_ = versions_of(street)
    file = Path(push_model(street[0], str(registry)).uri.removeprefix("file://"))
    change_champion(str(registry), "street", a, "promote", instead_of=None)
    file.write_bytes(street[1].read_bytes())
    with pytest.raises(ModelError, match=f"{a}.safetensors is version {b}, not what"):
        resolve("street", registry=str(registry))
    file.write_bytes(b"short")
    with pytest.raises(ModelError, match="another size"):
        push_model(street[0], str(registry))
    file.unlink()
    with pytest.raises(ModelError, match=rf"street@champion is {a}, whose file is not in .*push it again"):
        resolve("street", registry=str(registry))
    assert push_model(street[0], str(registry)).new
    assert resolve("street", registry=str(registry)).version == a


def test_a_shipped_champion_outlives_its_release(
    registry: Path, street: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ships is the champion until another is promoted; a rollback finds it though the next release lacks it."""
    (tmp_path / "zoo").mkdir()
    ships = tmp_path / "zoo" / "street.safetensors"
    ships.write_bytes(street[0].read_bytes())
    monkeypatch.setattr(shelf.resources, "files", lambda package: tmp_path)
    shipped, own, *_ = versions_of(street)
    push_model(street[1], str(registry))
    assert resolve("street", registry=str(registry)).version == shipped
    assert push_model(street[0], str(registry)).aliases == ("champion",)
    with pytest.raises(ChampionChangedError, match=f"from none to {shipped}"):
        change_champion(str(registry), "street", own, "promote", instead_of=None)
    (registry / "street" / f"{shipped}.safetensors").unlink()
    change_champion(str(registry), "street", own, "promote", instead_of=shipped)
    ships.unlink()
    assert resolve("street", registry=str(registry)).version == own
    rollback_model("street", registry=str(registry))
    assert resolve("street", registry=str(registry)).data == street[0].read_bytes()


def test_a_change_decided_on_another_champion_is_refused(registry: Path, street: list[Path]) -> None:
    a, b, c, _ = versions_of(street)
    for path in street[:3]:
        push_model(path, str(registry))
    change_champion(str(registry), "street", a, "promote", instead_of=None)
    change_champion(str(registry), "street", b, "promote", instead_of=a)
    before = file_digests(registry)
    for action in ("promote", "keep", "rollback"):
        with pytest.raises(ChampionChangedError, match=f"from {a} to {b}: nothing was changed"):
            change_champion(str(registry), "street", c, action, instead_of=a)  # type: ignore[arg-type]
    assert {name: digest for name, digest in file_digests(registry).items() if "street" in name} == before


#: One writer: it reads its orders, waits for the others, and says what became of it.
_WRITER = """
import json, os, sys, time
from pipeline.errors import ChampionChangedError
from pipeline.registry import changes, history
order = json.loads(sys.argv[1])
if order["die"]:
    append = changes.append
    def struck(*arguments):
        if order["die"] == "after":
            append(*arguments)
        os.kill(os.getpid(), 9)
    changes.append = struck
print("ready", flush=True)
sys.stdin.readline()
try:
    if order["what"] == "push":
        changes.push_model(order["file"], order["registry"])
    elif order["what"] == "alias":
        changes.set_alias(f"street@{order['version']}", order["alias"], registry=order["registry"])
    else:
        names = order["registry"], "street", order["version"]
        changes.change_champion(*names, "promote", instead_of=order["instead_of"])
    print("won")
except ChampionChangedError:
    print("lost")
"""


def at_once(*orders: dict[str, Any]) -> list[tuple[int, str]]:
    """Each order by a process of its own, all at the same moment: exit status and last word of each."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, json.dumps({"die": None} | order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in orders
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    return [(writer.wait(), out.strip()) for writer in writers for out in [writer.communicate()[0]]]


def test_of_promotions_at_the_same_moment_one_wins(anywhere: str, street: list[Path]) -> None:
    first, *rivals = versions_of(street)
    for path in street:
        push_model(path, anywhere)
    change_champion(anywhere, "street", first, "promote", instead_of=None)
    found = at_once(*({"what": "promote", "registry": anywhere, "version": one, "instead_of": first} for one in rivals))
    assert sorted(found) == [(0, "lost"), (0, "lost"), (0, "won")]
    winner = rivals[found.index((0, "won"))]
    assert resolve("street", registry=anywhere).version == winner
    assert [one.version for one in model_history("street", registry=anywhere) if one.action == "promote"] == [
        first, winner,
    ]  # fmt: skip


def test_changes_of_other_things_at_the_same_moment_all_count(registry: Path, street: list[Path]) -> None:
    """Whoever comes second builds on the first."""
    a, b, *_ = versions_of(street)
    for path in street[:2]:
        push_model(path, str(registry), alias=None)
    change_champion(str(registry), "street", a, "promote", instead_of=None)
    aliases = [{"what": "alias", "registry": str(registry), "version": a, "alias": name} for name in ("old", "calm")]
    promotion = {"what": "promote", "registry": str(registry), "version": b, "instead_of": a}
    assert at_once(promotion, *aliases) == [(0, "won")] * 3
    assert meaning(str(registry)) == {"champion": b, "old": a, "calm": a}
    assert [one.number for one in model_history("street", registry=str(registry))] == [1, 2, 3, 4, 5, 6]


def test_killed_before_and_after_the_step_that_counts(registry: Path, street: list[Path]) -> None:
    a, b, *_ = versions_of(street)
    push = {"what": "push", "registry": str(registry), "file": str(street[0])}
    assert at_once(push | {"die": "before"}) == [(-signal.SIGKILL, "")]
    assert meaning(str(registry)) == {} and resolve(f"street@{a}", registry=str(registry))
    assert not push_model(street[0], str(registry)).new
    assert meaning(str(registry)) == {"challenger": a}
    push_model(street[1], str(registry))
    promote = {"what": "promote", "registry": str(registry), "version": b, "instead_of": None}
    assert at_once(promote | {"die": "before"}) == [(-signal.SIGKILL, "")]
    assert "champion" not in meaning(str(registry))
    assert at_once(promote | {"die": "after"}) == [(-signal.SIGKILL, "")]
    assert meaning(str(registry)) == {"champion": b}
    assert [one.number for one in model_history("street", registry=str(registry))] == [1, 2, 3]


@pytest.mark.s3
def test_a_lost_answer_is_not_taken_for_a_lost_race(
    s3_bucket: str, fault_proxy: FaultProxy, street: list[Path]
) -> None:
    """The store has made the file, and the client never hears of it."""
    registry, (a, b, *_) = f"{s3_bucket}/models", versions_of(street)
    for path in street[:2]:
        push_model(path, registry)
    change_champion(registry, "street", a, "promote", instead_of=None)
    fault_proxy.inject("reset_after", match=r"PUT .*(_history|safetensors)", limit=1)
    assert change_champion(registry, "street", b, "promote", instead_of=a).number == 4
    assert fault_proxy.hits["reset_after"] == 1
    assert meaning(registry) == {"champion": b}
    assert [one.number for one in model_history("street", registry=registry)] == [1, 2, 3, 4]


@pytest.mark.s3
def test_a_store_without_create_only_writes_is_named(
    s3_bucket: str, street: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry_warnings(f"{s3_bucket}/models") == ()

    def unable(self: BucketStorage) -> bool:
        self.create_only_is_atomic = False
        return False

    monkeypatch.setattr(BucketStorage, "check_create_only", unable)
    (warning,) = push_model(street[0], f"{s3_bucket}/models").warnings
    assert "no create-only writes" in warning
