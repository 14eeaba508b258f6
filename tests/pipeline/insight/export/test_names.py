"""Names of exported files, for URIs that were not made to be names."""

from __future__ import annotations

import unicodedata

from pipeline.insight.export.names import file_stem, image_suffix

AWKWARD = [
    "s3://bucket/../../etc/passwd", "s3://bucket/..", "s3://bucket/.hidden", "s3://bucket/a/", "s3://bucket/a",
    "s3://bucket/north/0001.jpg", "s3://bucket/south/0001.jpg", "s3://bucket/north/0001.png",
    "s3://bucket/NORTH/0001.jpg", 's3://bucket/"quoted\' $(rm -rf).jpg', "s3://bucket/line\nbreak\r.jpg",
    "s3://bucket/nul\x00.jpg", "s3://bucket/back\\slash.jpg", "s3://bucket/日本語.jpg", "s3://bucket/-rf.jpg",
    "s3://bucket/" + unicodedata.normalize("NFC", "é.jpg"), "s3://bucket/" + unicodedata.normalize("NFD", "é.jpg"),
    "s3://bucket/" + "x" * 255 + ".jpg", "s3://bucket/" + "x" * 255 + ".jpeg", "file:///odd/\uef80\uefff.jpg",
    "https://host/image?id=1", "https://host/image?id=2", "s3://bucket/CON.jpg", "s3://bucket/trailing. .jpg",
]  # fmt: skip


def test_names_are_safe_and_of_one_uri_each() -> None:
    stems = [file_stem(uri) for uri in AWKWARD]
    assert len({stem.lower() for stem in stems}) == len(AWKWARD), "two names that differ in case are one on some disks"
    for stem in stems:
        assert stem.isascii() and all(char.isalnum() or char in "-_" for char in stem)
        assert stem[0] not in "-." and 16 <= len(stem) <= 90


def test_names_stay_what_they_are() -> None:
    assert file_stem("s3://bucket/north/0001.jpg") == "0001-4f57d63d13f6154b"
    assert file_stem("s3://bucket/..").count("-") == 0


def test_suffixes_say_what_the_bytes_are() -> None:
    suffixes = [image_suffix(kind) for kind in ("JPEG", "MPO", "PNG", "TIFF", "JPEG2000", "../x", "", None)]
    assert suffixes == [".jpg", ".jpg", ".png", ".tif", ".jpeg2000", ".x", ".img", ".img"]
