"""An S3 store that reads from memory and answers every request so many milliseconds later: what S3 looks like from a
machine in its region. Read only, path style, anybody may read.

    python slow_store.py PORT FOLDER LATENCY_S      serves the files of FOLDER as s3://photos/all/NAME

A real server (moto, Ceph's gateway) would take most of two cores from whoever is measured; this one takes 0.2 core-ms a
request.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import sys
import time
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

BUCKET, PREFIX = "photos", "all"
_PAGE = 1000


class SlowStore:
    """The handlers. Objects are what was in the folder at the start."""

    def __init__(self, folder: Path, latency_s: float) -> None:
        self._latency_s = latency_s
        self._objects: dict[str, tuple[bytes, str]] = {}
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            self._objects[f"{PREFIX}/{path.name}"] = (data, hashlib.md5(data).hexdigest())
        self._modified = time.time()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """GET and HEAD of an object or of the bucket, and a listing of it."""
        await asyncio.sleep(self._latency_s)
        bucket, _, key = request.path.lstrip("/").partition("/")
        if bucket != BUCKET:
            return self._missing("NoSuchBucket")
        if not key:
            return self._list(request) if request.method == "GET" else web.Response()
        if key not in self._objects:
            return self._missing("NoSuchKey")
        data, etag = self._objects[key]
        headers = {
            "ETag": f'"{etag}"',
            "Last-Modified": email.utils.formatdate(self._modified, usegmt=True),
            "Accept-Ranges": "bytes",
            "Content-Type": "image/jpeg",
        }
        wanted = request.http_range
        if request.method == "HEAD":
            return web.Response(headers=headers | {"Content-Length": str(len(data))})
        if wanted.start is None and wanted.stop is None:
            return web.Response(body=data, headers=headers)
        part = data[wanted]
        start = wanted.indices(len(data))[0]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return web.Response(status=206, body=part, headers=headers)

    def _list(self, request: web.Request) -> web.Response:
        prefix, query = request.query.get("prefix", ""), request.query
        after = query.get("continuation-token") or query.get("start-after", "")
        keys = [key for key in self._objects if key.startswith(prefix) and key > after]
        page = keys[:_PAGE]
        modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self._modified))
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified>"
            f'<ETag>"{self._objects[key][1]}"</ETag><Size>{len(self._objects[key][0])}</Size>'
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in page
        )
        more = len(keys) > len(page)
        following = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<MaxKeys>{_PAGE}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{following}{entries}"
            "</ListBucketResult>"
        )
        return web.Response(text=body, content_type="application/xml")

    def _missing(self, code: str) -> web.Response:
        return web.Response(status=404, text=f"<Error><Code>{code}</Code></Error>", content_type="application/xml")


def main(port: int, folder: Path, latency_s: float) -> None:
    store = SlowStore(folder, latency_s)
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", store.answer)
    web.run_app(application, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
