"""How two caches of one recipe differ: other hardware gives other last bits."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from store import reader
from store.codecs import codec
from store.reader import Cache

MOST_CHUNKS = 64
"""of a stream that are compared number by number: enough to say how far two machines are apart"""


class Difference(NamedTuple):
    """How one cache differs from another of the same recipe."""

    files: int
    """how many differ"""
    of: int
    """how many there are"""
    largest: float
    """the largest difference of a number of a state"""
    relative: float
    """the norm of all differences over that of the states, of chunks that differ"""

    def __str__(self) -> str:
        if not self.largest:
            return f"{self.files} of {self.of} files differ, and no state"
        return f"{self.files} of {self.of} files differ, states by {self.largest:.2g} at most, relatively by {self.relative:.2g}"


def difference(one: Path | str, other: Path | str) -> Difference | None:
    """How a cache differs from another of the same recipe; None where all files are the same. Raises Damaged where one is."""
    mine, theirs = reader.open(one), reader.open(other)
    places = mine.manifest.objects.keys() | theirs.manifest.objects.keys()
    differ = {place for place in places if mine.manifest.objects.get(place) != theirs.manifest.objects.get(place)}
    if not differ:
        return None
    largest = total = squares = 0.0
    for stream in mine.states:
        chunks = {
            place.rsplit("/c.", 1)[1].split(".")[0] for place in differ if place.startswith(f"{stream}/") and "/c." in place
        }
        for number in sorted(map(int, chunks))[:MOST_CHUNKS]:
            a, b = (decoded(cache, number, stream) for cache in (mine, theirs))
            gap = np.abs(a - b)
            largest, total = max(largest, float(gap.max())), total + float(np.square(gap, dtype=np.float64).sum())
            squares += float(np.square(b, dtype=np.float64).sum())
    return Difference(len(differ), len(places), largest, (total / squares) ** 0.5 if squares else 0.0)


def decoded(cache: Cache, number: int, stream: str) -> np.ndarray:
    """(C, S, D) float32: a chunk's states; of rows that are none zeros."""
    kind, stored = codec(cache.codec), cache.chunk(number, stream)
    return kind.decode({name: stored[name] for name in kind.arrays}, cache.width)
