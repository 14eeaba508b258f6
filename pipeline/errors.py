"""The error tree. Owns: every exception Maskmill raises on purpose, and the closed list of row error kinds.
Must not know: anything else of the project.

    MaskmillError
    ├── UsageError            the caller must change something (exit 2)
    │   ├── ModelError        a model file that is missing, cut off, or not a model
    │   ├── ChampionChangedError  another champion came while this change was being decided
    │   └── HeldError         another live driver holds the run
    ├── InfrastructureError   the world failed: storage, workers, disk (exit 1; committed Parts are kept)
    │   ├── StorageError      one storage call; carries `kind`
    │   │   └── ExpiredCredentialsError   the store takes our credentials no more: no object's own fault
    │   ├── DeviceLostError   a worker's device answers nothing any more
    │   ├── WorldFailingError more than half of the last images failed for reasons outside them
    │   ├── SupersededError   another driver took this run over
    │   ├── StoppedError          the caller asked to stop (exit 130)
    │   └── ReconciliationError   a run whose rows do not add up
    └── ImageError            one image's own fault or fate; becomes a row, never an exit
"""

from __future__ import annotations

#: About the image's bytes: the row is terminal.
BYTES_KINDS = frozenset({"empty", "truncated", "not_an_image", "unsupported", "too_large", "corrupt", "model_failed"})
#: About the world: retried in the run, recorded if it lasts, taken up again by the next run.
WORLD_KINDS = frozenset({"missing", "denied", "fetch_failed", "out_of_memory", "crashed_worker"})
#: World kinds that are taken up again however often they failed.
ALWAYS_RETRIED_KINDS = frozenset({"missing", "denied"})


class MaskmillError(Exception):
    """Base of all. The message says what was wrong, with which value, and what to do."""


class UsageError(MaskmillError):
    """The command or call cannot be carried out as given. Nothing was changed."""


class ModelError(UsageError):
    """A model reference that cannot be resolved, or a file that is not a model."""


class ChampionChangedError(UsageError):
    """The champion changed while a promotion or rollback was being decided, so that the decision was about another."""


class HeldError(UsageError):
    """A run is held by another live driver."""


class InfrastructureError(MaskmillError):
    """The world failed. What was committed is kept; the same command continues."""


class WorldFailingError(InfrastructureError):
    """More than half of the last images failed for the world's reasons: their shards are not committed."""

    @classmethod
    def like(cls, example: str) -> WorldFailingError:
        """`example`: what happened to one of these images."""
        return cls(
            "more than half of the last images failed for reasons outside them (storage, permissions, memory), such "
            f"as: {example}. Nothing of these shards was committed, and the same command continues"
        )


class StorageError(InfrastructureError):
    """A storage call failed for good (after its own retries).

    `kind` is one of `missing`, `denied`, `fetch_failed` (anything else).
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def told(self, sentence: str, usage: type[UsageError] = UsageError) -> MaskmillError:
        """The same in the words of `sentence`: wrong usage where something is not there, or may not be touched. A store
        that fails may answer the next time, and stays the world's failure."""
        return StorageError(sentence, kind=self.kind) if self.kind == "fetch_failed" else usage(sentence)

    def __reduce__(self) -> tuple[object, ...]:
        return (_storage_error, (type(self), str(self), self.kind))


class ExpiredCredentialsError(StorageError):
    """The store takes our credentials no more, and looking them up anew gave none that it takes. `kind` is `denied`.

    It says nothing of the object that was asked for: so a run stops, and makes no row of it.
    """

    def told(self, sentence: str, usage: type[UsageError] = UsageError) -> MaskmillError:
        """The same in the words of `sentence`: renewed credentials make the same command work."""
        return ExpiredCredentialsError(sentence, kind=self.kind)


def _storage_error(error: type[StorageError], message: str, kind: str) -> StorageError:
    return error(message, kind=kind)


class DeviceLostError(InfrastructureError):
    """A worker's device answers nothing any more. Its process is replaced, and its shards start again."""


class SupersededError(InfrastructureError):
    """Another driver took over this run's lease; this one adds nothing more."""


class StoppedError(InfrastructureError):
    """The caller asked to stop. What was committed is kept."""


class ReconciliationError(InfrastructureError):
    """The committed Parts do not hold exactly one row per listed image."""


class ImageError(MaskmillError):
    """One image failed. `kind` is in BYTES_KINDS or WORLD_KINDS."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_image_error, (str(self), self.kind))


def _image_error(message: str, kind: str) -> ImageError:
    return ImageError(message, kind=kind)
