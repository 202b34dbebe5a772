"""Stage two's input: batches of a cache's examples on the device, read ahead by threads.

An epoch gives every example exactly once, in an order that is a function of (seed, epoch), whatever the number of readers.
How a cache is read is `stages.access`'s choice: kept in memory or at random, the order is fully random; by windows of chunks,
it is random among the examples of a window. What is read at a time is a block of several batches, so that threads change
hands rarely; on a GPU it goes there in one copy from pinned memory, on a stream of its own beside the steps before.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.access import Access, choose
from stages.ahead import ahead
from stages.heads import Batch
from stages.held import Memory, Stored, Window
from stages.packing import unpack
from stages.space import Space
from store.errors import Refused
from store.order import windows
from store.reader import Cache

BLOCK_BYTES = 16 << 20
"""about what is read at a time, in bytes"""

EVALUATED_BYTES = 8 << 20
"""about what is evaluated at a time, as stored, in bytes: decoded and on its way through READ it is many times as much"""

BLOCKS = Space(most=16, pinned=False)
"""where all loaders of a process read to: of several one is at work at a time"""

ROWS = Space(most=4, pinned=False)
"""where they decode to, on the CPU: batches differ in size, and an allocator would keep ever more of them"""

AUTO = Access()

Source = Callable[[np.ndarray, str, Stored], object]
"""from examples (n,) and a stream: its rows (r, S, …) as stored, into arrays by name"""


class Block(NamedTuple):
    """The rows of one or several batches, one example behind the other, as they are stored."""

    examples: np.ndarray
    """(n,)"""
    streams: dict[str, dict[str, Tensor]]
    """stream -> array name -> (r, S, …); where rows are kept in memory (r,) alone: which of them"""
    begin: np.ndarray
    """(n + 1,) where an example's rows of the first stream begin, and how many there are; of another each has one"""

    def to(self, device: torch.device) -> "Block":
        """On a device."""
        moved = {
            stream: {name: values.to(device, non_blocking=True) for name, values in arrays.items()}
            for stream, arrays in self.streams.items()
        }
        return self._replace(streams=moved)

    def batches(self, size: int) -> Iterator["Block"]:
        """Cut into batches of so many examples; the last may be smaller."""
        for begin in range(0, len(self.examples), size):
            examples, rows = self.examples[begin : begin + size], self.begin[begin : begin + size + 1]
            cuts = [slice(rows[0], rows[-1]), *([slice(begin, begin + size)] * (len(self.streams) - 1))]
            streams = {
                stream: {name: values[cut] for name, values in arrays.items()}
                for cut, (stream, arrays) in zip(cuts, self.streams.items(), strict=True)
            }
            yield Block(examples, streams, rows - rows[0])


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
        access: Access = AUTO,
    ) -> None:
        """
        examples: (n,) which of the cache's examples. labels: (N,) of all of them. batch: B. streams: those that are read,
        the cache's main one where left out; `rows` of a batch are of the first. access: how, settled here if it is `auto`.
        """
        self.cache, self.examples, self.labels = cache, examples, labels
        self.batch, self.device = batch, device
        self.streams = list(streams or [cache.main])
        self.access = choose(access, [cache], self.streams, device).access
        stored = cache.chunk_bytes(self.streams)
        self.per_window = max(1, self.access.window_bytes // stored) if self.access.how == "windows" else cache.chunks
        self._block = batch * max(1, BLOCK_BYTES // (batch * _example_bytes(cache, self.streams)))
        self._kept: Memory | None = None
        self._position: dict[str, int] = {}
        self._resume: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """Every example once, shuffled: B at a time, the last batch of a window may be smaller.

        Where a position in this very epoch was loaded, those that come after it.
        """
        done = self._resume.get("done", 0) if (self._resume.get("seed"), self._resume.get("epoch")) == (seed, epoch) else 0
        self._resume = {}
        self._position = {"seed": seed, "epoch": epoch, "done": done}
        for batch in self._batches(_after(self._groups(seed, epoch), done)):
            self._position["done"] += len(batch.labels)
            yield batch

    def _groups(self, seed: int, epoch: int) -> list[np.ndarray]:
        """The examples of an epoch in their order, window by window."""
        return windows(self.cache.chunk_of, self.examples, self.per_window, seed, epoch) if len(self) else []

    def in_order(self) -> Iterator[Batch]:
        """Every example once, in the order of the cache."""
        ordered = np.sort(self.examples)
        groups = self.cache.chunk_of[ordered] // self.per_window
        return self._batches([ordered[groups == group] for group in np.unique(groups)])

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch that is running: plain numbers and words, to be saved with a checkpoint."""
        return self._identity() | self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position: the next `epoch` of its seed and number gives what was not given yet.

        Raises Refused where it is the position of another loader: other examples, batches or windows come in another order.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise Refused(
                    f"the saved position is of a loader with {name} {state.get(name)}, this one has {mine}; go on with the same "
                    f"cache, examples, batch and access, or begin the epoch again"
                )
        self._resume = {name: int(state[name]) for name in ("seed", "epoch", "done") if name in state}

    def _identity(self) -> dict[str, Any]:
        """What fixes the order of an epoch beside its seed and number."""
        return {
            "cache": self.cache.fingerprint, "examples": len(self.examples), "which": zlib.crc32(self.examples.tobytes()),
            "batch": self.batch, "per_window": self.per_window,
        }  # fmt: skip

    def _blocks(self, groups: list[np.ndarray]) -> Iterator[Block]:
        """Groups of examples, each of one window, in blocks of several batches on the host: read and not yet decoded."""
        if not groups:
            return
        if self.access.how == "memory":
            self._kept = self._kept or Memory(self.cache, self.examples, self.streams, self.device)
        blocks = Space(0, pinned=True) if self.device.type == "cuda" else BLOCKS
        # windows are all of one size, and twice one might be more than a system promises
        space = Space(2 * sum(len(self.cache.stored(stream)) for stream in self.streams), pinned=False, slack=1)
        with ThreadPoolExecutor(1, "window") as pool:
            coming = pool.submit(self._source, groups[0], space)
            for number, group in enumerate(groups):
                source = coming.result()  # and the window before is let go
                if number + 1 < len(groups):
                    coming = pool.submit(self._source, groups[number + 1], space)
                cuts = [group[begin : begin + self._block] for begin in range(0, len(group), self._block)]
                yield from ahead(functools.partial(self._read, source, blocks), cuts, self.access.readers, self.access.readers)

    def _source(self, group: np.ndarray, space: Space) -> Source | None:
        """What gives the rows of a group of examples."""
        if self._kept:
            return None
        if self.access.how == "random":
            return self.cache.gather
        chunks = np.unique(self.cache.chunk_of[group])
        return Window(self.cache, self.streams, chunks, space, self.access.readers).gather

    def _read(self, source: Source | None, space: Space, examples: np.ndarray) -> Block:
        """source: None where rows are kept in memory."""
        streams: dict[str, dict[str, Tensor]] = {}
        for stream in self.streams:
            if source is None:
                assert self._kept
                streams[stream] = {"place": self._pinned(self._kept.places(examples, stream))}
                continue
            rows = int(self.cache.place(stream)[1][examples].sum())
            stored = self.cache.stored(stream)
            streams[stream] = {name: space((rows, *a.chunks[1:]), a.dtype) for name, a in stored.items()}
            source(examples, stream, {name: values.numpy() for name, values in streams[stream].items()})
        lengths = self.cache.place(self.streams[0])[1][examples]
        return Block(examples, streams, np.concatenate([[0], np.cumsum(lengths)]))

    def stored(self, seed: int, epoch: int) -> Iterator[Block]:
        """An epoch's batches on the host, as they are stored: all that loading costs before rows are decoded on the device."""
        for block in self._blocks(self._groups(seed, epoch)):
            yield from block.batches(self.batch)

    def _batches(self, groups: list[np.ndarray]) -> Iterator[Batch]:
        for block in self._on_device(self._blocks(groups)):
            for part in block.batches(self.batch):
                yield self._decode(part)

    def _on_device(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Blocks on the device; on a GPU the copy of the next one is begun before batches of this one are given."""
        if self.device.type != "cuda":
            yield from (block.to(self.device) for block in blocks)
            return
        copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        before: tuple[Block, torch.cuda.Event] | None = None
        for block in blocks:
            with torch.cuda.stream(copies):
                coming = block.to(self.device), copies.record_event()
            if before:
                yield _arrived(*before)
            before = coming
        if before:
            yield _arrived(*before)

    def _decode(self, part: Block) -> Batch:
        main, *beside = self.streams
        own = part.streams[main]
        return Batch(
            rows=self._decoded(main, own),
            example=self._moved(np.repeat(np.arange(len(part.examples)), np.diff(part.begin))),
            start=self._moved(part.begin[:-1]),
            labels=self._moved(self.labels[part.examples]),
            place=torch.from_numpy(part.examples),
            decoder=self._decoded(beside[0], part.streams[beside[0]]) if beside else None,
            attention=self._attention(own) if beside else None,
        )

    def _decoded(self, stream: str, stored: dict[str, Tensor]) -> Tensor:
        """(r, S, D) float32."""
        room = None if self.device.type == "cuda" else functools.partial(ROWS, dtype="<f4")
        if self._kept:
            kept, place = self._kept.rows[stream], stored["place"]
            into = room((len(place), *kept.shape[1:])) if room else None
            return torch.index_select(kept, 0, place, out=into)
        return unpack(stored, self.cache.codec, self.cache.width, room)

    def _attention(self, stored: dict[str, Tensor]) -> Tensor | None:
        if self._kept:
            return None if self._kept.attention is None else self._kept.attention.index_select(0, stored["place"])
        return stored.get("cross_attention")

    def _pinned(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _moved(self, values: np.ndarray) -> Tensor:
        return self._pinned(values).to(self.device, non_blocking=True)


def at_once(cache: Cache, streams: Iterable[str], most: int) -> int:
    """How many examples are a batch where nothing is learned: at most `most`, and about EVALUATED_BYTES as stored."""
    return max(1, min(most, EVALUATED_BYTES // _example_bytes(cache, streams)))


def _example_bytes(cache: Cache, streams: Iterable[str]) -> int:
    """What an example takes as stored, in bytes, on average."""
    return max(1, cache.chunks * cache.chunk_bytes(streams) // len(cache.length))


def _arrived(block: Block, event: torch.cuda.Event) -> Block:
    """A block whose copy ran on another stream, for use on the current one."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for arrays in block.streams.values():
        for values in arrays.values():
            values.record_stream(current)
    return block


def _after(groups: list[np.ndarray], done: int) -> list[np.ndarray]:
    """Groups of examples without the first `done` of them."""
    left = []
    for group in groups:
        left += [group[done:]] if done < len(group) else []
        done = max(0, done - len(group))
    return left
