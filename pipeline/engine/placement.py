"""Where a command's workers live. Owns: the choice between local processes, this process and Ray.
Must not know: what workers do.
"""

from __future__ import annotations

import os
from typing import Literal

from pipeline.config import SegmentConfig
from pipeline.engine.crew import Crew, InlineCrew, LocalCrew, check_local_actors
from pipeline.errors import UsageError
from pipeline.machine import gpu_count


def choose_engine(config: SegmentConfig, source: str, dest: str) -> tuple[Literal["local", "ray"], str]:
    """(`local` or `ray`, why)."""
    if config.engine != "auto":
        return config.engine, "as asked"
    if config.gpus_per_actor:
        return "ray", "--gpus-per-actor is for Ray"
    if config.ray_address or os.environ.get("RAY_ADDRESS"):
        return "ray", "a Ray address is given"
    if gpu_count() > 1:
        return "ray", f"{gpu_count()} GPUs"
    return "local", "no Ray address, and one GPU at most"


def check_actors(config: SegmentConfig, source: str, dest: str) -> None:
    """Raises UsageError where more workers are asked for than this machine can hold. Ray sees to that by itself."""
    if config.actors and choose_engine(config, source, dest)[0] == "local":
        check_local_actors(config.actors)


def check_place(config: SegmentConfig, source: str, dest: str) -> None:
    """Knocks where the workers would live, without starting any. Raises InfrastructureError where nobody answers,
    UsageError as `check_actors`."""
    check_actors(config, source, dest)
    if choose_engine(config, source, dest)[0] == "ray":
        from pipeline.engine.ray_crew import check_address, ray_address

        if address := ray_address(config.ray_address):
            check_address(address)


def open_crew(config: SegmentConfig, engine: Literal["local", "ray"], source: str, dest: str) -> Crew:
    """The place where this command's workers will live. Raises UsageError, InfrastructureError."""
    if engine == "ray":
        from pipeline.engine.ray_crew import RayCrew, ray_address

        if source.startswith("memory:") or dest.startswith("memory:"):
            raise UsageError("memory:// exists in this process only: use --engine local")
        return RayCrew(
            address=ray_address(config.ray_address),
            actors=config.actors,
            gpus_per_actor=config.gpus_per_actor,
            threads=config.threads,
            local_paths=not config.shared_filesystem and (source.startswith("file:") or dest.startswith("file:")),
        )
    if source.startswith("memory:") or dest.startswith("memory:"):
        return InlineCrew(actors=config.actors or 1, threads=config.threads)
    return LocalCrew(actors=config.actors, threads=config.threads)
