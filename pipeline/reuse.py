"""Rows that other caches of the same backbone and choices have already: found by the examples' keys, checked, copied."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

import store
from pipeline.recipe import Recipe
from stages.extract import Piece
from store import Cache, layout
from store.catalog import Found
from store.errors import Refused, damaged
from store.stores import Stores

FREE = {"data", "order_seed", "limit", "chunk_bytes", "max_length", "words"}
"""fields of a recipe in which a source may differ: which inputs there are, and how they are laid out"""

COMPUTED = -1


class Reuse(NamedTuple):
    """Which examples of a cache to be are copied, and from where."""

    sources: list[Cache]
    which: np.ndarray
    """(N,) int32: the source of each example, or -1"""
    example: np.ndarray
    """(N,) int64: which of its examples it is there"""

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """Of each source its fingerprint, and how many examples come from it."""
        return tuple((cache.fingerprint, int((self.which == number).sum())) for number, cache in enumerate(self.sources))

    @property
    def digest(self) -> str:
        """Of all that says what is copied from where."""
        told = [*(cache.fingerprint.encode() for cache in self.sources), self.which.tobytes(), self.example.tobytes()]
        return hashlib.sha256(b" ".join(told)).hexdigest()

    def copied(self, part: range) -> np.ndarray:
        """(n,) bool: which examples of a run of them are copied."""
        found: np.ndarray = self.which[part.start : part.stop] != COMPUTED
        return found

    def pieces(self, number: int, part: range) -> Iterable[Piece]:
        """The copied rows of a chunk, a piece a source. number: of the chunk. part: its examples."""
        for source, cache in enumerate(self.sources):
            mine = np.flatnonzero(self.which[part.start : part.stop] == source)
            if len(mine):
                theirs = self.example[part.start : part.stop][mine]
                arrays = {
                    f"{stream}/{name}": torch.from_numpy(values)
                    for stream in cache.states
                    for name, values in cache.gather(theirs, stream).items()
                }
                yield Piece(number, False, mine, arrays, torch.tensor(True), lambda: None)

    def check(self) -> None:
        """Compare the files of all chunks that are copied from with their digests. Raises Damaged for one that differs."""
        for number, cache in enumerate(self.sources):
            for chunk in np.unique(cache.chunk_of[self.example[self.which == number]]).tolist():
                for stream in cache.states:
                    for name, array in cache.stored(stream).items():
                        place = layout.chunk_path(f"{stream}/{name}", chunk, len(array.shape))
                        if cache.objects.sha256(place) != cache.manifest.objects[place].sha256:
                            raise damaged(
                                cache.objects, place, "its sha256 is not the manifest's, and rows of it were to be copied"
                            )


def find(stores: Stores, recipe: Recipe, keys: np.ndarray, only: Iterable[str] | None = None) -> Reuse | None:
    """What other caches have of some examples; None where they have nothing.

    keys: (N, 16) of the examples. only: fingerprints of the caches to look into, all that there are where left out. One that does
    not read is passed over. Raises Refused where one of `only` is not there.
    """
    found = [item for item in stores.listing() if isinstance(item, Found)]
    if only is not None:
        there = {item.fingerprint: item for item in found}
        missing = [fingerprint for fingerprint in only if fingerprint not in there]
        if missing:
            raise Refused(
                f"cache {missing[0][:12]}, from which rows were copied, is not under {stores}; pull it, or extract anew"
            )
        found = [there[fingerprint] for fingerprint in only]
    which, example = np.full(len(keys), COMPUTED, np.int32), np.zeros(len(keys), np.int64)
    sources: list[Cache] = []
    wanted = _each(keys)
    for item in found:
        if only is None and _choices(item.recipe) != _choices(recipe):
            continue
        try:
            cache = store.open(item.path)
            theirs = {key: number for number, key in enumerate(_each(cache.table("key")))}
        except (Refused, KeyError):  # it does not read, or has no keys
            continue
        new = [n for n in np.flatnonzero(which == COMPUTED).tolist() if wanted[n] in theirs]
        if new:
            which[new], example[new] = len(sources), [theirs[wanted[n]] for n in new]
            sources.append(cache)
    return Reuse(sources, which, example) if sources else None


def _each(keys: np.ndarray) -> list[bytes]:
    text = keys.tobytes()
    return [text[begin : begin + 16] for begin in range(0, len(text), 16)]


def _choices(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name not in FREE}
