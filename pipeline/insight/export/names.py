"""What files of an export are called. Owns: names that are safe in every store and on every disk, from URIs that may
hold anything. Must not know: formats, where files go.
"""

from __future__ import annotations

import hashlib
import re

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_STEM_CHARACTERS = 64
_DIGEST_DIGITS = 16
_SUFFIXES = {
    "JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif",
}  # fmt: skip


def file_stem(uri: str) -> str:
    """A name without suffix for the image at `uri`: what is plain ASCII of its own name, at most 64 characters, and 16
    hexadecimal digits of the SHA-256 of the URI.

    The same for the same URI in every export; different for different URIs, whatever their names (that two of ten
    million share it has a chance of 1 in 370,000). Never begins with a dot, holds no separator.
    """
    own = uri.rstrip("/").rpartition("/")[2]
    own = own.rpartition(".")[0] or own
    readable = _UNSAFE.sub("_", own).strip("_-")[:_STEM_CHARACTERS]
    digest = hashlib.sha256(uri.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_DIGITS]
    return f"{readable}-{digest}" if readable else digest


def image_suffix(image_format: str | None) -> str:
    """The suffix for an image of this format, as `image_format` in the table names it: what its bytes are, whatever
    its own name says. `.img` where that is not known."""
    if not image_format:
        return ".img"
    return _SUFFIXES.get(image_format.upper()) or "." + (_UNSAFE.sub("", image_format).lower() or "img")
