"""Which failures are worth another try."""

from __future__ import annotations

import pytest

from pipeline.storage.failures import is_refusal


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("status code: 400 Bad Request <Code>XAmzContentSHA256Mismatch</Code>", False),
        ("status code: 400 Bad Request <Code>BadDigest</Code>", False),
        ("status code: 400 Bad Request <Code>InvalidArgument</Code>", True),
        ("status code: 429", False),
        ("status code: 503", False),
        ("connection reset", False),
    ],
)
def test_what_is_worth_another_try(text: str, refused: bool) -> None:
    assert is_refusal(OSError(text)) is refused
