"""Signed web addresses: what says which image it is, and what only lets one read it for a while. Owns: telling the two
apart.
Must not know: how either is kept, who reads images.

    https://b.s3.amazonaws.com/a.jpg?versionId=7&X-Amz-Expires=600&X-Amz-Signature=…    the address
    https://b.s3.amazonaws.com/a.jpg?versionId=7                                        the image: its identity

Known are the signatures of AWS (version 4 and 2, CloudFront), Google Cloud Storage, Azure (SAS) and Alibaba OSS, and
passwords before the host, in each address of a chain. Any other parameter may say which image is meant, and stays.
Sources: AWS SigV4 query parameters and CloudFront signed URLs (developer guides), Google's signed URLs V4 and V2,
Azure's "Create a service SAS" and "Create a user delegation SAS".
"""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage import LISTING_SCHEMA, chain_links, without_password

#: What a worker needs besides the frozen list: the address to read `uri` by. Never written to DEST.
ADDRESSES = pa.schema([("uri", pa.string()), ("address", pa.string())])

_KNOWN_STORES = ("file", "s3", "gs", "memory")
# A quick look at many: what could be a password, or a parameter that could be a signature.
_PERHAPS = r"(?i)://(?:.*@|[^?]*\?(?:.*&)?(?:x-(?:amz|goog|oss)-signature|signature|sig)=)"
#: (what proves the kind of signature, all parameters that belong to it), of parameters' names in lower case.
_KINDS = [
    (("x-amz-signature",), r"x-amz-.*"),
    (("x-goog-signature",), r"x-goog-.*"),
    (("x-oss-signature",), r"x-oss-(?!process).*"),
    (("signature", "awsaccesskeyid"), r"signature|awsaccesskeyid|expires|x-amz-security-token"),
    (("signature", "googleaccessid"), r"signature|googleaccessid|expires"),
    (("signature", "ossaccesskeyid"), r"signature|ossaccesskeyid|expires|security-token"),
    (("signature", "key-pair-id"), r"signature|key-pair-id|expires|policy|hash-algorithm"),
    (("sig", "sv"), r"sig|sv|st|se|sp|sr|spr|sip|ss|srt|si|ses|sdd|skoid|sktid|skt|ske|sks|skv|saoid|suoid|scid"),
]


def identity(address: str) -> str:
    """`address` without what only lets one read it: the same however often it is signed anew."""
    scheme, mark, _ = address.partition("://")
    if not mark or scheme.lower() in _KNOWN_STORES:
        return address
    return "::".join(map(_identity, chain_links(address)))


def _identity(link: str) -> str:
    bare = without_password(link)
    place, mark, query = bare.partition("?")
    parts = query.split("&") if mark else []
    names = [part.partition("=")[0].lower() for part in parts]
    for proof, belonging in _KINDS:
        if all(name in names for name in proof):
            kept = [not re.fullmatch(belonging, name) for name in names]
            parts = [part for part, keep in zip(parts, kept, strict=True) if keep]
            names = [name for name, keep in zip(names, kept, strict=True) if keep]
    return f"{place}{'?' if parts else ''}{'&'.join(parts)}"


def split_signatures(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
    """(`batch`, of LISTING_SCHEMA, with the identity of each image for its URI; of those for which that makes a
    difference, batch of ADDRESSES, or None)."""
    uris = batch.column("uri")
    # In most corpora all names are of a store that signs none, which comparing tells for a tenth of a regex.
    if pc.all(pc.or_(pc.starts_with(uris, "s3://"), pc.starts_with(uris, "file://"))).as_py():
        return batch, None
    perhaps = pc.match_substring_regex(uris, _PERHAPS)
    if not pc.any(perhaps).as_py():
        return batch, None
    addresses = pc.filter(uris, perhaps)
    images = pa.array([identity(address) for address in addresses.to_pylist()], pa.string())
    replaced = pc.replace_with_mask(uris, perhaps, images)
    rows = pa.RecordBatch.from_arrays([replaced, *batch.columns[1:]], schema=LISTING_SCHEMA)
    signed = pa.RecordBatch.from_arrays([images, addresses], schema=ADDRESSES)
    signed = signed.filter(pc.not_equal(images, addresses))
    return rows, signed if signed.num_rows else None
