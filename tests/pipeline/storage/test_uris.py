"""URIs: what names what, and what is kept secret."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.utils import infer_storage_options
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StorageError, UsageError
from pipeline.storage import (
    check_web_address,
    clean_etag,
    duckdb_path,
    file_uri,
    given_path,
    hide_secrets,
    holds_secret,
    join_uri,
    local_path,
    normalize_uri,
    open_storage,
    recorded_uri,
    store_root,
    uri_name,
    uri_scheme,
    without_secrets,
)


class _Hosted(AbstractFileSystem):  # type: ignore[misc]
    """Connects at once, to nobody."""

    def __init__(self, host: str, **options: Any) -> None:
        raise OSError(f"{host} refused the connection")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        return {key: value for key, value in infer_storage_options(path).items() if key in ("host", "port") and value}


class TestUris:
    def test_paths_become_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/someone")
        assert normalize_uri("./a b%20#") == f"file://{tmp_path}/a b%20#"
        assert normalize_uri("/x/../y/") == "file:///y"
        assert normalize_uri("~/x") == "file:///home/someone/x"
        assert normalize_uri("file:/x") == "file:///x"

    @pytest.mark.parametrize(
        "uri", ["s3://b/k%20 #?", "s3://b//k/", "file:///a b", "https://h/x?y=%2F", "abfs://c@a.b/x"]
    )
    def test_uris_stay(self, uri: str) -> None:
        assert normalize_uri(uri) == uri

    @pytest.mark.parametrize("text", ["", "file://relative/x"])
    def test_nonsense_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError):
            normalize_uri(text)

    @pytest.mark.parametrize(
        "uri", ["s3://KEY:SECRET@b/k", "S3://KEY:SECRET@b", "gs://SECRET@b/k", "s3://AKIAIOSFODNN7EXAMPLE:SEC/RET@b/k"]
    )
    def test_credentials_before_a_bucket_are_refused(self, uri: str) -> None:
        for refuses in (normalize_uri, open_storage):
            with pytest.raises(UsageError, match="a profile or by environment variables") as refused:
                refuses(uri)
            assert "SEC" not in str(refused.value)

    @pytest.mark.parametrize(
        "uri",
        [
            "http://me:ab/SECRET@h/2.png",
            "HTTPS://me:1b?SECRET@h",
            "https://me:a:b/SECRET@h/x",
            "https://me@example.com:pa/SECRET@h/x.jpg",
            "https://me:p/a@SECRET@h/x",
        ],
    )
    def test_a_password_with_a_slash_is_refused(self, uri: str) -> None:
        assert "SECRET" not in without_secrets(uri) + hide_secrets(f"could not read {uri!r}: why")
        for refuses in (normalize_uri, open_storage):
            with pytest.raises(UsageError, match="holds credentials") as refused:
                refuses(uri)
            assert "SECRET" not in str(refused.value)

    def test_an_at_sign_elsewhere_is_part_of_a_name(self) -> None:
        names = ("s3://b/a@b.jpg", "gs://b/K:S@c/d", "s3://b/a::b@c", "file:///me:x@h/a", "s3://tenant:b/a@c")
        web = ("http://h:80/a@b.png", "http://[::1]:80/a@b.png", "http://h/a:b@c.png", "github://o:r@main/a")
        for uri in (*names, *web):
            assert normalize_uri(uri) == without_secrets(uri) == recorded_uri(uri) == uri

    def test_a_chain_without_an_address_in_front_is_no_path(self) -> None:
        with pytest.raises(UsageError, match="chain") as refused:
            normalize_uri("simplecache::https://me:SECRET@h/x")
        assert "SECRET" not in str(refused.value)

    @pytest.mark.parametrize(
        "uri", ["zip://d/1.png::http://me:SECRET@h/x.zip", "zip://0.png::file:///x.zip", "tar://a::s3://b/k"]
    )
    def test_a_chain_is_one_store_which_is_not_opened(self, uri: str) -> None:
        assert store_root(uri) == uri
        with pytest.raises(UsageError, match="chain of stores, which cannot be opened") as refused:
            open_storage(uri)
        assert "SECRET" not in str(refused.value)

    @pytest.mark.parametrize(
        ("uri", "root"),
        [
            ("s3://b/zip::file://x/y", "s3://b/"), ("file:///a/zip::file://b", "file:///"), ("https://h/a::b/c", "https://h/"),
            ("memory://m/tar::s3://k", "memory://m/"), ("https://h/Foo::Bar::Baz.png", "https://h/"),
            ("S3://b/a::http://x/y", "S3://b/"), ("https://h/a::https://g/b", "https://h/"),
            ("az://c/a::b::c.jpg", "az://c/"), ("sftp://h/a::b::c.jpg", "sftp://h/"),
        ],
    )  # fmt: skip
    def test_names_that_look_like_a_chain_are_none(self, uri: str, root: str) -> None:
        assert store_root(uri) == root

    def test_parts(self) -> None:
        assert uri_scheme("S3://b/k") == "s3"
        assert uri_name("s3://b/a/c d.jpg") == "c d.jpg"
        assert uri_name("s3://b/a/") == "a"
        assert join_uri("s3://b/a/", "x", "y.jpg") == "s3://b/a/x/y.jpg"
        assert local_path("file:///a%20b") == duckdb_path("file:///a%20b") == "/a%20b"
        assert duckdb_path("s3://b/k") == "s3://b/k"
        assert duckdb_path("s3://b/a[1]*?") == "s3://b/a[[]1][*][?]"
        assert duckdb_path("https://host/k?version=1") == "https://host/k?version=1"
        with pytest.raises(UsageError):
            local_path("s3://b/k")
        with pytest.raises(UsageError):
            uri_scheme("/x")
        for refuses in (uri_scheme, local_path):
            with pytest.raises(UsageError) as refused:
                refuses("simplecache::https://me:SECRET@h/x")
            assert "SECRET" not in str(refused.value)

    @pytest.mark.parametrize(
        ("etag", "clean"),
        [('"abc"', "abc"), ('W/"abc"', "abc"), ("abc", "abc"), ("", ""), (None, ""), ('"a-2"', "a-2")],
    )
    def test_etags(self, etag: str | None, clean: str) -> None:
        assert clean_etag(etag) == clean

    @given(
        name=st.one_of(
            st.binary(min_size=1), st.text(min_size=1, alphabet="a\u00e9\uef7f\uef80\uefff\uf000").map(str.encode)
        )
    )
    def test_every_path_has_a_uri_that_leads_back_to_it(self, name: bytes) -> None:
        path = os.fsdecode(b"/" + name.replace(b"/", b"").replace(b"\0", b""))
        uri = file_uri(path)
        assert uri.encode().decode() == uri
        assert os.fsencode(local_path(uri)) == os.fsencode(path)
        assert normalize_uri(uri) == uri
        written = b"".join(
            bytes([ord(c) - 0xEF00]) if 0xEF80 <= ord(c) <= 0xEFFF else c.encode() for c in uri.removeprefix("file://")
        )
        assert written == os.fsencode(path)

    def test_escapes_are_as_documented(self) -> None:
        assert file_uri(os.fsdecode(b"/caf\xe9")) == "file:///caf\uefe9"
        assert file_uri("/\uef80") == "file:///\uefee\uefbe\uef80"
        assert normalize_uri(os.fsdecode(b"file:///caf\xe9")) == normalize_uri(os.fsdecode(b"/caf\xe9"))
        with pytest.raises(UsageError, match="not UTF-8"):
            duckdb_path("file:///caf\uefe9")

    @pytest.mark.parametrize(
        ("uri", "shown"),
        [
            ("https://user:pass@host/a.csv?X-Amz-Signature=1&b=2", "https://host/a.csv?…"),
            ("https://token@host/a.csv", "https://host/a.csv"),
            ("sftp://user:pass@host/a", "sftp://user@host/a"),
            ("abfs://container@account.dfs.core.windows.net/a b", "abfs://container@account.dfs.core.windows.net/a b"),
            ("s3://b/k?x=1@y", "s3://b/k?x=1@y"),
            ("file:///a?b@c", "file:///a?b@c"),
            ("s3://KEY:SECRET@b/k?x@y", "s3://b/k?x@y"),
            ("GS://token@b/k", "GS://b/k"),
            ("s3://AKIAIOSFODNN7EXAMPLE:SEC/RET@b/a@b.jpg", "s3://b/a@b.jpg"),
            ("s3://tenant:bucket/a@b.jpg", "s3://tenant:bucket/a@b.jpg"),
            ("az://container:SECRET@account/a@b.jpg", "az://container@account/a@b.jpg"),
            ("file://me:SECRET@host/a", "file://me@host/a"),
            ("zip://a@b.jpg::https://me:SECRET@h/x.zip?sig=SECRET", "zip://a@b.jpg::https://h/x.zip?…"),
            ("simplecache::zip://a?b::s3://KEY:SECRET@b/x.zip", "simplecache::zip://a?…::s3://b/x.zip"),
            ("https://h/a?u=1::https://me:SECRET@h", "https://h/a?…"),
            ("s3://b/a::b.jpg", "s3://b/a::b.jpg"),
            ("cached://http://me:SECRET@h/x", "cached://http://h/x"),
            ("https://archive/2020/https://me:SECRET@h/x?y", "https://archive/2020/https://h/x?…"),
            ("cached://https://me:p/SECRET@h/x", "cached://https://h/x"),
            ("cached://https://me:p@SECRET@h/x", "cached://https://h/x"),
            ("zip://a.jpg::https://me:p/SECRET@h/x.zip", "zip://a.jpg::https://h/x.zip"),
        ],
    )
    def test_secrets_are_not_shown(self, uri: str, shown: str) -> None:
        assert without_secrets(uri) == shown

    @pytest.mark.parametrize(
        ("uri", "secret"),
        [
            ("https://u:p@h/a", True), ("https://token@h/a", True), ("https://h/a?X-Amz-Signature=1", True),
            ("https://h/a?id=1&sv=2&sig=x", True), ("sftp://u:p@h/a", True), ("sftp://u@h/a", False),
            ("https://h/a?id=1", False), ("https://h/a@b", False), ("s3://b/k?token=1", False), ("/a?token=1", False),
            ("abfs://container@account.dfs.core.windows.net/a", False), ("nuclei-unet@champion", False),
            ("s3://K:S@b/k", True), ("gs://K@b", True), ("az://c:S@a/k", True), ("s3://b/K:S@b/k", False),
            ("zip://a@b::https://u:p@h/x.zip", True), ("simplecache::https://h/x?sig=1", True),
            ("zip://a@b::https://h/x.zip?id=1", False), ("s3://b/a::b@c", False),
        ],
    )  # fmt: skip
    def test_which_addresses_hold_a_secret(self, uri: str, secret: bool) -> None:
        assert holds_secret(uri) is secret

    def test_addresses_in_a_text_are_shown_without_their_secrets(self) -> None:
        text = "Error: url='https://u:p@h/a?sig=x', <ftp://u:p@h/b> and s3://b/k?x=1"
        assert hide_secrets(text) == "Error: url='https://h/a?…', <ftp://u@h/b> and s3://b/k?x=1"
        assert hide_secrets("403 https://h/x?a='b'&sig=SECRET") == "403 https://h/x?…"
        assert hide_secrets('url="http://h/it\'s.png?sig=SECRET"; so') == 'url="http://h/it\'s.png?…"; so'
        assert "SECRET" not in hide_secrets("could not read HTTPS://me:it's-SECRET@h/b")
        assert hide_secrets("see https://h/a?sig=x; or (https://u:p@h/b).") == "see https://h/a?…; or (https://h/b)."

    def test_an_address_that_is_signed_anew_is_recorded_alike(self) -> None:
        plain = "https://host/list.csv"
        aws = plain + "?X-Amz-Credential=AKIA%2F2026&X-Amz-Date={0}&X-Amz-Expires=60&X-Amz-Signature={0}"
        azure = plain + "?sv=2025&sr=b&sp=r&se={0}&sig={0}"
        for signed in (aws, azure, plain + "?AWSAccessKeyId=A&Expires={0}&Signature={0}", plain + "?token={0}"):
            assert recorded_uri(signed.format("one")) == recorded_uri(signed.format("two")) == plain + "?…"
        asked = [recorded_uri(f"{plain}?id={n}&X-Amz-Signature={secret}") for n in (1, 2) for secret in ("abc", "def")]
        assert asked[0] == asked[1] != asked[2] == asked[3]
        assert asked[0].startswith(plain + "?…") and "abc" not in asked[0]
        for uri in ("s3://b/k?token=1", "file:///a?token=1", plain):
            assert recorded_uri(uri) == uri

    @pytest.mark.parametrize(
        "uri", ["http:///", "https://", "http:///a.jpg", "http://h:99999/a", "http://[::1/a", "http://:80/a"]
    )
    def test_what_is_no_web_address(self, uri: str) -> None:
        with pytest.raises(UsageError):
            check_web_address(uri)
        with pytest.raises(UsageError):
            open_storage("https://host").get(uri.replace("http:", "https:"))

    def test_a_scheme_that_calls_itself_is_refused(self) -> None:
        with pytest.raises(UsageError, match="generic:// is no store"):
            open_storage("generic://a/b.png")

    def test_an_unknown_scheme_says_what_to_do(self) -> None:
        with pytest.raises(UsageError, match=r"'nosuch'.*install"):
            open_storage("nosuch://x/y")

    def test_a_scheme_that_needs_a_host_takes_it_from_the_uri(self) -> None:
        fsspec.register_implementation("hosted", _Hosted, clobber=True)
        with pytest.raises(
            StorageError, match=r"could not reach 'hosted://127\.0\.0\.1:1/a\.jpg': .*127\.0\.0\.1"
        ) as caught:
            open_storage("hosted://127.0.0.1:1/a.jpg")
        assert caught.value.kind == "fetch_failed"
        with pytest.raises(UsageError, match="does not say enough"):
            open_storage("hosted:///a.jpg")

    def test_ftp_says_what_to_use_instead(self) -> None:
        for scheme in ("ftp", "ftps"):
            with pytest.raises(UsageError, match=rf"^'{scheme}://me@host/a'.*sftp"):
                open_storage(f"{scheme}://me:word@host/a")


@pytest.mark.parametrize(
    ("said", "path"),
    [("a.png", "a.png"), ("../b:/c", "../b:/c"), ("/x y/#?%", "/x y/#?%"), ("file:///x/a b", "/x/a b")],
)
def test_a_file_on_this_machine_is_named_by_its_path_or_its_uri(said: str, path: str) -> None:
    assert given_path(said) == path


@pytest.mark.parametrize("said", ["", "s3://bucket/secret.png", "https://me:word@host/x", "file:///a/s3://secret/x"])
def test_no_other_address_is_taken_for_a_path(said: str) -> None:
    with pytest.raises(UsageError, match="give a file on this machine") as caught:
        given_path(said)
    assert "secret" not in str(caught.value) and "word" not in str(caught.value)
