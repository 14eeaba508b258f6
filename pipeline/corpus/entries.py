"""Files that name images one by one: Parquet, CSV, JSON Lines and plain text, read in batches.
Must not know: listing, HEAD requests, or what becomes of the rows.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.storage import (
    CREDENTIALS_ADVICE,
    CREDENTIALS_BEFORE_BUCKET,
    CREDENTIALS_BEFORE_HOST,
    LISTING_SCHEMA,
    Storage,
    join_uri,
    local_path,
    uri_scheme,
    without_secrets,
)

ENTRY_SUFFIXES = (".parquet", ".csv", ".jsonl", ".txt")
URI_COLUMNS = ("uri", "image_uri", "path", "url")
_ROWS_PER_BATCH = 50_000
_HEADER_BYTES = 1 << 20
_ABSOLUTE = r"\A(?:[A-Za-z][A-Za-z0-9+.\-]*::)*[A-Za-z][A-Za-z0-9+.\-]*://"
_UNTIDY = r"(?:\A|/)\.{0,2}(?:/|\z)"
_TEXT_COLUMNS = {**dict.fromkeys(URI_COLUMNS, pa.string()), "etag": pa.string(), "modified": pa.string()}


def read_entries(uri: str, storage: Storage) -> Iterator[pa.RecordBatch]:
    """The rows of the manifest file `uri`, as batches of LISTING_SCHEMA in the file's order.

    Entries without a scheme are paths: relative ones lie beside the manifest. Everything else is taken raw,
    never percent-decoded. An etag, size or time that the file does not give is null; etags lose their quotes
    and `W/`.
    Raises UsageError for a file that cannot be read as what its suffix says, that has no column for the URI, in which
    a row has none, or one with credentials before a bucket's name or with a slash in them. Local files are read piece
    by piece; remote ones are fetched whole first.
    """
    shown = without_secrets(uri)
    folder = _location(uri).rpartition("/")[0]
    row = 0
    try:
        with open_bytes(uri, storage) as stream:
            for batch in _READERS[posixpath.splitext(file_name(uri))[1]](stream):
                columns = columns_of(batch)
                rows = _rows(columns, folder)
                missing = pc.index(rows.column("uri"), "").as_py()
                if missing >= 0:
                    raise UsageError(f"the manifest {shown!r} has no URI in row {row + missing + 1}; remove that row")
                _refuse_credentials(rows.column("uri"), shown, row)
                row += batch.num_rows
                yield rows
    except (pa.ArrowException, UnicodeDecodeError, _EntryError) as error:
        text = str(error).partition("\n")[0]
        near = "" if isinstance(error, _EntryError) else f" near row {row + 1}"
        raise UsageError(f"the manifest {shown!r} cannot be read{near}: {text}") from error


def _refuse_credentials(uris: pa.Array, shown: str, row: int) -> None:
    # Few names have an @, which is told for a tenth of a regex.
    if not pc.any(pc.match_substring(uris, "@")).as_py():
        return
    for where, what in ((CREDENTIALS_BEFORE_BUCKET, "bucket"), (CREDENTIALS_BEFORE_HOST, "host")):
        at = pc.index(pc.match_substring_regex(uris, where), True).as_py()
        if at >= 0:
            raise UsageError(
                f"the manifest {shown!r} holds credentials in row {row + at + 1}, before the {what} of "
                f"{without_secrets(uris[at].as_py())!r}: {CREDENTIALS_ADVICE}"
            )


def columns_of(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """Its columns by name. Raises ArrowInvalid where two have the same: nobody knows which is meant."""
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise pa.ArrowInvalid(f"two of its columns have the same name: {', '.join(names)}")
    return dict(zip(names, batch.columns, strict=True))


def file_name(uri: str) -> str:
    """The last part of `uri` in lower case: what tells a manifest by its suffix."""
    return _location(uri).rpartition("/")[2].lower()


def _location(uri: str) -> str:
    """`uri`, of a web address without the query, which is not part of the name."""
    return uri.partition("?")[0] if uri_scheme(uri) in ("http", "https") else uri


def open_bytes(uri: str, storage: Storage) -> pa.NativeFile:
    """The bytes of `uri` as a random access file; a local file is not held in memory."""
    if uri_scheme(uri) == "file":
        return pa.OSFile(os.fsencode(local_path(uri)), "rb")
    return pa.BufferReader(storage.get(uri).data)


def as_listing(
    uris: pa.Array, etags: pa.Array | None, sizes: pa.Array | None, modified: pa.Array | None
) -> pa.RecordBatch:
    """One batch of LISTING_SCHEMA from columns of whatever types a file had; None becomes nulls.

    Raises ArrowInvalid where a value cannot be cast, or a text is not UTF-8. Times without a zone are taken as UTC.
    """
    for texts in (uris, etags):
        if texts is not None:
            texts.validate(full=True)  # Parquet's may hold anything
    nulls = pa.nulls(len(uris))
    etag = (etags if etags is not None else nulls).cast(pa.string())
    if pc.any(pc.or_(pc.match_substring(etag, '"'), pc.starts_with(etag, "W/"))).as_py():
        etag = pc.utf8_trim(pc.replace_substring_regex(etag, r"\AW/", ""), characters='"')
    moment = modified if modified is not None else nulls
    if pa.types.is_string(moment.type) or pa.types.is_large_string(moment.type):
        date = pc.match_substring_regex(moment, r"\A\d{4}-\d\d-\d\d\z")
        moment = pc.if_else(date, pc.binary_join_element_wise(moment, "T00:00:00Z", ""), moment)
        zoned = pc.match_substring_regex(moment, r"(?:Z|[+-]\d\d:?\d\d)\z")
        moment = pc.if_else(zoned, moment, pc.binary_join_element_wise(moment, "Z", ""))
    elif pa.types.is_timestamp(moment.type) and moment.type.tz is None:
        moment = moment.cast(pa.timestamp("us"), safe=False)
    size = sizes if sizes is not None else nulls
    columns = [
        pc.fill_null(uris.cast(pa.string()), ""),
        etag,
        size.cast(pa.int64()),
        moment.cast(pa.timestamp("us", "UTC"), safe=False),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA)


class _EntryError(ValueError):
    """A file that is well formed and not a manifest."""


def _rows(columns: dict[str, pa.Array], folder: str) -> pa.RecordBatch:
    found = [columns[name].cast(pa.string()) for name in URI_COLUMNS if name in columns]
    if not found:
        raise _EntryError(f"no column named {' or '.join(URI_COLUMNS)} among {', '.join(columns)}")
    uris = _absolute(pc.fill_null(pc.coalesce(*found), ""), folder)
    return as_listing(uris, columns.get("etag"), columns.get("size_bytes"), columns.get("modified"))


def _absolute(entries: pa.Array, folder: str) -> pa.Array:
    """Entries as absolute URIs; empty ones stay empty."""
    entries = pc.replace_substring_regex(entries, r"\Afile:/([^/])", r"file:///\1")
    has_scheme = pc.or_(pc.match_substring_regex(entries, _ABSOLUTE), pc.equal(entries, ""))
    if pc.all(has_scheme).as_py():
        return entries
    is_untidy = pc.and_(pc.invert(has_scheme), pc.match_substring_regex(entries, _UNTIDY))
    rooted = pc.starts_with(entries, "/")
    joined = pc.if_else(
        rooted,
        pc.binary_join_element_wise("file://", entries, ""),
        pc.binary_join_element_wise(join_uri(folder, ""), entries, ""),
    )
    uris = pc.if_else(has_scheme, entries, joined)
    untidy = pc.and_(is_untidy, pc.match_substring_regex(uris, _ABSOLUTE))
    if not pc.any(untidy).as_py():
        return uris
    tidied = pa.array([_tidy(text) for text in pc.filter(uris, untidy).to_pylist()], pa.string())
    return pc.replace_with_mask(uris, untidy, tidied)


def _tidy(uri: str) -> str:
    """Without `.`, `..` and empty segments, as a path on a disk would be resolved."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{posixpath.normpath(rest)}"


def _read_parquet(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(stream)
    wanted = [n for n in file.schema_arrow.names if n in _TEXT_COLUMNS or n == "size_bytes"]
    if not wanted:
        raise _EntryError(f"no column named {' or '.join(URI_COLUMNS)} among {', '.join(file.schema_arrow.names)}")
    yield from file.iter_batches(_ROWS_PER_BATCH, columns=wanted)


def _read_csv(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    parse = pacsv.ParseOptions(newlines_in_values=True)
    _refuse_open_quote(stream)
    # Not by a reader of Arrow's, which reads ahead in a thread: it would take blocks away from the one below.
    names = _csv_names(stream.read(_HEADER_BYTES))
    stream.seek(0)
    wanted = [name for name in names if name in _TEXT_COLUMNS or name == "size_bytes"]
    if names and not set(wanted) & set(URI_COLUMNS):
        raise _EntryError(f"no column named {' or '.join(URI_COLUMNS)} among {', '.join(names)}")
    convert = pacsv.ConvertOptions(
        column_types=_TEXT_COLUMNS | {"size_bytes": pa.int64()},
        include_columns=wanted,
        null_values=[""],
        strings_can_be_null=True,
    )
    yield from pacsv.open_csv(stream, parse_options=parse, convert_options=convert)


def _refuse_open_quote(stream: pa.NativeFile) -> None:
    """Arrow takes a file that was cut off inside a quoted value for whole. Few hold an odd number of quotes."""
    quotes = 0
    while block := stream.read(_HEADER_BYTES):
        quotes += block.count(b'"')
    stream.seek(0)
    if quotes % 2 == 0:
        return
    text = io.TextIOWrapper(stream, "utf-8", "replace", newline="")
    try:
        for _ in csv.reader(text, strict=True):
            pass
    except csv.Error as error:
        if "unexpected end" in str(error) or "field larger" in str(error):
            raise _EntryError("a quoted value in it does not end: it was cut off, or a quote is missing") from error
    finally:
        text.detach()  # it would close the stream
    stream.seek(0)


def _csv_names(head: bytes) -> list[str]:
    """The first row of a CSV that begins so; [] where it has none."""
    lines = io.StringIO(head.decode("utf-8-sig", "replace"), newline="")
    try:
        return next((row for row in csv.reader(lines) if row), [])
    except csv.Error as error:
        raise _EntryError(f"its first line is no row of a CSV: {error}") from error


def _read_jsonl(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    first = re.search(rb"\S", stream.read(4096))
    stream.seek(0)
    if first is None:
        return
    if first[0] != b"{":
        yield from _batches_of(_json_texts(stream))
        return
    schema = pa.schema([*_TEXT_COLUMNS.items(), ("size_bytes", pa.int64())])
    parse = pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        yield from pajson.open_json(stream, parse_options=parse)
    except pa.ArrowInvalid as error:
        # Arrow counts rows from the beginning of its block, a person lines from that of the file.
        stream.seek(0)
        _check_json_objects(stream, schema)
        raise error


def _json_texts(stream: pa.NativeFile) -> Iterator[str]:
    for number, line in _numbered_lines(stream):
        value = _json_value(number, line)
        if not isinstance(value, str):
            raise _EntryError(f"line {number} is no text in quotes, as the first one is: {line.strip()[:80]}")
        yield value


def _check_json_objects(stream: pa.NativeFile, schema: pa.Schema) -> None:
    """Raises _EntryError for the first line that is no object, or holds something else than `schema` says."""
    for number, line in _numbered_lines(stream):
        value = _json_value(number, line)
        if not isinstance(value, dict):
            raise _EntryError(f"line {number} is no object, as the first one is: {line.strip()[:80]}")
        for field in schema:
            one = value.get(field.name)
            if one is not None and not isinstance(one, int if pa.types.is_integer(field.type) else str):
                raise _EntryError(f"line {number} has {one!r} for {field.name}")


def _numbered_lines(stream: pa.NativeFile) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(io.TextIOWrapper(stream, "utf-8"), 1):
        if not line.isspace():
            yield number, line


def _json_value(number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _EntryError(f"line {number} is no JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # a number without end, brackets without end
        raise _EntryError(f"line {number} is no JSON that can be read: {error}") from error


def _read_text(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    lines = (line.rstrip("\r\n") for line in io.TextIOWrapper(stream, "utf-8-sig", newline="\n"))
    yield from _batches_of(line for line in lines if line.strip() and not line.startswith("# "))


def _batches_of(uris: Iterable[object]) -> Iterator[pa.RecordBatch]:
    source = iter(uris)
    while chunk := list(islice(source, _ROWS_PER_BATCH)):
        yield pa.record_batch({"uri": pa.array(chunk, pa.string())})


_READERS = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl, ".txt": _read_text}
