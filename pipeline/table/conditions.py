"""SQL conditions that somebody gives. Owns: that one is a condition and nothing more, and what is said of one that is
none. Must not know: of which table it is asked.
"""

from __future__ import annotations

from typing import Any

import duckdb

from pipeline.errors import UsageError


def check_condition(connection: Any, where: str) -> None:
    """Raises UsageError for what does not parse as one SQL condition, such as several statements or brackets that
    close what they did not open. Asks nothing of any table.
    """
    # Twice, so that what is taken as a condition inside brackets is one outside of them too.
    for sql in (f"SELECT 1 WHERE {where}\n", f"SELECT ({where}\n)"):
        try:
            count = len(connection.extract_statements(sql))
        except duckdb.Error as error:
            why = "give one condition, without a semicolon" if ";" in where else told(error)
            raise UsageError(f"--where {where!r} is no condition: {why}") from error
        if count != 1:
            raise UsageError(f"--where {where!r} is {count} statements: give one condition, without a semicolon")


def told(error: duckdb.Error) -> str:
    """What DuckDB says, in a line, without the SQL that it says it of."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("LINE ", "^")))
