"""The names of objects. Owns: what a URI is here, and how one is made, joined and taken apart.
Must not know: any store or client.

A URI is absolute, `scheme://rest`, and raw: it is never percent-encoded or percent-decoded, so a name with
spaces, quotes, `#`, `?`, `%` or unicode in it stays as it is in the store. Local files are
`file:///absolute/path`."""

from __future__ import annotations

import os
import re

from pipeline.errors import UsageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")


def normalize_uri(text: str) -> str:
    """`./x`, `~/x` and `/x` become `file:///...` (absolute, `..` resolved, no trailing slash); URIs stay as
    they are.

    `file:/x` becomes `file:///x`. Raises UsageError for an empty text and for a `file://` URI that is not
    absolute."""
    if not text:
        raise UsageError("an empty URI; give a folder such as ./photos or s3://bucket/photos")
    if text.startswith("file:") and not text.startswith("file://"):
        text = "file://" + text[len("file:") :]
    if _SCHEME.match(text):
        if text.startswith("file://") and not text.startswith("file:///"):
            raise UsageError(f"{text!r} is not absolute; write file:///folder/name with three slashes, or a plain path")
        return text
    return "file://" + os.path.abspath(os.path.expanduser(text))


def uri_scheme(uri: str) -> str:
    """`s3` of `s3://b/k`. Raises UsageError for a text that is no URI."""
    match = _SCHEME.match(uri)
    if match is None:
        raise UsageError(f"{uri!r} is not a URI; expected scheme://..., such as s3://bucket/key or file:///folder/name")
    return match[1].lower()


def join_uri(base: str, *names: str) -> str:
    """`base/name/name`, with exactly one slash after `base` and between names."""
    return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])


def uri_name(uri: str) -> str:
    """The last segment: `c.jpg` of `s3://b/a/c.jpg`, `a` of `s3://b/a/`."""
    return uri.rstrip("/").rpartition("/")[2]


def local_path(uri: str) -> str:
    """`/x` of `file:///x`, raw. Raises UsageError for another scheme or a relative path."""
    if not uri.startswith("file:///"):
        raise UsageError(f"{uri!r} is not a local file; expected file:///absolute/path")
    return uri[len("file://") :]


def duckdb_path(uri: str) -> str:
    """What DuckDB is to be given for this URI: local files by their path, everything else unchanged."""
    return local_path(uri) if uri.startswith("file://") else uri


def clean_etag(etag: str | None) -> str:
    """An ETag without its quotes and without the `W/` of a weak one; `""` for none."""
    if not etag:
        return ""
    return etag.removeprefix("W/").strip('"')
