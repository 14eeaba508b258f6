"""Clients of S3: CPU that one object costs, and what DuckDB does to a bucket through each of them, faults included.

    python benchmarks/s3_client.py [--objects N] [--size-bytes B] [--trials T]

The store is moto's, in a process of its own on this machine, which is slow: so the first table counts the CPU time of
the client's process alone, for GETs of 30 kB, 16 at once. The second table is one query over 8 small Parts, written as
a run writes them (so the store has no checksum of them but the ETag): how many requests, how long with a tenth of them
answered by 503, and what a single flipped bit in a Part does, T times each.
Peers that are not installed are skipped: `pip install s3fs`. Needs the test dependencies (moto).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import duckdb
from rich.console import Console
from rich.table import Table

from pipeline.storage import open_storage
from pipeline.table.catalog import open_duckdb, part_sizes, read_parts_sql

AT_ONCE = 16
PARTS = 8
#: Columns of every kind, so that most bytes of a Part are read.
QUERY = "SELECT count(*), sum(hash(image_uri, image_etag, mask, classes, run_id, mean_confidence)) FROM "


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def moto() -> Iterator[int]:
    """The port of a moto server, with the environment of every S3 client led to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **quiet)  # type: ignore[call-overload]
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=2).close()
                break
            except OSError:
                time.sleep(0.1)
        lead_to(port)
        yield port
    finally:
        server.kill()
        server.wait()


def lead_to(port: int) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


# ── CPU per object ───────────────────────────────────────────────────────────────────────────────────────────────────


def ours() -> Callable[[str], bytes]:
    storage = open_storage("s3://photos")
    return lambda key: storage.get(f"s3://photos/{key}").data


def obstore_alone() -> Callable[[str], bytes]:
    from obstore.store import S3Store

    store = S3Store("photos", endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    return lambda key: bytes(store.get(key).bytes())


def pyarrow_fs() -> Callable[[str], bytes]:
    from pyarrow import fs

    files = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], scheme="http", region="us-east-1")

    def get(key: str) -> bytes:
        with files.open_input_stream(f"photos/{key}") as stream:
            return bytes(stream.read())

    return get


def boto3_client() -> Callable[[str], bytes]:
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(max_pool_connections=AT_ONCE))
    return lambda key: bytes(client.get_object(Bucket="photos", Key=key)["Body"].read())


def s3fs_files() -> Callable[[str], bytes]:
    import s3fs

    files = s3fs.S3FileSystem()
    return lambda key: bytes(files.cat_file(f"photos/{key}"))


CLIENTS: dict[str, tuple[str, Callable[[], Callable[[str], bytes]]]] = {
    "obstore, as we use it: checked": ("obstore", ours),
    "obstore": ("obstore", obstore_alone),
    "pyarrow.fs": ("pyarrow", pyarrow_fs),
    "boto3": ("boto3", boto3_client),
    "s3fs": ("s3fs", s3fs_files),
}


def cpu_ms_per_object(name: str, objects: int, size_bytes: int) -> tuple[float, float]:
    """(CPU, elapsed) ms. Runs in a process of its own."""
    get = CLIENTS[name][1]()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(get, [f"{i}" for i in range(AT_ONCE * 2)]))  # connections, imports
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for data in pool.map(get, [f"{i}" for i in range(objects)]):
            assert len(data) == size_bytes
        cpu_s, seconds = time.process_time() - began_cpu_s, time.perf_counter() - began_s
    return cpu_s / objects * 1e3, seconds / objects * 1e3


# ── DuckDB ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def through_ours() -> tuple[Any, str]:
    storage = open_storage("s3://table")
    sizes = part_sizes(storage, "s3://table/segments")
    return open_duckdb(storage, sizes=sizes), read_parts_sql(list(sizes))


def through_s3fs(parts: str) -> tuple[Any, str]:
    import s3fs

    connection = duckdb.connect()
    connection.register_filesystem(s3fs.S3FileSystem(skip_instance_cache=True))
    return connection, parts


def through_obstore(parts: str) -> tuple[Any, str]:
    from obstore.fsspec import FsspecStore

    connection = duckdb.connect()
    connection.register_filesystem(FsspecStore("s3", client_options={"allow_http": True}, skip_instance_cache=True))
    return connection, parts


GLOB = "read_parquet('s3://table/segments/**/*.parquet')"
NAMES = "read_parquet([{}])".format(
    ", ".join(f"'s3://table/segments/20260102T030405Z-abcdef-{n:06d}.parquet'" for n in range(PARTS))
)
WAYS: dict[str, tuple[str, Callable[[], tuple[Any, str]]]] = {
    "our file system over obstore": ("obstore", through_ours),
    "s3fs, Parts by name": ("s3fs", lambda: through_s3fs(NAMES)),
    "s3fs, Parts by **": ("s3fs", lambda: through_s3fs(GLOB)),
    "obstore.fsspec, Parts by name": ("obstore", lambda: through_obstore(NAMES)),
    "obstore.fsspec, Parts by **": ("obstore", lambda: through_obstore(GLOB)),
}


def ask(way: Callable[[], tuple[Any, str]]) -> Any:
    """The answer, or the name of the error."""
    try:
        connection, parts = way()
        return connection.execute(QUERY + parts).fetchone()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a row of the table
        return type(error).__name__


def struck(way: Callable[[], tuple[Any, str]], truth: Any, trials: int, strike: Callable[[int], None]) -> str:
    """What becomes of the query, and its seconds at worst, in `trials` trials with the faults that `strike` sets up."""
    outcomes: Counter[str] = Counter()
    worst_s = 0.0
    for trial in range(trials):
        strike(trial)
        began_s = time.perf_counter()
        answer = ask(way)
        worst_s = max(worst_s, time.perf_counter() - began_s)
        outcomes[f"{answer}" if isinstance(answer, str) else "right" if answer == truth else "WRONG"] += 1
    return f"{', '.join(f'{count} {name}' for name, count in outcomes.most_common())}; {worst_s:.1f} s"


def write_parts() -> None:
    """8 Parts of a few rows, as a run writes them."""
    from handmade import make_part, make_row, picture

    storage = open_storage("s3://table")
    for n in range(PARTS):
        rows = []
        for i in range(16):
            mask = picture(16 * n + i).tobytes()[:1000]
            rows.append(make_row(f"s3://photos/{n}-{i}.jpg", f"e{i}", mask={"bytes": mask, "path": None}))
        assert storage.put_new(f"s3://table/segments/20260102T030405Z-abcdef-{n:06d}.parquet", make_part(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--size-bytes", type=int, default=30_000)
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import boto3
    from chaos.faultproxy import FaultProxy

    missing = {package for package, _ in [*CLIENTS.values(), *WAYS.values()] if not importlib.util.find_spec(package)}
    console = Console(width=140)
    with moto() as port:
        client = boto3.client("s3")
        client.create_bucket(Bucket="photos")
        for i in range(options.objects):
            client.put_object(Bucket="photos", Key=f"{i}", Body=os.urandom(options.size_bytes))
        table = Table(title=f"GET of {options.size_bytes:,} bytes, load {os.getloadavg()[0]:.1f}")
        for column in ("client", "CPU ms an object", "objects/s (moto's limit)"):
            table.add_column(column, justify="left" if column == "client" else "right")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            for name, (package, _) in CLIENTS.items():
                if package not in missing:
                    cpu_ms, ms = pool.submit(cpu_ms_per_object, name, options.objects, options.size_bytes).result()
                    table.add_row(name, f"{cpu_ms:.2f}", f"{1e3 / ms:,.0f}")
        console.print(table)

        client.create_bucket(Bucket="table")
        write_parts()
        table = Table(title=f"DuckDB, one query over {PARTS} Parts; {options.trials} trials, the slowest")
        for column in ("through", "HEAD", "GET", "answer", "503 to a tenth", "one flipped bit"):
            table.add_column(column, justify="right" if column in ("HEAD", "GET") else "left")
        with FaultProxy(port) as proxy:
            lead_to(proxy.port)
            truth = ask(through_ours)

            def unavailable(trial: int) -> None:
                proxy.clear()
                proxy.inject("unavailable", probability=0.1)

            def flip(trial: int) -> None:
                proxy.clear()
                proxy.inject("flip", match=rf"GET .*{trial % PARTS:06d}\.parquet", limit=1)

            for name, (package, way) in WAYS.items():
                if package in missing:
                    continue
                proxy.clear()
                answer = ask(way)
                sent = Counter(request.split()[0] for request in proxy.requests)
                row = [name, str(sent["HEAD"]), str(sent["GET"]), "right" if answer == truth else str(answer)]
                if answer == truth:
                    row += [struck(way, truth, options.trials, strike) for strike in (unavailable, flip)]
                table.add_row(*row)
        if missing:
            table.caption = f"not installed, and so left out: {', '.join(sorted(missing))}"
        console.print(table)


if __name__ == "__main__":
    main()
