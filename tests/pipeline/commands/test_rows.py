"""What the values of a query look like in each format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import duckdb
import pytest

from pipeline.commands.rows import print_rows, write_rows

#: Dates that DuckDB has, and Python and Arrow cannot write; and what DuckDB writes.
ODD_DATES = {
    "'infinity'::DATE": "infinity",
    "'-infinity'::DATE": "-infinity",
    "DATE '9999-12-31' + 1": "10000-01-01",
    "DATE '0044-03-15 (BC)'": "0044-03-15 (BC)",
    "'infinity'::TIMESTAMP": "infinity",
    "'-infinity'::TIMESTAMPTZ": "-infinity",
    "'infinity'::TIMESTAMP_S": "infinity",
    "'infinity'::TIMESTAMP_MS": "infinity",
    "'infinity'::TIMESTAMP_NS": "infinity",
    "TIMESTAMP '20000-01-02 03:04:05'": "20000-01-02 03:04:05",
}
NESTED = {
    "{{'size': 1, 'a \"b\"': {0}}}": '{{"size": 1, "a \\"b\\"": "{0}"}}',
    "[{0}, NULL]": '["{0}", null]',
    "[{0}, NULL]::{1}[2]": '["{0}", null]',
    "MAP{{{0}: [{0}]}}": '[["{0}", ["{0}"]]]',
    "[{{'d': [{0}]}}]": '[{{"d": ["{0}"]}}]',
}

Written = Callable[[str, str], str]


@pytest.fixture
def written(capfd: pytest.CaptureFixture[str]) -> Written:
    """`written(sql, format)`: what is printed."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")

    def ask(sql: str, output: str) -> str:
        capfd.readouterr()
        relation: Any = connection.sql(sql)
        if output == "table":
            print_rows(relation)
        else:
            write_rows(relation, output)
        return capfd.readouterr().out

    return ask


@pytest.mark.parametrize(("date", "text"), ODD_DATES.items())
def test_dates_beyond_python_are_as_duckdb_writes_them(date: str, text: str, written: Written) -> None:
    sql = f"SELECT 1 AS a, d, d AS d FROM (VALUES ({date}), (NULL)) AS _(d)"
    assert json.loads(written(sql, "json")) == [{"a": 1, "d": text, "d_1": text}, {"a": 1, "d": None, "d_1": None}]
    assert list(csv.reader(io.StringIO(written(sql, "csv")))) == [["a", "d", "d"], ["1", text, text], ["1", "", ""]]
    assert f"\n1  {text}  {text}  \n" in written(sql, "table")


@pytest.mark.parametrize("date", ["'infinity'::DATE", "DATE '9999-12-31' + 1", "'-infinity'::TIMESTAMPTZ"])
@pytest.mark.parametrize(("sql", "expected"), NESTED.items())
def test_so_are_those_in_lists_structs_and_maps(date: str, sql: str, expected: str, written: Written) -> None:
    kind = "TIMESTAMPTZ" if "TIMESTAMPTZ" in date else "DATE"
    query, value = f"SELECT {sql.format(date, kind)} AS x", json.loads(expected.format(ODD_DATES[date]))
    assert json.loads(written(query, "json")) == [{"x": value}]
    ((_,), (cell,)) = csv.reader(io.StringIO(written(query, "csv")))
    assert json.loads(cell) == value
    shown = written(query, "table")
    assert ODD_DATES[date] in shown and "datetime" not in shown


def test_so_are_those_in_rows_without_names_and_unions(written: Written) -> None:
    assert json.loads(written("SELECT row('infinity'::DATE, 1) AS x", "json")) == [{"x": "(infinity, 1)"}]
    assert json.loads(written("SELECT union_value(d := 'infinity'::DATE) AS x", "json")) == [{"x": "infinity"}]


def test_other_dates_stay_as_they_were(written: Written) -> None:
    sql = "SELECT DATE '2026-01-02' a, TIMESTAMP '2026-01-02 03:04:05' b, TIMESTAMPTZ '2026-01-02 03:04:05.06+00' c"
    assert json.loads(written(sql, "json")) == [
        {"a": "2026-01-02", "b": "2026-01-02 03:04:05", "c": "2026-01-02 03:04:05.060000+00:00"}
    ]
    assert written(sql, "csv").splitlines() == [
        '"a","b","c"', "2026-01-02,2026-01-02 03:04:05.000000,2026-01-02 03:04:05.060000Z",
    ]  # fmt: skip
    mixed = f"{sql} UNION ALL SELECT DATE '0001-01-01', TIMESTAMP '9999-12-31 23:59:59.999999', TIMESTAMPTZ 'infinity'"
    assert [list(row.values()) for row in json.loads(written(mixed, "json"))] == [
        ["2026-01-02", "2026-01-02 03:04:05", "2026-01-02 03:04:05.060000+00:00"],
        ["0001-01-01", "9999-12-31 23:59:59.999999", "infinity"],
    ]


@pytest.mark.parametrize("statement", ["DESCRIBE SELECT DATE '2026-01-02' a", "SHOW TABLES", "EXPLAIN SELECT 1"])
def test_statements_that_are_no_queries_are_shown(statement: str, written: Written) -> None:
    assert all(written(statement, output) for output in ("table", "csv", "json"))


def test_many_batches_and_none_at_all(written: Written) -> None:
    sql = "SELECT i, CASE WHEN i = 4000 THEN 'infinity' ELSE DATE '2026-01-02' END AS d FROM range(5000) AS _(i)"
    for rows in (json.loads(written(sql, "json")), list(csv.DictReader(io.StringIO(written(sql, "csv"))))):
        assert [int(row["i"]) for row in rows] == list(range(5000))
        assert [row["d"] for row in rows[3999:4002]] == ["2026-01-02", "infinity", "2026-01-02"]
    assert written("SELECT 1 AS i, DATE '2026-01-02' AS d WHERE false", "csv") == '"i","d"\n'
