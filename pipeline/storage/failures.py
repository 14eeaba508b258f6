"""What the errors of object store clients mean. Owns: telling missing, denied and worth another try apart,
and the sentence for each. Must not know: what was being done.
"""

from __future__ import annotations

import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from pipeline.errors import ExpiredCredentialsError, StorageError
from pipeline.storage.blob import failed, failure_text
from pipeline.storage.uris import without_secrets

_STATUS_CODE = re.compile(r"status code: (\d\d\d)")
_DENIED_TEXT = re.compile(
    r"<Code>(?:AccessDenied|ExpiredToken|TokenRefreshRequired|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken)</Code>"
    r"|http://169\.254\.169\.254/|Unable to locate credentials|CredentialRetrievalError|redentials failed"
)
# Of credentials that were good once. As boto3's errors say it, too, which have the code alone.
_EXPIRED_TEXT = re.compile(r"\b(?:ExpiredToken|TokenRefreshRequired)\b")

# Refusals (status 400) of what arrived, not of what was asked: a body that was damaged, cut off or too slow on its way.
_DAMAGED_TEXT = re.compile(r"XAmzContentSHA256Mismatch|BadDigest|IncompleteBody|RequestTimeout\b")
_RETRIES = re.compile(r"\bretries: (\d+),\s+max_retries: (\d+)")


def status_of(error: BaseException | None) -> int:
    """The HTTP status that obstore names in its text, or 0."""
    found = _STATUS_CODE.search(str(error))
    return int(found[1]) if found else 0


def is_refusal(error: BaseException | None) -> bool:
    """Whether the store understood the request and said no, so that asking again is no use."""
    final = 400 <= status_of(error) < 500 and status_of(error) not in (408, 429)
    return final and not _DAMAGED_TEXT.search(str(error))


def is_cut_off(error: BaseException | None) -> bool:
    """Whether a read broke in a way that obstore does not repeat by itself, such as in the middle of a body."""
    tried = _RETRIES.search(str(error))
    return not is_refusal(error) and not (tried and int(tried[1]) >= int(tried[2]))


def kind_of(error: BaseException) -> str:
    """`missing`, `denied` or `fetch_failed`."""
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "missing"
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError) or status in (
        401,
        403,
    ):
        return "denied"
    return "denied" if _DENIED_TEXT.search(str(error)) else "fetch_failed"


def is_expired(error: BaseException) -> bool:
    """Whether the store says that the credentials were good once."""
    return _EXPIRED_TEXT.search(str(error)) is not None


def may_be_expired(error: BaseException) -> bool:
    """Whether that may be it. To a HEAD the store answers with the status alone."""
    return is_expired(error) or (status_of(error) == 400 and "<Code>" not in str(error))


def failure(what: str, uri: str, error: BaseException) -> StorageError:
    """The StorageError for a client's `error`, with what to do about it."""
    kind = kind_of(error)
    why = failure_text(error)
    if is_expired(error):
        told = (
            f"could not {what} {without_secrets(uri)!r}: {why}; renew the credentials and give the same command again"
        )
        return ExpiredCredentialsError(told, kind="denied")
    if kind == "missing" and "NoSuch" not in why:
        why = "no such object"  # a HEAD has no body that would say more
    elif kind == "denied":
        why += "; check the credentials (environment, profile or role) and the bucket's policy"
    elif "incorrectly configured region" in why or "PermanentRedirect" in why:
        why += "; the bucket is in another region: set AWS_REGION"
    return failed(what, uri, why, kind=kind)
