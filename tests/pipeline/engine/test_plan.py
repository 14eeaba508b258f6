"""The one query of planning, over Parts written by hand, and the cutting of its answer into shards."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import CREATED_AT, make_list, make_part, make_plan, make_row
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.ledger import WorkCounts
from pipeline.engine.plan import MAX_ATTEMPTS, TARGET_PART_BYTES, Question, choose_shard_size, shard_lists, work_left
from pipeline.errors import ALWAYS_RETRIED_KINDS, BYTES_KINDS, WORLD_KINDS
from pipeline.storage import LISTING_SCHEMA, join_uri, normalize_uri, open_storage
from pipeline.table.forgotten import Forgotten

RUN = "20260102T030405Z-{:06x}"
DIGEST = make_row("x", "e")["settings_digest"]


class Desk:
    """A DEST and a corpus, written by hand, to be asked what is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = open_storage(normalize_uri(str(folder)))
        self.parts: list[str] = []

    def part(self, *rows: dict[str, Any]) -> None:
        """One more Part of these rows."""
        uri = join_uri(self.storage.root, "segments", f"{RUN.format(len(self.parts))}-000000.parquet")
        assert self.storage.put_new(uri, make_part(list(rows)))
        self.parts.append(uri)

    def ask(self, corpus: list[tuple[str, str]], *, held: dict[str, list[str]] | None = None, **flags: Any) -> Answer:
        """What is left of `corpus`, pairs of uri and etag."""
        corpus_path = self.folder / "corpus.parquet"
        rows = [{"uri": uri, "etag": etag, "size_bytes": 10, "modified": CREATED_AT} for uri, etag in corpus]
        pq.write_table(pa.Table.from_pylist(rows, LISTING_SCHEMA), corpus_path)
        lists = {}
        for run_id, uris in (held or {}).items():
            lists[run_id] = self.folder / f"{run_id}.parquet"
            lists[run_id].write_bytes(make_list(uris, etag="other"))
        question = Question(
            corpus=f"read_parquet('{corpus_path}')",
            corpus_rows=len(rows),
            corpus_is_distinct=flags.pop("distinct", len(set(corpus)) == len(corpus)),
            part_sizes=dict.fromkeys(self.parts, 0),
            held=lists,
            settings_digest=DIGEST,
            **flags,
        )
        list_path = self.folder / "work.parquet"
        counts = work_left(question, self.storage, scratch=self.folder, list_path=list_path, memory_bytes=256 << 20)
        work = pq.read_table(list_path).to_pylist()
        return Answer(counts, work)


class Answer:
    """Counts, and the list as `{uri: (etag, attempt)}`."""

    def __init__(self, counts: WorkCounts, work: list[dict[str, Any]]) -> None:
        self.counts = counts
        self.work = {row["uri"]: (row["etag"], row["attempt"]) for row in work}
        assert len(self.work) == len(work) == counts.planned
        assert counts.images == counts.done + counts.exhausted + counts.held + counts.left
        assert counts.left == counts.new + counts.changed + counts.failed_before + counts.repeated
        assert counts.held == sum(counts.held_by.values())
        assert counts.planned_bytes == 10 * counts.planned


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_all_is_new_in_a_new_dest(desk: Desk) -> None:
    answer = desk.ask([("b", "e1"), ("a", "e1")])
    assert list(answer.work.items()) == [("a", ("e1", 1)), ("b", ("e1", 1))]
    assert answer.counts == WorkCounts(images=2, left=2, new=2, planned=2, planned_bytes=20)


def test_done_images_are_left_out_and_changed_ones_are_not(desk: Desk) -> None:
    desk.part(make_row("same", "e1"), make_row("changed", "e1"))
    answer = desk.ask([("same", "e1"), ("changed", "e2"), ("new", "e1")])
    assert answer.work == {"changed": ("e2", 1), "new": ("e1", 1)}
    assert (answer.counts.done, answer.counts.changed, answer.counts.new) == (1, 1, 1)


def test_an_image_replaced_while_it_was_read_is_done_under_both_etags(desk: Desk) -> None:
    desk.part(make_row("replaced", "read", listed_etag="listed"))
    assert desk.ask([("replaced", "listed")]).counts.done == 1
    assert desk.ask([("replaced", "read")]).counts.done == 1
    assert desk.ask([("replaced", "third")]).counts.changed == 1


@pytest.mark.parametrize("kind", sorted(BYTES_KINDS))
def test_an_error_about_the_bytes_is_final(desk: Desk, kind: str) -> None:
    desk.part(make_row("bad", "e1", kind))
    assert desk.ask([("bad", "e1")]).counts.done == 1
    retried = desk.ask([("bad", "e1")], retry_errors=True)
    assert retried.work == {"bad": ("e1", 2)}
    assert retried.counts.failed_before == 1


@pytest.mark.parametrize("kind", sorted(WORLD_KINDS - ALWAYS_RETRIED_KINDS))
def test_an_error_about_the_world_is_tried_three_times(desk: Desk, kind: str) -> None:
    for attempt in range(1, MAX_ATTEMPTS):
        desk.part(make_row("unlucky", "e1", kind))
        answer = desk.ask([("unlucky", "e1")])
        assert answer.work == {"unlucky": ("e1", attempt + 1)}
        assert answer.counts.failed_before == 1
    desk.part(make_row("unlucky", "e1", kind))
    assert desk.ask([("unlucky", "e1")]).counts.exhausted == 1
    assert desk.ask([("unlucky", "e1")], retry_errors=True).work == {"unlucky": ("e1", MAX_ATTEMPTS + 1)}
    assert desk.ask([("unlucky", "e2")]).work == {"unlucky": ("e2", 1)}


@pytest.mark.parametrize("kind", sorted(ALWAYS_RETRIED_KINDS))
def test_missing_and_denied_are_always_tried_again(desk: Desk, kind: str) -> None:
    for _ in range(MAX_ATTEMPTS + 2):
        desk.part(make_row("gone", "e1", kind))
    assert desk.ask([("gone", "e1")]).work == {"gone": ("e1", MAX_ATTEMPTS + 3)}


def test_an_image_without_etag_is_a_key_like_any_other(desk: Desk) -> None:
    """A manifest names an image that is not there: its etag is empty, and its row must be found again."""
    desk.part(make_row("gone", "", "missing"), make_row("ok", ""))
    answer = desk.ask([("gone", ""), ("ok", "")])
    assert answer.work == {"gone": ("", 2)}


def test_success_after_failure_is_done(desk: Desk) -> None:
    desk.part(make_row("a", "e1", "fetch_failed"))
    desk.part(make_row("a", "e1"))
    assert desk.ask([("a", "e1")], retry_errors=True).counts.done == 1


def test_rows_of_other_settings_do_not_count(desk: Desk) -> None:
    desk.part(
        make_row("a", "e1", settings_digest="another"), make_row("b", "e1", "fetch_failed", settings_digest="another")
    )
    answer = desk.ask([("a", "e1"), ("b", "e1")])
    assert answer.work == {"a": ("e1", 1), "b": ("e1", 1)}
    assert answer.counts.new == 2


def test_force_takes_everything(desk: Desk) -> None:
    desk.part(make_row("done", "e1"), make_row("bad", "e1", "corrupt"), make_row("changed", "e1"))
    for _ in range(MAX_ATTEMPTS):
        desk.part(make_row("unlucky", "e1", "out_of_memory"))
    answer = desk.ask([("done", "e1"), ("bad", "e1"), ("unlucky", "e1"), ("changed", "e2"), ("new", "e1")], force=True)
    assert set(answer.work) == {"done", "bad", "unlucky", "changed", "new"}
    assert answer.counts.done == answer.counts.exhausted == 0
    counts = answer.counts
    assert (counts.repeated, counts.failed_before, counts.changed, counts.new) == (1, 2, 1, 1)


def test_the_limit_cuts_what_is_planned_and_nothing_else(desk: Desk) -> None:
    desk.part(make_row("a", "e1"))
    answer = desk.ask([(name, "e1") for name in "abcdef"], limit=2)
    assert set(answer.work) == {"b", "c"}
    assert (answer.counts.left, answer.counts.planned) == (5, 2)


def test_open_runs_hold_their_images_whatever_the_etag(desk: Desk) -> None:
    desk.part(make_row("done", "e1"))
    held = {RUN.format(7): ["a", "done", "elsewhere"], RUN.format(8): ["b"]}
    answer = desk.ask([(name, "e1") for name in ("a", "b", "c", "done")], held=held)
    assert answer.work == {"c": ("e1", 1)}
    assert answer.counts.held_by == {RUN.format(7): 1, RUN.format(8): 1}
    assert answer.counts.done == 1


def test_duplicates_count_once_and_are_counted(desk: Desk) -> None:
    desk.part(make_row("b", "e1"))
    answer = desk.ask([("a", "e1"), ("b", "e1"), ("a", "e1"), ("c", "e1"), ("a", "e1"), ("b", "e1")], distinct=False)
    assert answer.work == {"a": ("e1", 1), "c": ("e1", 1)}
    assert (answer.counts.images, answer.counts.duplicates, answer.counts.done) == (3, 3, 1)


def test_one_uri_with_two_etags_is_one_image(desk: Desk) -> None:
    answer = desk.ask([("a", "e1"), ("a", "e2")], distinct=False)
    assert (answer.counts.images, answer.counts.duplicates) == (1, 1)
    assert answer.work["a"][0] in {"e1", "e2"}


def test_quotes_and_wild_cards_in_names_are_only_names(desk: Desk) -> None:
    names = ["it's.jpg", 'say "so".jpg', "a*.jpg", "ab.jpg", "100%_.jpg", "semi;--.jpg", "ünï.jpg", "new\nline.jpg"]
    desk.part(*(make_row(name, "e1") for name in names[:3]))
    answer = desk.ask([(name, "e1") for name in names])
    assert set(answer.work) == set(names[3:])


# ── against a plain model ────────────────────────────────────────────────────────────────────────────────────────────

_URIS = st.sampled_from("abcdef")
_ETAGS = st.sampled_from(["e1", "e2"])
_STATUS = st.sampled_from(["ok", "corrupt", "fetch_failed", "crashed_worker", "missing"])
_ROWS = st.lists(st.tuples(_URIS, _ETAGS, _ETAGS, _STATUS, st.booleans()), max_size=24)


def _expected(
    corpus: list[tuple[str, str]],
    rows: list[tuple[str, str, str, str, bool]],
    held: set[str],
    retry_errors: bool,
    force: bool,
) -> dict[str, Any]:
    """Planning image by image, as the rules of the table say it."""
    found: dict[str, Any] = {"done": 0, "exhausted": 0, "held": 0, "failed_before": 0, "work": {}}
    for uri, etag in corpus:
        mine = [row for row in rows if row[0] == uri and row[4]]
        final = {"ok"} if retry_errors else {"ok", "corrupt"}
        if not force and any(etag in (row[1], row[2]) and row[3] in final for row in mine):
            found["done"] += 1
            continue
        failures = [row[3] for row in mine if row[1] == etag and row[3] != "ok"]
        spent = sum(kind in {"fetch_failed", "crashed_worker"} for kind in failures)
        if not (force or retry_errors) and spent >= MAX_ATTEMPTS:
            found["exhausted"] += 1
        elif uri in held:
            found["held"] += 1
        else:
            found["failed_before"] += bool(failures)
            found["work"][uri] = (etag, len(failures) + 1)
    return found


@pytest.mark.parametrize("distinct", [True, False])
def test_what_is_forgotten_is_no_work_whatever_is_asked(tmp_path: Path, distinct: bool) -> None:
    desk = Desk(tmp_path)
    desk.part(make_row("a", "e1"))
    salt = "5a17"
    forgotten = Forgotten().also(salt, [hashlib.sha256((salt + uri).encode()).hexdigest() for uri in ("b", "é'd")])
    corpus = [("a", "e1"), ("b", "e1"), ("c", "e1"), ("é'd", "e2")]
    for flags in ({}, {"force": True}, {"retry_errors": True}):
        answer = desk.ask(corpus, distinct=distinct, forgotten=forgotten, **flags)
        assert list(answer.work) == (["a", "c"] if "force" in flags else ["c"])
        assert (answer.counts.images, answer.counts.forgotten, answer.counts.duplicates) == (2, 2, 0)


@settings(max_examples=40, deadline=None)
@given(
    corpus=st.dictionaries(_URIS, _ETAGS, min_size=1),
    rows=_ROWS,
    held=st.sets(_URIS),
    retry_errors=st.booleans(),
    force=st.booleans(),
)
def test_planning_agrees_with_the_rules_read_aloud(
    corpus: dict[str, str], rows: list[tuple[str, str, str, str, bool]], held: set[str], retry_errors: bool, force: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        if rows:
            desk.part(
                *(
                    make_row(uri, read, status, listed_etag=listed, image_etag=read if status == "ok" else "")
                    | ({} if ours else {"settings_digest": "another"})
                    for uri, listed, read, status, ours in rows
                )
            )
        rows = [(uri, listed, read if status == "ok" else "", status, ours) for uri, listed, read, status, ours in rows]
        expected = _expected(list(corpus.items()), rows, held, retry_errors, force)
        flags = {"retry_errors": retry_errors, "force": force}
        answer = desk.ask(list(corpus.items()), held={RUN.format(9): sorted(held)} if held else None, **flags)
    assert answer.work == expected["work"]
    for key in ("done", "exhausted", "held", "failed_before"):
        assert getattr(answer.counts, key) == expected[key], key


# ── shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("planned", "shard_size", "canary", "bounds"),
    [
        (10, 4, 0, [(0, 4), (4, 8), (8, 10)]),
        (8, 4, 0, [(0, 4), (4, 8)]),
        (3, 100, 0, [(0, 3)]),
        (10, 4, 3, [(0, 3), (3, 7), (7, 10)]),
        (10, 4, 6, [(0, 4), (4, 6), (6, 10)]),
        (10, 4, 4, [(0, 4), (4, 8), (8, 10)]),
        (3, 4, 3, [(0, 3)]),
    ],
)
def test_bounds(planned: int, shard_size: int, canary: int, bounds: list[tuple[int, int]]) -> None:
    plan = make_plan("file:///dest", planned=planned, shard_size=shard_size, canary=canary)
    assert plan.bounds() == bounds


@given(planned=st.integers(1, 300), shard_size=st.integers(1, 400), canary=st.integers(0, 300))
def test_shards_cover_the_list_once_and_end_at_the_canary(planned: int, shard_size: int, canary: int) -> None:
    canary = min(canary, planned)
    bounds = make_plan("file:///d", planned=planned, shard_size=shard_size, canary=canary).bounds()
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(planned))
    assert all(0 < stop - start <= shard_size for start, stop in bounds)
    assert canary == 0 or canary in {stop for _, stop in bounds}


@pytest.fixture
def frozen_list(tmp_path: Path) -> Callable[[int], Path]:
    def make(count: int) -> Path:
        path = tmp_path / f"list-{count}.parquet"
        path.write_bytes(make_list([f"image-{index:05d}" for index in range(count)]))
        return path

    return make


def test_shard_lists_are_the_same_slices_whatever_is_committed(frozen_list: Callable[[int], Path]) -> None:
    plan = make_plan("file:///dest", planned=10, shard_size=3, canary=4)
    path = frozen_list(10)
    whole = {ordinal: refs["uri"].to_pylist() for ordinal, refs in shard_lists(plan, path, without=set())}
    assert [len(uris) for uris in whole.values()] == [3, 1, 3, 3]
    assert [uri for uris in whole.values() for uri in uris] == [f"image-{index:05d}" for index in range(10)]
    resumed = {ordinal: refs["uri"].to_pylist() for ordinal, refs in shard_lists(plan, path, without={0, 2})}
    assert resumed == {1: whole[1], 3: whole[3]}


def test_shards_cross_the_pieces_in_which_the_list_is_read(frozen_list: Callable[[int], Path]) -> None:
    plan = make_plan("file:///dest", planned=20_000, shard_size=7_000)
    sizes = [(refs["uri"][0].as_py(), len(refs)) for _, refs in shard_lists(plan, frozen_list(20_000), without=set())]
    assert sizes == [("image-00000", 7_000), ("image-07000", 7_000), ("image-14000", 6_000)]


def test_shard_size_aims_at_the_part_size_but_keeps_all_actors_busy() -> None:
    assert choose_shard_size(10_000_000, actors=1, row_bytes=1024.0) == TARGET_PART_BYTES // 1024
    assert choose_shard_size(1_000, actors=10, row_bytes=1024.0) == 25
    assert choose_shard_size(1_000, actors=10, row_bytes=None) == 25
    assert choose_shard_size(3, actors=10, row_bytes=None) == 1
    assert choose_shard_size(100, actors=1, row_bytes=1e12) == 1
    assert choose_shard_size(10**9, actors=1, row_bytes=1.0) == TARGET_PART_BYTES // 1024
