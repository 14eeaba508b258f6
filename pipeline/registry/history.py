"""What was decided about the models of a name. Owns: the entries, their files, and that only one writer can add the
next. Must not know: model files, what makes a decision good.

An entry holds the whole state after it, so that its newest file alone says what holds now, and an old one that is
damaged hides nothing but itself. Two writers that saw the same newest entry both try to create the next number, and the
store lets one of them: no lock, no clock, nothing overwritten.
"""

from __future__ import annotations

import datetime as dt
import getpass
import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from pipeline.errors import ModelError
from pipeline.storage import Storage, join_uri

FOLDER = "_history"
CHAMPION = "champion"
CHALLENGER = "challenger"
_NAME = re.compile(r"(\d{8})\.json")
_ALIASES = TypeAdapter(dict[str, str])

Action = Literal["push", "alias", "promote", "keep", "rollback"]


def _writer() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


class Entry(BaseModel):
    """One decision, and what holds after it. Fields that a newer release may add are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    #: From 1; the file's name.
    number: int = Field(ge=1)
    #: Random: whose entry this is, where the answer to its write was lost.
    id: str = Field(default_factory=lambda: secrets.token_hex(8))
    at: dt.datetime = Field(default_factory=lambda: dt.datetime.now(dt.UTC))
    #: USER@HOST.
    by: str = Field(default_factory=_writer)
    #: `keep`: a challenger was held against the champion, and was not good enough.
    action: Action
    #: The version that it is about.
    version: str
    #: The champion before.
    champion_before: str | None
    #: Version by alias, after this entry.
    aliases: dict[str, str]
    #: The champions before the present one, the last of them last; a rollback takes that.
    former_champions: tuple[str, ...] = ()
    reason: str | None = None
    #: What the gate asked and found: see pipeline.learning.promotion.
    decision: dict[str, JsonValue] | None = None


class State(NamedTuple):
    """What holds now. `number` is that of the newest entry, 0 where there is none."""

    number: int
    aliases: Mapping[str, str]
    former_champions: tuple[str, ...]

    @property
    def champion(self) -> str | None:
        return self.aliases.get(CHAMPION)

    def followed_by(self, action: Action, version: str, *, champion_before: str | None, **fields: Any) -> Entry:
        """The next entry, in which nothing changes but what `fields` say."""
        kept = {"aliases": dict(self.aliases), "former_champions": self.former_champions}
        return Entry(
            number=self.number + 1, action=action, version=version, champion_before=champion_before, **kept | fields
        )


def entry_numbers(file_names: Iterable[str]) -> list[int]:
    """Numbers of the entries among the names of the files in a history's folder, ascending; foreign files left out."""
    found = (_NAME.fullmatch(name) for name in file_names)
    return sorted(int(name[1]) for name in found if name)


def entry_uri(folder_uri: str, number: int) -> str:
    return join_uri(folder_uri, FOLDER, f"{number:08d}.json")


def read_entry(storage: Storage, folder_uri: str, number: int) -> Entry:
    """Raises ModelError for an entry that is damaged, StorageError where it cannot be read."""
    uri = entry_uri(folder_uri, number)
    try:
        entry = Entry.model_validate_json(bytes(storage.get(uri).data))
    except ValidationError as error:
        raise ModelError(
            f"{uri} is damaged, or of a newer release of Maskmill ({error.errors()[0]['msg'].lower()}): bring it back "
            "from a copy. If it is the newest and lost, delete it, and what the entry before it says holds again"
        ) from error
    if entry.number != number:
        raise ModelError(f"{uri} says that it is entry {entry.number}: it was moved or copied here, take it away")
    return entry


def read_state(storage: Storage, folder_uri: str, numbers: list[int], aliases_uri: str | None) -> State:
    """The newest entry's state; where there is none, what `aliases.json` says, which older releases wrote. Raises as
    `read_entry`.
    """
    if numbers:
        entry = read_entry(storage, folder_uri, numbers[-1])
        return State(entry.number, entry.aliases, entry.former_champions)
    if aliases_uri is None:
        return State(0, {}, ())
    try:
        return State(0, _ALIASES.validate_json(bytes(storage.get(aliases_uri).data)), ())
    except ValidationError as error:
        raise ModelError(
            f"{aliases_uri} must be a JSON object of aliases and versions: {error.errors()[0]['msg'].lower()}"
        ) from error


def append(storage: Storage, folder_uri: str, entry: Entry) -> bool:
    """Makes `entry` real in one atomic step; False where another writer's entry has its number. Safe to repeat."""
    uri, data = entry_uri(folder_uri, entry.number), entry.model_dump_json(indent=1).encode()
    # After an answer that was lost on its way, "already there" may mean our own.
    return storage.put_new(uri, data) or bytes(storage.get(uri).data) == data
