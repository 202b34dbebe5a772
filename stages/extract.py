"""Stage one: inputs in, packed rows out, forward pass after forward pass. Writes nothing.

Three threads work at once: one makes the inputs of the next forward pass, one runs the backbone, selects and packs on the
device, and one (the caller's, see `Chunk`) brings rows to where they belong. None waits for the device but the last.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages import batching
from stages.ahead import ahead
from stages.backbone import Backbone
from stages.images import Images
from stages.kinds import main_stream
from stages.packing import finite, pack_each
from stages.selection import TOKENS, kept, select
from stages.texts import Tokens
from store.errors import Refused
from store.layout import CROSS_ATTENTION, rows_of


class Rows(NamedTuple):
    """The kept rows of one batch, on the device."""

    arrays: dict[str, Tensor]
    """array path (`encoder/values`) -> (rows, S, …), packed"""
    lengths: dict[str, Tensor]
    """stream -> (B,) int64 rows of each example"""
    attention: Tensor | None
    """(rows of the encoder, L) of an encoder-decoder: what the decoder's row takes of each encoder token"""
    finite: Tensor
    """() bool: whether every state was, and is as stored"""


class Piece(NamedTuple):
    """The kept rows of one batch, on their way to the host."""

    chunk: int
    """whose rows they are"""
    last: bool
    """whether they are the last of their chunk"""
    examples: np.ndarray
    """(B,) which of the chunk's examples, counted from its first"""
    arrays: dict[str, Tensor]
    """array path -> (rows, …)"""
    finite: Tensor
    there: Callable[[], object]
    """waits until they are on the host"""

    @property
    def bytes(self) -> int:
        """Their size, in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


def rows(backbone: Backbone, inputs: dict[str, Tensor], states: dict[str, list[str]], rule: str, codec: str) -> Rows:
    """The kept rows of one padded batch, by example, then by position.

    states: of each stream those that are kept. rule: which tokens of the main stream; of an encoder-decoder's decoder it
    is its one row an example.
    """
    captured = backbone.hidden_states(inputs, states)
    main = main_stream(backbone.anatomy.kind, rule)
    arrays: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    good = []
    for stream, seen in captured.states.items():
        mask = captured.mask[stream]
        own = rule if stream == main else "all"
        packed = pack_each(select(seen, mask, own, backbone.anatomy.prefix), codec)
        arrays |= {f"{stream}/{name}": value for name, value in packed.items()}
        good.append(finite(packed))
        count = TOKENS[own].rows
        lengths[stream] = mask.sum(1) if count is None else torch.full_like(mask[:, 0], count, dtype=torch.long)
    attention = None if captured.attention is None else captured.attention[captured.mask["encoder"]]  # (r, L)
    if attention is not None:
        good.append(finite({"values": attention}))
    return Rows(arrays, lengths, attention, torch.stack(good).all())


def pieces(
    backbone: Backbone,
    examples: Tokens | Images,
    parts: Iterable[tuple[int, range]],
    states: dict[str, list[str]],
    rule: str,
    codec: str,
    wanted: np.ndarray | None = None,
) -> Iterator[Piece]:
    """Every batch of some chunks, each chunk's as the batch plan says. parts: a chunk's number, and its examples.

    wanted: (N,) bool of all examples, those that go through the backbone; all of them where left out.
    """

    def batches() -> Iterator[tuple[int, bool, int, np.ndarray]]:
        for number, part in parts:
            mine = np.arange(len(part)) if wanted is None else np.flatnonzero(wanted[part.start : part.stop])
            groups = batching.by_length(examples.lengths[part.start + mine]) if len(mine) else []
            for index, group in enumerate(groups):
                yield number, index + 1 == len(groups), part.start, mine[group]

    def inputs(batch: tuple[int, bool, int, np.ndarray]) -> tuple[tuple[int, bool, int, np.ndarray], dict[str, Tensor]]:
        _, _, begin, group = batch
        made = examples.collate(begin + group)
        return batch, {name: value.pin_memory() for name, value in made.items()} if on_gpu else made

    on_gpu = backbone.device.type == "cuda"
    copies = torch.cuda.Stream(backbone.device) if on_gpu else None  # type: ignore[no-untyped-call]
    for (number, last, _, group), collated in ahead(inputs, batches()):
        found = rows(backbone, collated, states, rule, codec)
        arrays = found.arrays | ({} if found.attention is None else {CROSS_ATTENTION: found.attention})
        fine, there = found.finite, _nothing
        if copies:  # into pinned memory, behind this forward pass and beside the next one
            copies.wait_stream(torch.cuda.current_stream(backbone.device))
            with torch.cuda.stream(copies):
                for value in (*arrays.values(), fine):
                    value.record_stream(copies)
                arrays = {path: value.to("cpu", non_blocking=True) for path, value in arrays.items()}
                fine = fine.to("cpu", non_blocking=True)
                there = copies.record_event().synchronize
        yield Piece(number, last, group, arrays, fine, there)


def _nothing() -> None:
    """What is on the host is there."""


class Chunk:
    """The rows of one chunk, brought to their places as they come."""

    def __init__(
        self,
        backbone: Backbone,
        examples: Tokens | Images,
        part: range,
        states: Iterable[str],
        rule: str,
        into: dict[str, np.ndarray] | None = None,
    ) -> None:
        """part: its examples. into: arrays that take its rows, zeros behind them; made as they are needed where left out."""
        lengths = examples.lengths[part.start : part.stop]
        main = main_stream(backbone.anatomy.kind, rule)
        self.source, self.part = examples.source, part
        self.counts = {stream: kept(lengths, rule) if stream == main else np.ones_like(lengths) for stream in states}
        self.begin = {stream: np.cumsum(count) - count for stream, count in self.counts.items()}
        self.arrays = into or {}
        """array path -> (rows of the chunk, …), in the examples' order"""
        for path, values in self.arrays.items():
            values[int(self.counts[path.split("/")[0]].sum()) :] = 0
        self.left = len(part)
        """examples whose rows are still to come"""

    def add(self, piece: Piece) -> None:
        """Bring a batch's rows to their places. Raises Refused where a state is NaN or infinite, naming the batch's examples."""
        piece.there()
        if not piece.finite:
            where = ", ".join(str(i) for i in self.source[piece.examples + self.part.start][:8])
            raise Refused(
                f"a state is not finite among the data set's rows {where}{'…' if len(piece.examples) > 8 else ''} (counted from "
                f"0): the backbone overflows on them; look at these inputs, or at the checkpoint; nothing was published"
            )
        for path, value in piece.arrays.items():
            block, stream = value.cpu().numpy(), path.split("/")[0]
            count, begin = self.counts[stream], self.begin[stream]
            if path not in self.arrays:
                self.arrays[path] = np.empty((int(count.sum()), *block.shape[1:]), block.dtype)
            self.arrays[path][rows_of(begin[piece.examples], count[piece.examples])] = block
        self.left -= len(piece.examples)


def chunk(
    backbone: Backbone, examples: Tokens | Images, part: range, states: dict[str, list[str]], rule: str, codec: str
) -> dict[str, np.ndarray]:
    """The rows of a run of examples, in the examples' order: array path -> (rows, …).

    Raises Refused where a state is NaN or infinite, naming the examples of its batch.
    """
    found = Chunk(backbone, examples, part, states, rule)
    for piece in pieces(backbone, examples, [(0, part)], states, rule, codec):
        found.add(piece)
    return found.arrays
