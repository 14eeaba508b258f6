"""The names of objects. Owns: what a URI is here, and how one is made, joined and taken apart.
Must not know: any store or client.

A URI is absolute, `scheme://rest`, and raw: it is never percent-encoded or percent-decoded, so a name with
spaces, quotes, `#`, `?`, `%` or unicode in it stays as it is in the store. Local files are
`file:///absolute/path`.

A URI is valid UTF-8, and the names of local files may be any bytes. A byte that is not part of valid UTF-8, 0x80 to
0xFF, is written as the character U+EF00 plus the byte, U+EF80 to U+EFFF, of Unicode's private use area. So that this
can be undone, a name that really holds one of those characters has each of its three bytes written that way. Every
name has one URI of its own, and its URI leads back to it. In Python the bytes of such a name are
`b"".join(bytes([ord(c) - 0xEF00]) if 0xEF80 <= ord(c) <= 0xEFFF else c.encode() for c in name)`."""

from __future__ import annotations

import hashlib
import os
import re
from typing import NoReturn
from urllib.parse import urlsplit

from pipeline.errors import UsageError

_ESCAPE = 0xEF00
_ESCAPED = re.compile("[\uef80-\uefff]+")
_SURROGATES = re.compile("[\udc80-\udcff]+")  # how Python's paths hold such bytes
_UNWRITABLE = re.compile("[\uef80-\uefff\udc80-\udcff]+")
# Parameters by which stores sign an address (AWS, Google, CloudFront, Azure, Alibaba), and what sounds like a secret.
_SECRET_PARAMETER = re.compile(
    r"(?:x-(?:amz|goog|oss)-[^=]*|expires|policy|awsaccesskeyid|googleaccessid|ossaccesskeyid|s[vreptk]|sip|spr|sdd|sig"
    r"|sk[a-z]+|ss|srt|[^=]*(?:sign|token|secret|passw|key|auth|cred|session)[^=]*)(?:=|\Z)",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>]+")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.\-]*(?:://|::))")
_BEGINS_CHAIN = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.\-]*::)+[A-Za-z][A-Za-z0-9+.\-]*://")
_WEB = ("http://", "https://")
# Of these every name is one of an object, whatever it looks like.
_NAMES = ("file", "s3", "gs", "memory", "http", "https")
# In the text of others an address on the web may have quotes in it, which elsewhere end one.
_WEB_QUERY = re.compile(r"(https?://[^\s?]+)\?(\S+)", re.IGNORECASE)
_WEB_PASSWORD = re.compile(r"(https?://)[^/@\s]*@", re.IGNORECASE)
_ENDS_A_PART = ".,;:)]}`"
#: No bucket has an @ in its name, but a secret key may have a slash. For Python and RE2.
CREDENTIALS_BEFORE_BUCKET = r"\A(?i:s3|gs)://(?:[^/]*@|[A-Z0-9]{16,}:[^@]*@)"
_SLASHED = r"[^/?:\[]*:[0-9]*[^/?@0-9][^/?@]*[/?][^@]*@(?:[^/?@]*@)*"
#: A password with a slash ends what reads as the host: there a colon is followed by no port. For Python and RE2.
CREDENTIALS_BEFORE_HOST = rf"\A(?i:https?)://{_SLASHED}"
CREDENTIALS_ADVICE = (
    "credentials do not belong in an address, where they are shown and kept: make these invalid, and give others by "
    "a profile or by environment variables"
)


def normalize_uri(text: str) -> str:
    """`./x`, `~/x` and `/x` become `file:///...` (absolute, `..` resolved, no trailing slash); URIs stay as
    they are.

    `file:/x` becomes `file:///x`. Raises UsageError for an empty text, for a `file://` URI that is not absolute, for
    credentials before a bucket's name or with a slash in them, and for a chain that begins with no address, as
    `simplecache::s3://b/k`."""
    if not text:
        raise UsageError("an empty URI; give a folder such as ./photos or s3://bucket/photos")
    if text.startswith("file:") and not text.startswith("file://"):
        text = "file://" + text[len("file:") :]
    if _SCHEME.match(text):
        text = _SURROGATES.sub(_escape, text)
        if text.startswith("file://") and not text.startswith("file:///"):
            shown = without_secrets(text)
            raise UsageError(
                f"{shown!r} is not absolute; write file:///folder/name with three slashes, or a plain path"
            )
        if re.match(CREDENTIALS_BEFORE_BUCKET, text) or re.match(CREDENTIALS_BEFORE_HOST, text):
            raise UsageError(f"{without_secrets(text)!r}, as it was given, holds credentials: {CREDENTIALS_ADVICE}")
        return text
    if _BEGINS_CHAIN.match(text):
        refuse_chain(text)
    return file_uri(os.path.abspath(os.path.expanduser(text)))


def file_uri(path: str) -> str:
    """The URI of an absolute path, as `os` gives it."""
    return "file://" + (path if path.isascii() else _UNWRITABLE.sub(_escape, path))


def uri_scheme(uri: str) -> str:
    """`s3` of `s3://b/k`. Raises UsageError for a text that is no URI."""
    match = _SCHEME.match(uri)
    if match is None:
        shown = without_secrets(uri)
        raise UsageError(
            f"{shown!r} is not a URI; expected scheme://..., such as s3://bucket/key or file:///folder/name"
        )
    return match[1].lower()


def refuse_chain(uri: str) -> NoReturn:
    """Raises UsageError."""
    raise UsageError(f"{without_secrets(uri)!r} is a chain of stores, which cannot be opened: name one store")


def is_chain(uri: str) -> bool:
    """Whether fsspec would open one store inside another: `zip://a.jpg::https://host/x.zip`. Names in buckets, on
    disks, on the web and in memory may look like that."""
    if "::" not in uri or uri.partition("://")[0].lower() in _NAMES:
        return False
    links = chain_links(uri)
    return len(links) > 1 and "://" in links[-1]


def store_root(uri: str) -> str:
    """The store that holds an object: `s3://b/` of `s3://b/k`, `file:///` of every local file, all of a chain."""
    if is_chain(uri):
        return uri
    return uri[: uri.find("/", uri.find("://") + 3) + 1] or uri


def join_uri(base: str, *names: str) -> str:
    """`base/name/name`, with exactly one slash after `base` and between names."""
    return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])


def uri_name(uri: str) -> str:
    """The last segment: `c.jpg` of `s3://b/a/c.jpg`, `a` of `s3://b/a/`."""
    return uri.rstrip("/").rpartition("/")[2]


def local_path(uri: str) -> str:
    """`/x` of `file:///x`, for `os`. Raises UsageError for another scheme or a relative path."""
    if not uri.startswith("file:///"):
        raise UsageError(f"{without_secrets(uri)!r} is not a local file; expected file:///absolute/path")
    return path_text(uri[len("file://") :])


def given_path(text: str) -> str:
    """The file on this machine that somebody names: `/x` of `file:///x`, a path as it is. `Path` would take any other
    address for folders below this one: raises UsageError, which shows no more of it than its scheme, as the rest may
    hold secrets."""
    if not text:
        raise UsageError("an empty name: give a file on this machine")
    is_uri = text.startswith("file:/")
    if found := _SCHEME.search(text, len("file:/") if is_uri else 0):
        raise UsageError(f"'{found[0]}…' is an address: give a file on this machine")
    return local_path(normalize_uri(text)) if is_uri else text


def path_text(text: str) -> str:
    """A part of a local URI as `os` wants it."""
    if text.isascii() or not _ESCAPED.search(text):
        return text
    # All at once: bytes that were written one by one may be a character together.
    return os.fsdecode(_ESCAPED.sub(_unescape, text).encode("utf-8", "surrogateescape"))


def duckdb_path(uri: str) -> str:
    """What DuckDB is to be given for this URI, so that it takes it as one name: local files by their path, of which the
    literal name wins over a glob by itself; everything else with its wild cards escaped, but for web addresses, which
    have none. Raises UsageError for a path that is not UTF-8."""
    if uri.startswith(_WEB):
        return uri
    if not uri.startswith("file://"):
        return re.sub(r"([*?\[])", r"[\1]", uri)
    path = local_path(uri)
    if _SURROGATES.search(path):
        raise UsageError(f"{uri!r}: DuckDB cannot read a path that is not UTF-8; rename the folder")
    return path


def sql_text(text: str) -> str:
    """`text` as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def check_web_address(uri: str) -> None:
    """Raises UsageError where an `http://` or `https://` URI names no host, or nothing that could be one."""
    shown = without_secrets(uri)
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{shown!r} is no web address: {error}") from error
    if not host:
        raise UsageError(f"{shown!r} names no host; expected {parts.scheme}://host/path")


def chain_links(uri: str) -> list[str]:
    """The addresses of a chain as fsspec writes it, `zip://a.jpg::https://host/x.zip`; of anything else, itself."""
    links = _CHAIN.split(uri)
    for number, link in enumerate(links):
        if "?" in link and link.lower().startswith(_WEB):  # the rest belongs to its query
            return [*links[:number], "::".join(links[number:])]
    return links


def without_password(link: str) -> str:
    """An address that is no chain, without what stands before its host and is a secret. On the web and before a bucket
    that is all of it; elsewhere it may be a user's or a container's name, and a password follows a colon. On GitHub it
    is a repository, `github://owner:repository@branch/path`."""
    scheme, mark, rest = link.partition("://")
    kind = scheme.lower()
    if not mark or kind == "github":
        return link
    if kind in ("s3", "gs"):
        found = re.match(CREDENTIALS_BEFORE_BUCKET, link)
        return f"{scheme}://{link[found.end() :]}" if found else link
    is_web = kind in ("http", "https")
    if is_web and (found := re.match(CREDENTIALS_BEFORE_HOST, link)):
        return f"{scheme}://{link[found.end() :]}"
    if "://" in rest and kind not in ("file", "memory"):
        place, mark, query = rest.partition("?")
        first, *nested = place.split("://")
        rest = "://".join([first, *map(_bare, nested)]) + mark + query
    user, at, host = re.split("[/?]" if is_web else "/", rest, maxsplit=1)[0].rpartition("@")
    name = "" if is_web else user.partition(":")[0] + at
    return f"{scheme}://{name}{host}{rest[len(user + at + host) :]}"


def _bare(place: str) -> str:
    """Of an address within another, `cached://https://me:password@host/a`, what stands behind its scheme."""
    if found := re.match(_SLASHED, place):
        return place[found.end() :]
    authority, slash, path = place.partition("/")
    return authority.rpartition("@")[2] + slash + path


def without_secrets(uri: str) -> str:
    """`uri` fit to be shown: an address may carry a password before its host, and all but the names of local files,
    objects in buckets and what is in memory a signature behind a question mark."""
    shown = [without_password(link) for link in chain_links(uri)]
    return "::".join(link.partition("?")[0] + "?…" if _has_query(link) else link for link in shown)


def holds_secret(uri: str) -> bool:
    """Whether `uri` is an address with a password, or with a parameter that signs it or sounds like a secret."""
    return any(
        without_password(link) != link
        or (_has_query(link) and any(map(_SECRET_PARAMETER.match, link.partition("?")[2].split("&"))))
        for link in chain_links(uri)
    )


def hide_secrets(text: str) -> str:
    """`text` with every address in it as `without_secrets` shows it: for what others have written, as in tracebacks."""
    text = _WEB_QUERY.sub(_without_query, text)
    return _ADDRESS.sub(_shown, _WEB_PASSWORD.sub(r"\1", text))


def _without_query(found: re.Match[str]) -> str:
    query = found[2].rstrip(_ENDS_A_PART + "'\"<>")
    return f"{found[1]}?…{found[2][len(query) :]}"


def _shown(found: re.Match[str]) -> str:
    address = found[0].rstrip(_ENDS_A_PART)  # of the sentence around it
    return without_secrets(address) + found[0][len(address) :]


def recorded_uri(uri: str) -> str:
    """`without_secrets(uri)`, with a digest of those parts of its query that say what is asked for: it stays the same
    when the address is signed anew, and tells `?id=1` from `?id=2`."""
    shown = without_secrets(uri)
    if not shown.endswith("?…"):
        return shown
    asked = [part for part in chain_links(uri)[-1].partition("?")[2].split("&") if not _SECRET_PARAMETER.match(part)]
    return shown + hashlib.sha256("&".join(asked).encode()).hexdigest()[:8] if asked else shown


def clean_etag(etag: str | None) -> str:
    """An ETag without its quotes and without the `W/` of a weak one; `""` for none."""
    if not etag:
        return ""
    return etag.removeprefix("W/").strip('"')


def _has_query(link: str) -> bool:
    """Whether a question mark in it begins a query, rather than being part of a name."""
    scheme, mark, rest = link.partition("://")
    return bool(mark) and "?" in rest and scheme.lower() not in ("file", "s3", "gs", "memory")


def _escape(found: re.Match[str]) -> str:
    return "".join(chr(_ESCAPE + byte) for byte in found[0].encode("utf-8", "surrogateescape"))


def _unescape(found: re.Match[str]) -> str:
    return bytes(ord(character) - _ESCAPE for character in found[0]).decode("ascii", "surrogateescape")
