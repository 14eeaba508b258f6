"""The breaker: is it the images that fail, or the world around them? Owns: which kinds of error speak of the world, the
window of the last outcomes.
Must not know: what else an outcome is made of, threads, shards.
"""

from __future__ import annotations

from collections import deque

from pipeline.errors import WORLD_KINDS

#: Outcomes over which failures of the world are watched.
WINDOW_IMAGES = 1000


def world_kinds(*, listed: bool) -> frozenset[str]:
    """Kinds of error that count against the world.

    An image that a listing has just shown and that is `missing` now says that a disk or a bucket has gone. One that
    somebody named may never have been there: of these even most may be missing, and the rest can still be done.
    """
    return WORLD_KINDS if listed else WORLD_KINDS - {"missing"}


class Breaker:
    """Watches the last `window_images` outcomes, in the fewest newest notes that hold so many. Not thread safe."""

    def __init__(self, window_images: int = WINDOW_IMAGES) -> None:
        self._window_images = window_images
        self._notes: deque[tuple[int, int]] = deque()
        self._images = 0
        self._failures = 0
        #: What happened in the last failure that said so.
        self.example = ""

    def note(self, images: int, world_failures: int, example: str = "") -> None:
        """Adds outcomes, of which `world_failures` failed for reasons outside their bytes, one as `example` says."""
        self.example = example or self.example
        self._notes.append((images, world_failures))
        self._images += images
        self._failures += world_failures
        while self._images - self._notes[0][0] >= self._window_images:
            images, world_failures = self._notes.popleft()
            self._images -= images
            self._failures -= world_failures

    @property
    def tripped(self) -> bool:
        """True where enough outcomes are known and more than half of them are failures of the world."""
        return self._images >= self._window_images and self._failures * 2 > self._images
