"""Old versions of models, deleted. Owns: which versions go, and deleting what their runs left.
Must not know: how runs are planned or worked on.

    mark every run ─▶ delete its Parts ─▶ delete its list, report and the like

A run is marked by `pruned.json` beside its record, create-only, and a marked run is never half there: its rows may be
on disk still, and whoever finds the mark may delete them. So the same command again finishes, whatever the moment at
which it was killed. The record stays, with what the run found gone from SOURCE, which holds for other versions too.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict

from pipeline.errors import InfrastructureError, UsageError
from pipeline.storage import Storage, join_uri, normalize_uri, open_storage
from pipeline.table.catalog import files_below
from pipeline.table.runs import PRUNED_NAME, RunFiles, read_runs
from pipeline.table.schema import parse_part_name

_DELETES_AT_ONCE = 16
#: What is deleted of a run besides its Parts.
LEFT_BEHIND = ("manifest.parquet", "report.html", "progress.json", "lease.json")


class VersionFate(BaseModel):
    """What becomes of the Parts of one version of a model. `is_open`: a run of it is open, so that it stays in any
    case. `last_run`: of its finished ones; "" where none is. `bytes`: of its Parts."""

    model_config = ConfigDict(frozen=True)

    model: str
    version: str
    goes: bool
    is_open: bool
    last_run: str
    runs: int
    parts: int
    bytes: int


class Pruning(BaseModel):
    """What `prune` did, or would do. `versions`: every one that has rows or unfinished deletions, by model, the newest
    first. `done`: whether it was done."""

    model_config = ConfigDict(frozen=True)

    versions: tuple[VersionFate, ...]
    done: bool

    @property
    def going(self) -> tuple[VersionFate, ...]:
        """Those that go."""
        return tuple(version for version in self.versions if version.goes)


#: True, False, or what is told first what would be done, and answers.
Consent = bool | Callable[[Pruning], bool]


def prune(dest: str, *, keep_versions: int, yes: Consent = False, profile: str | None = None) -> Pruning:
    """Deletes the Parts of all but the newest `keep_versions` versions of each model; without `yes` only says which.

    The newest version is the one whose run was finished last, so after going back to an older one that is the newest:
    what the view `images` shows always stays. Versions with an open run stay, too. Deleted are Parts, frozen lists and
    reports; records of runs, in state `pruned` from then on, and evaluations stay. Readers that opened the table before
    lose the files under their hands.

    Raises UsageError (nothing was changed), InfrastructureError (the same call again goes on where this one stopped).
    """
    dest = normalize_uri(dest)
    return prune_in(open_storage(dest, profile=profile), dest, keep_versions=keep_versions, yes=yes)


def prune_in(storage: Storage, dest: str, *, keep_versions: int, yes: Consent) -> Pruning:
    """As `prune`, on a store that is open already."""
    if keep_versions < 1:
        raise UsageError(f"--keep-versions is {keep_versions}: give 1 or more, the newest version always stays")
    # Runs before files: a Part that is listed and not known to a run is left alone.
    runs = read_runs(storage, dest)
    if not runs:
        raise UsageError(f"{dest} holds no Maskmill table: give the DEST of an earlier `maskmill segment`")
    for run in runs:
        if run.damage:
            raise InfrastructureError(f"{run.damage}: `maskmill verify {dest}` says how to mend it; then prune again")
    sizes: dict[str, dict[str, int]] = {run.run_id: {} for run in runs}
    for uri, size_bytes in files_below(storage, join_uri(dest, "segments")).items():
        parsed = parse_part_name(uri.rpartition("/")[2])
        if parsed and parsed[0] in sizes:
            sizes[parsed[0]][uri] = size_bytes
    going = _going(runs, keep_versions)
    found = Pruning(versions=_fates(runs, sizes, going), done=False)
    if not found.going or not (yes(found) if callable(yes) else yes):
        return found
    doomed = [run for run in runs if run.run_id in going]
    body = json.dumps({"at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "keep_versions": keep_versions})
    _at_once(
        lambda uri: storage.put_new(uri, body.encode()),
        [_uri(dest, run, PRUNED_NAME) for run in doomed if not run.pruned],
    )
    _at_once(storage.delete, [uri for run in doomed for uri in sizes[run.run_id]])
    _at_once(storage.delete, [_uri(dest, run, name) for run in doomed for name in LEFT_BEHIND if name in run.names])
    return found.model_copy(update={"done": True})


def leftovers(run: RunFiles, parts: Iterable[str]) -> list[str]:
    """Of a run that is marked: what of it should be gone and is there. `parts`: URIs of its Parts."""
    return [*parts, *(name for name in LEFT_BEHIND if name in run.names)] if run.pruned else []


def _going(runs: Sequence[RunFiles], keep_versions: int) -> frozenset[str]:
    """The runs that go: those of old versions, and those that were marked before."""
    newest: dict[str, dict[str, int]] = {}
    open_versions = set()
    for run in runs:
        model, version = run.plan["model_name"], run.plan["model_version"]
        if run.outcome is None:
            open_versions.add((model, version))
        elif not run.pruned:
            done = run.outcome["state"] == "done"
            of_model = newest.setdefault(model, {})
            # Runs that were given up count for nothing beside finished ones.
            of_model[version] = max(of_model.get(version, 0), run.plan["sequence"] if done else 0)
    kept = set(open_versions)
    for model, of_model in newest.items():
        ordered = sorted(of_model, key=lambda version: (-of_model[version], version))
        kept |= {(model, version) for version in ordered[:keep_versions]}
    return frozenset(
        run.run_id for run in runs
        if run.pruned or (run.plan["model_name"], run.plan["model_version"]) not in kept
    )  # fmt: skip


def _fates(
    runs: Sequence[RunFiles], sizes: Mapping[str, Mapping[str, int]], going: frozenset[str]
) -> tuple[VersionFate, ...]:
    grouped: dict[tuple[str, str, bool], list[RunFiles]] = {}
    for run in runs:
        finished_deleting = run.pruned and not leftovers(run, sizes[run.run_id])
        if not finished_deleting:
            key = run.plan["model_name"], run.plan["model_version"], run.run_id in going
            grouped.setdefault(key, []).append(run)
    fates = [
        VersionFate(
            model=model,
            version=version,
            goes=goes,
            is_open=any(run.outcome is None for run in some),
            last_run=max((run.run_id for run in some if run.outcome and run.outcome["state"] == "done"), default=""),
            runs=len(some),
            parts=sum(len(sizes[run.run_id]) for run in some),
            bytes=sum(sum(sizes[run.run_id].values()) for run in some),
        )
        for (model, version, goes), some in grouped.items()
    ]
    fates.sort(key=lambda fate: fate.last_run, reverse=True)
    return tuple(sorted(fates, key=lambda fate: (fate.model, fate.goes)))


def _at_once(call: Callable[[str], object], uris: Sequence[str]) -> None:
    with ThreadPoolExecutor(_DELETES_AT_ONCE) as pool:
        for _ in pool.map(call, uris):
            pass


def _uri(dest: str, run: RunFiles, name: str) -> str:
    return join_uri(dest, "runs", run.run_id, name)
