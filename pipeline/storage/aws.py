"""What only AWS's own library does. Owns: finding credentials, endpoint and region the way every AWS tool
does, and keys that obstore cannot name. Must not know: obstore's clients, retries of whole operations.

boto3's errors leave this module as OSError: FileNotFoundError, PermissionError, or OSError with the store's
code in its text."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.errors import StorageError, UsageError
from pipeline.storage.blob import Blob, ObjectInfo, listing_batch
from pipeline.storage.uris import clean_etag

_MISSING_CODES = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_DENIED_CODES = {
    "401",
    "403",
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
}
_CREDENTIALS_TTL = timedelta(minutes=5)  # botocore renews at least 10 minutes before the end


@contextmanager
def _errors_as_os_errors(name: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _MISSING_CODES:
            raise FileNotFoundError(f"{name}: {code}") from error
        if code in _DENIED_CODES:
            raise PermissionError(f"{name}: {code}") from error
        raise OSError(f"{name}: {error}") from error
    except NoCredentialsError as error:
        raise PermissionError(f"{name}: no credentials found") from error
    except BotoCoreError as error:
        raise OSError(f"{name}: {error}") from error


class AwsAccess:
    """S3 as boto3 sees it. Thread safe; cheap until used; never pickled."""

    def __init__(self, *, profile: str | None, timeout_s: float) -> None:
        self._profile = profile
        self._timeout_s = timeout_s
        self._lock = threading.RLock()

    # -- configuration

    @property
    def _from_environment(self) -> bool:
        """Whether plain environment variables say all, so that obstore can read them itself."""
        names = os.environ
        has_endpoint = "AWS_ENDPOINT_URL" in names or "AWS_ENDPOINT_URL_S3" in names
        config = os.path.expanduser(names.get("AWS_CONFIG_FILE", "~/.aws/config"))
        return (
            self._profile is None
            and bool(names.get("AWS_ACCESS_KEY_ID") and names.get("AWS_SECRET_ACCESS_KEY"))
            and (has_endpoint or not os.path.exists(config))
            and bool(has_endpoint or names.get("AWS_REGION") or names.get("AWS_DEFAULT_REGION"))
        )

    @cached_property
    def _session(self) -> Any:
        import boto3

        check_profile(self._profile or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE"))
        return boto3.Session(profile_name=self._profile)

    @property
    def _client(self) -> Any:
        with self._lock:
            return self._cached_client

    @cached_property
    def _cached_client(self) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        options: dict[str, Any] = {
            "connect_timeout": 5,
            "read_timeout": self._timeout_s,
            "retries": {"max_attempts": 8, "mode": "standard"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        if _anonymous():
            options["signature_version"] = UNSIGNED
        client = self._session.client("s3", config=Config(**options))
        if not _is_amazon(client.meta.endpoint_url):
            # obstore addresses such stores by path, and so must this.
            options["s3"] = {"addressing_style": "path"}
            client = self._session.client("s3", config=Config(**options))
        return client

    def store_arguments(self, bucket: str) -> dict[str, Any]:
        """Keyword arguments for `obstore.store.S3Store`, with `allow_http` for its client.

        Raises StorageError(kind="denied") where no credentials are found. `AWS_SKIP_SIGNATURE=true` asks
        for none."""
        if self._from_environment:
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            return {"allow_http": endpoint.startswith("http://")}
        from obstore.auth.boto3 import Boto3CredentialProvider

        with self._lock:
            endpoint = self._client.meta.endpoint_url
            arguments: dict[str, Any] = {"allow_http": endpoint.startswith("http://")}
            if _anonymous():
                arguments["skip_signature"] = True
            elif self._session.get_credentials() is None:
                raise StorageError(
                    f"no credentials for s3://{bucket}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                    "name a profile, or run where a role is attached; AWS_SKIP_SIGNATURE=true for none",
                    kind="denied",
                )
            else:
                arguments["credential_provider"] = Boto3CredentialProvider(self._session, ttl=_CREDENTIALS_TTL)
            if _is_amazon(endpoint):
                arguments["region"] = self._region_of(bucket)
            else:
                arguments["endpoint"] = endpoint
                arguments["region"] = self._client.meta.region_name or "us-east-1"
            return arguments

    def _region_of(self, bucket: str) -> str:
        """The bucket's own region, which S3 tells even to those kept out; else the configured one."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self._client.head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = error.response
        except BotoCoreError:
            answer = {}
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return headers.get("x-amz-bucket-region") or self._client.meta.region_name or "us-east-1"

    # -- keys that obstore cannot name

    def get(self, bucket: str, key: str) -> Blob:
        with _errors_as_os_errors(f"s3://{bucket}/{key}"):
            answer = self._client.get_object(Bucket=bucket, Key=key)
            data = answer["Body"].read()
        return Blob(data, clean_etag(answer["ETag"]), answer["ContentLength"], answer["LastModified"])

    def head(self, bucket: str, key: str) -> ObjectInfo:
        with _errors_as_os_errors(f"s3://{bucket}/{key}"):
            answer = self._client.head_object(Bucket=bucket, Key=key)
        return ObjectInfo(clean_etag(answer["ETag"]), answer["ContentLength"], answer["LastModified"])

    def put(self, bucket: str, key: str, data: bytes | memoryview, *, new: bool) -> None:
        with _errors_as_os_errors(f"s3://{bucket}/{key}"):
            self._client.put_object(Bucket=bucket, Key=key, Body=bytes(data), **({"IfNoneMatch": "*"} if new else {}))

    def delete(self, bucket: str, key: str) -> None:
        with _errors_as_os_errors(f"s3://{bucket}/{key}"):
            self._client.delete_object(Bucket=bucket, Key=key)

    # -- listing

    def list(self, bucket: str, prefix: str, *, start_after: str = "") -> Iterator[pa.RecordBatch]:
        """Pages of the keys under `prefix` after `start_after`, as LISTING_SCHEMA. Folder markers are left
        out.
        """
        after = {"StartAfter": start_after} if start_after else {}
        with _errors_as_os_errors(f"s3://{bucket}/{prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **after):
                batch = _page_batch(bucket, page)
                if batch.num_rows:
                    yield batch


def check_profile(profile: str | None) -> None:
    """Raises UsageError, with the names that there are, where AWS's configuration files have no such profile. None is
    fine."""
    if profile is None:
        return
    from botocore.session import Session

    known = Session(profile=None).available_profiles
    if profile not in known:
        names = ", ".join(sorted(known)) or "none at all"
        raise UsageError(f"there is no AWS profile {profile!r}; the configuration files name {names}")


def _anonymous() -> bool:
    return os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes")


def _is_amazon(endpoint: str) -> bool:
    return re.match(r"https?://([^/]*\.)?amazonaws\.com(\.cn)?(:\d+)?/?$", endpoint) is not None


def _page_batch(bucket: str, page: dict[str, Any]) -> pa.RecordBatch:
    entries = [entry for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
    return listing_batch(
        [f"s3://{bucket}/{entry['Key']}" for entry in entries],
        [clean_etag(entry.get("ETag")) for entry in entries],
        [entry["Size"] for entry in entries],
        [round(entry["LastModified"].timestamp() * 1_000_000) for entry in entries],
    )
