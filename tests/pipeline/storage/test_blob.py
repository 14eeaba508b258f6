"""Digests of what was read, and what failures may say."""

from __future__ import annotations

import hashlib

import pytest

from pipeline.storage.blob import DigestCheck, failure_text


class TestDigestCheck:
    DATA = b"data"
    ETAG = hashlib.md5(DATA).hexdigest()
    OTHER = "0" * 32

    def test_a_match(self) -> None:
        assert DigestCheck().start().accepts(self.DATA, self.ETAG)

    @pytest.mark.parametrize("etag", ["", "abc", "0" * 32 + "-2", "3-1234567890123456789", ("0" * 31 + "G")])
    def test_other_etags_say_nothing(self, etag: str) -> None:
        assert DigestCheck().start().accepts(self.DATA, etag)

    def test_two_equal_fetches_are_accepted(self) -> None:
        attempts = DigestCheck().start()
        assert not attempts.accepts(b"damaged", self.OTHER)
        assert not attempts.accepts(self.DATA, self.OTHER)
        assert attempts.accepts(self.DATA, self.OTHER)

    def test_an_object_replaced_between_fetches_is_not_accepted_for_being_equal(self) -> None:
        attempts = DigestCheck().start()
        assert not attempts.accepts(self.DATA, "1" * 32)
        assert not attempts.accepts(self.DATA, self.OTHER)

    def test_after_several_in_a_row_it_is_off(self) -> None:
        check = DigestCheck()
        for _ in range(3):
            attempts = check.start()
            assert not attempts.accepts(self.DATA, self.OTHER)
            assert attempts.accepts(self.DATA, self.OTHER)
        assert not check.enabled
        assert check.start().accepts(self.DATA, self.OTHER)

    def test_a_match_in_between_keeps_it_on(self) -> None:
        check = DigestCheck()
        for _ in range(5):
            attempts = check.start()
            assert not attempts.accepts(self.DATA, self.OTHER)
            assert attempts.accepts(self.DATA, self.OTHER)
            assert check.start().accepts(self.DATA, self.ETAG)
        assert check.enabled


def test_failure_text_hides_what_may_be_secret() -> None:
    error = ValueError(
        "Error performing GET https://user:pass@host/key?X-Token=secret&y=1 in 3 ms\n\nDebug source: secret"
    )
    assert failure_text(error) == "Error performing GET https://host/key?… in 3 ms"
    for address in ("gopher://me:SECRET@x/?X-Amz-Signature=SECRET", "HTTP://me:SECRET@x/", "sftp://me:SEC@RET@x/a"):
        assert "SEC" not in failure_text(ValueError(address)) and "RET" not in failure_text(ValueError(address))
