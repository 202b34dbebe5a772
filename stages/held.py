"""Rows of a cache held in memory: a window of chunks as they are stored, or some examples decoded."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from stages.packing import unpack
from stages.space import Space
from store.layout import rows_of
from store.reader import Cache

Stored = dict[str, np.ndarray]
"""array name -> numbers as they are stored"""


class Window:
    """Some chunks in memory, as they are stored."""

    def __init__(self, cache: Cache, streams: list[str], chunks: np.ndarray, space: Space, readers: int) -> None:
        self.cache = cache
        self.slot = np.full(cache.chunks, -1)
        self.slot[chunks] = np.arange(len(chunks))
        self.arrays: dict[str, Stored] = {}
        for stream in streams:
            stored = cache.stored(stream)
            self.arrays[stream] = {name: space((len(chunks), *a.chunks), a.dtype).numpy() for name, a in stored.items()}

        def read(slot: int) -> None:
            for stream, held in self.arrays.items():
                cache.chunk(int(chunks[slot]), stream, {name: values[slot] for name, values in held.items()})

        with ThreadPoolExecutor(readers, "chunks") as pool:
            list(pool.map(read, range(len(chunks))))

    def gather(self, examples: np.ndarray, stream: str, into: Stored) -> None:
        """As a cache's own."""
        size = self.cache.chunk_rows(stream)
        chunk, place = np.divmod(self.cache.rows_of(examples, stream), size)
        for name, values in self.arrays[stream].items():
            values.reshape(-1, *values.shape[2:]).take(self.slot[chunk] * size + place, 0, into[name], "clip")


class Memory:
    """Some examples, decoded once, on a device."""

    def __init__(self, cache: Cache, examples: np.ndarray, streams: list[str], device: torch.device) -> None:
        """examples: (n,) which of the cache's."""
        self.cache, ordered = cache, np.sort(examples)
        self.attention: Tensor | None = None
        self.rows: dict[str, Tensor] = {}
        self.start: dict[str, np.ndarray] = {}
        """stream -> (N,) where an example's rows begin in `rows`; -1 of those that are not here"""
        parts = np.split(ordered, np.flatnonzero(np.diff(cache.chunk_of[ordered])) + 1)
        for stream in streams:
            lengths = cache.place(stream)[1]
            total = int(lengths[ordered].sum())
            self.start[stream] = np.full(len(lengths), -1)
            self.start[stream][ordered] = np.cumsum(lengths[ordered]) - lengths[ordered]
            rows = torch.empty(total, len(cache.states[stream]), cache.width, device=device)
            done, size = 0, cache.chunk_rows(stream)
            for part in parts:  # the examples of one chunk
                block, local = cache.chunk(int(cache.chunk_of[part[0]]), stream), cache.rows_of(part, stream) % size
                stored = {name: torch.from_numpy(values[local]).to(device) for name, values in block.items()}
                attention = stored.pop("cross_attention", None)
                rows[done : done + len(local)] = unpack(stored, cache.codec, cache.width)
                if attention is not None:
                    self.attention = attention.new_empty(total, attention.shape[1]) if self.attention is None else self.attention
                    self.attention[done : done + len(local)] = attention
                done += len(local)
            self.rows[stream] = rows

    def places(self, examples: np.ndarray, stream: str) -> np.ndarray:
        """(r,) which rows are those of examples (n,)."""
        return rows_of(self.start[stream][examples], self.cache.place(stream)[1][examples])
