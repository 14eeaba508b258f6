"""Bytes: the only user of obstore, fsspec and boto3. Owns: reading, listing to Arrow and create-only
writing, with retries and digest checks. Must not know: images, Parts, Runs, or anything else that the bytes
are for.

`uris` what a URI is; `blob` the values, the `Storage` protocol and the digest check; `disk` file://;
`bucket` s3:// and gs://, with `aws` for what only boto3 does, `failures` for what errors mean,
`bucket_listing` for listings and `bucket_files` for DuckDB; `remote` everything else through fsspec;
`parallel` the threads of a listing."""

from __future__ import annotations

from pipeline.storage.blob import LISTING_SCHEMA, Blob, ObjectInfo, Storage, default_timeout_s
from pipeline.storage.uris import (
    CREDENTIALS_ADVICE,
    CREDENTIALS_BEFORE_BUCKET,
    CREDENTIALS_BEFORE_HOST,
    chain_links,
    check_web_address,
    clean_etag,
    duckdb_path,
    file_uri,
    given_path,
    hide_secrets,
    holds_secret,
    is_chain,
    join_uri,
    local_path,
    normalize_uri,
    path_text,
    recorded_uri,
    sql_text,
    store_root,
    uri_name,
    uri_scheme,
    without_password,
    without_secrets,
)

__all__ = [
    "CREDENTIALS_ADVICE",
    "CREDENTIALS_BEFORE_BUCKET",
    "CREDENTIALS_BEFORE_HOST",
    "LISTING_SCHEMA",
    "Blob",
    "ObjectInfo",
    "Storage",
    "chain_links",
    "check_web_address",
    "clean_etag",
    "duckdb_path",
    "file_uri",
    "given_path",
    "hide_secrets",
    "holds_secret",
    "is_chain",
    "join_uri",
    "local_path",
    "normalize_uri",
    "open_storage",
    "path_text",
    "recorded_uri",
    "sql_text",
    "store_root",
    "uri_name",
    "uri_scheme",
    "without_password",
    "without_secrets",
]


def open_storage(uri: str, *, profile: str | None = None, timeout_s: float | None = None) -> Storage:
    """The store of `uri`, opened with `uri` as its root. Cheap: nothing is sent or checked until the first
    call.

    `profile` names an AWS profile (S3 only; other stores ignore it). `timeout_s` is how long a request may
    go without a byte; default `MASKMILL_STORAGE_TIMEOUT_S` or 60. Credentials come from the environment,
    the profile or an attached role, never from a parameter. Raises UsageError for a scheme that nothing
    installed serves, and for a profile that does not exist."""
    uri = normalize_uri(uri)
    scheme = uri_scheme(uri)
    if profile is not None:
        from pipeline.storage.aws import check_profile

        check_profile(profile)
    if scheme == "file":
        from pipeline.storage.disk import DiskStorage

        return DiskStorage(uri)
    if scheme in ("s3", "gs"):
        from pipeline.storage.bucket import BucketStorage

        return BucketStorage(uri, profile=profile, timeout_s=timeout_s or default_timeout_s())
    from pipeline.storage.remote import RemoteStorage

    return RemoteStorage(uri)
