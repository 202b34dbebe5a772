"""Stage two's input: chunks in a seeded order, a window of them in memory, batches from it on the device.

An epoch gives every example exactly once, in an order that is a function of (seed, epoch). While batches are made of
one window, a thread reads the next. A cache that fits into one window is read once and stays.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from stages.heads import Batch
from stages.packing import unpack
from store.order import windows
from store.reader import Cache

WINDOW_BYTES = 1 << 30
"""of one window, in bytes; at most two are in memory"""


class _Window:
    """Some chunks of some streams in memory, as they are stored."""

    def __init__(self, cache: Cache, streams: list[str], chunks: np.ndarray) -> None:
        self.chunks = chunks
        self.slot = np.full(cache.chunks, -1)
        self.slot[chunks] = np.arange(len(chunks))
        self.arrays: dict[str, dict[str, np.ndarray]] = {stream: {} for stream in streams}
        for stream, arrays in self.arrays.items():
            for slot, number in enumerate(chunks):
                for name, block in cache.chunk(int(number), stream).items():
                    if name not in arrays:
                        arrays[name] = np.empty((len(chunks) * len(block), *block.shape[1:]), block.dtype)
                    arrays[name][slot * len(block) : (slot + 1) * len(block)] = block


class Loader:
    """Batches of some of a cache's examples."""

    def __init__(
        self,
        cache: Cache,
        examples: np.ndarray,
        labels: np.ndarray,
        batch: int,
        device: torch.device,
        streams: Iterable[str] | None = None,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """
        examples: (n,) which of the cache's examples. labels: (N,) of all of them. batch: B. streams: those that are read,
        the cache's main one where left out; `rows` of a batch are of the first.
        """
        self.cache, self.examples, self.labels = cache, examples, labels
        self.batch, self.device = batch, device
        self.streams = list(streams or [cache.main])
        self._place = {stream: cache.place(stream) for stream in self.streams}
        self.per_window = max(1, window_bytes // cache.chunk_bytes(self.streams))
        self._kept: _Window | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """Every example once, shuffled: B at a time, the last batch of a window may be smaller."""
        return self._batches(windows(self.cache.chunk_of, self.examples, self.per_window, seed, epoch))

    def in_order(self) -> Iterator[Batch]:
        """Every example once, in the order of the cache."""
        ordered = np.sort(self.examples)
        groups = self.cache.chunk_of[ordered] // self.per_window
        return self._batches([ordered[groups == group] for group in np.unique(groups)])

    def _batches(self, groups: list[np.ndarray]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "read-ahead") as ahead:
            coming = ahead.submit(self._window, groups[0])
            for number, group in enumerate(groups):
                window = coming.result()
                if number + 1 < len(groups):
                    coming = ahead.submit(self._window, groups[number + 1])
                for begin in range(0, len(group), self.batch):
                    yield self._gather(window, group[begin : begin + self.batch])

    def _window(self, examples: np.ndarray) -> _Window:
        chunks = np.unique(self.cache.chunk_of[examples])
        if self._kept is not None and np.array_equal(self._kept.chunks, chunks):
            return self._kept
        window = _Window(self.cache, self.streams, chunks)
        self._kept = window if len(np.unique(self.cache.chunk_of[self.examples])) <= self.per_window else None
        return window

    def _gather(self, window: _Window, examples: np.ndarray) -> Batch:
        main, *beside = self.streams
        rows, owner, begin, attention = self._rows(window, examples, main)
        return Batch(
            rows=rows,
            example=self._move(owner),
            start=self._move(begin),
            labels=self._move(self.labels[examples]),
            place=torch.from_numpy(examples),
            decoder=self._rows(window, examples, beside[0])[0] if beside else None,
            attention=attention if beside else None,
        )

    def _rows(
        self, window: _Window, examples: np.ndarray, stream: str
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray, torch.Tensor | None]:
        """Of one stream: rows (r, S, D), to which example each belongs (r,), where an example's begin (B,), attention."""
        cache, (starts, all_lengths) = self.cache, self._place[stream]
        lengths = all_lengths[examples]
        begin = np.cumsum(lengths) - lengths  # (B,)
        size = cache.chunk_rows(stream)
        base = window.slot[cache.chunk_of[examples]] * size + starts[examples] % size
        owner = np.repeat(np.arange(len(examples)), lengths)  # (r,)
        place = base[owner] + np.arange(len(owner)) - begin[owner]
        packed = {name: self._move(values[place]) for name, values in window.arrays[stream].items()}
        attention = packed.pop("cross_attention", None)
        return unpack(packed, cache.manifest.recipe["codec"]), owner, begin, attention

    def _move(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)
