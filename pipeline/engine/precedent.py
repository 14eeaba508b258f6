"""What DEST remembers of a model version. Owns: which earlier run sets the example.
Must not know: how runs are made.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.config import Precision
from pipeline.engine.ledger import Ledger, RunRecord


class Precedent(NamedTuple):
    """`precision`: what `auto` came to before, else what a run was given. `record`: the newest finished run that made
    rows with masks."""

    precision: Precision | None
    record: RunRecord | None

    @classmethod
    def of(cls, ledger: Ledger, model_version: str) -> Precedent:
        """Reads the runs of this version from the newest back, until both are known."""
        auto: Precision | None = None
        given: Precision | None = None
        record: RunRecord | None = None
        for plan, closed in ledger.history(model_version):
            if plan.command.precision == "auto":
                auto = auto or plan.precision
            given = given or plan.precision
            if closed is not None and closed.state == "done" and closed.ok:
                record = record or closed
            if auto and record:
                break
        return cls(auto or given, record)

    @property
    def row_bytes(self) -> float | None:
        """Bytes of Parts per row, as measured."""
        return self.record.parts_bytes / max(1, self.record.ok + self.record.errors) if self.record else None
