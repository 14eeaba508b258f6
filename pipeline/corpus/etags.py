"""Etags that nobody wrote down: asked of the stores, many at once. Owns: the HEAD requests of a manifest.
Must not know: what a manifest is, or what becomes of its rows.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StorageError, UsageError
from pipeline.storage import (
    LISTING_SCHEMA,
    ObjectInfo,
    Storage,
    hide_secrets,
    is_chain,
    open_storage,
    store_root,
    without_secrets,
)

log = logging.getLogger(__name__)

HEAD_THREADS = 32


class EtagFiller:
    """Asks the stores for the etags that a batch does not hold. A context manager: it owns threads."""

    def __init__(self, profile: str | None, threads: int) -> None:
        self._profile = profile
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="head")
        self._storages: dict[str, Storage | None] = {}
        #: Images of which the store says that they are not there, and one of them.
        self.missing = 0
        self.example = ""

    def __enter__(self) -> EtagFiller:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def fill(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with no null etag; sizes and times of the rows that were asked for come from the store
        too."""
        unknown = pc.equal(pc.fill_null(batch.column("etag"), ""), "")
        if batch.num_rows == 0 or not pc.any(unknown).as_py():
            return batch
        uris = pc.filter(batch.column("uri"), unknown).to_pylist()
        for uri in uris:
            self._open(uri)
        answers: list[ObjectInfo | None] = []
        failures: list[StorageError] = []
        for uri, answer in zip(uris, self._pool.map(self._info, uris), strict=True):
            if isinstance(answer, StorageError) and answer.kind == "missing":
                self.missing += 1
                self.example = uri
            elif isinstance(answer, StorageError) and answer.kind == "fetch_failed":
                failures.append(answer)
            answers.append(None if isinstance(answer, StorageError) else answer)
        if len(failures) * 2 > len(uris):
            raise failures[0]
        replaced = {
            "etag": [info.etag if info else "" for info in answers],
            "size_bytes": [info.size_bytes if info and info.size_bytes >= 0 else None for info in answers],
            "modified": [info.modified if info else None for info in answers],
        }
        columns = [batch.column("uri")]
        for field in list(LISTING_SCHEMA)[1:]:
            values = pa.array(replaced[field.name], field.type)
            columns.append(pc.replace_with_mask(batch.column(field.name), unknown, values))
        return pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA)

    def _open(self, uri: str) -> Storage | None:
        if is_chain(uri):  # each is a store of its own, which none can open
            return None
        root = store_root(uri)
        if root not in self._storages:
            try:
                self._storages[root] = open_storage(root, profile=self._profile)
            except (UsageError, StorageError) as error:
                log.warning("%s", error)
                self._storages[root] = None
            except Exception as error:  # noqa: BLE001 - the per-image boundary: the run will say it in its row
                log.warning("%r could not be opened: %s", without_secrets(root), hide_secrets(str(error)))
                self._storages[root] = None
        return self._storages[root]

    def _info(self, uri: str) -> ObjectInfo | StorageError | None:
        """None for an image that no store can have."""
        storage = self._open(uri)
        try:
            return storage.head(uri) if storage else None
        except UsageError:
            return None
        except StorageError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the per-image boundary: the run will say it in its row
            why = hide_secrets(f"{type(error).__name__}: {error}")
            return StorageError(f"could not look at {without_secrets(uri)!r}: {why}", kind="fetch_failed")
