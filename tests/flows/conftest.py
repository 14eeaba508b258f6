"""The Prefect server and worker that these tests share."""

from __future__ import annotations

from prefect_site import site

__all__ = ["site"]
