import pytest
import pipeline.storage.bucket as B
from pipeline.storage import open_storage


@pytest.mark.s3
def test_x(s3_bucket, fault_proxy, monkeypatch):
    import duckdb, pyarrow as pa, pyarrow.parquet as pq

    monkeypatch.setattr(B, "_RETRIES_PER_REQUEST", 1)
    b = open_storage(s3_bucket)
    s = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), s)
    b.put(s3_bucket + "/a.parquet", s.getvalue().to_pybytes())
    c = duckdb.connect()
    c.register_filesystem(b.filesystem())
    fault_proxy.inject("unavailable")
    try:
        c.execute(f"select * from read_parquet('{s3_bucket}/a.parquet')")
    except Exception as e:
        print(type(e), type(e).__mro__, str(e)[:1500])
        print("CAUSE", repr(e.__cause__), repr(e.__context__))
