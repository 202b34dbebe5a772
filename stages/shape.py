"""What a head is: every choice that fixes its parameters, as plain data; what cannot be is refused when it is made."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from stages import controls
from stages.depths import Depths
from stages.heads import Head, Verbalizer, classifier
from stages.read import CELLS, READ, Joined, Recurrence
from store.errors import Refused
from store.order import shuffled


@dataclass(frozen=True)
class Shape:
    """A head's shape."""

    width: int
    """D"""
    states: dict[str, list[str]]
    """of each stream that the head reads; the last is the one that is corrected"""
    outputs: int
    """K: 1 makes a regressor"""
    pool: str
    """rows to one vector: attention, mean, first, last"""
    hidden: int = 256
    """H"""
    cell: str = "gru"
    aggregate: Literal["mean", "last"] = "mean"
    initial: Literal["zero", "embedding"] = "zero"
    scale_in: float = 1.0
    scale_out: float = 1.0
    bidirectional: bool = False
    layers: str = "all"
    """the blocks that READ runs over, of those in the cache"""
    head: Literal["classifier", "verbalizer"] = "classifier"
    dropout: float = 0.1
    standardise: bool = False
    """whether the head reads the states in units of their spread; label words ask for them as they are"""
    control: str = "read"
    """what reads the states: READ, or one of `stages.controls`"""

    def __post_init__(self) -> None:
        check_names(self.cell, self.control)
        for stream, states in self.states.items():
            try:
                Depths.of(states, self.layers)
            except Refused as error:
                raise Refused(f"{error} in the {stream} stream") from None
        if self.initial == "embedding" and self.depths.embedding is None:
            raise Refused("read.initial=embedding needs the `embedding` state, which the cache does not have; add 0 to LAYERS")
        if self.head == "verbalizer" and self.outputs == 1:
            raise Refused("HEAD=verbalizer answers with label words, and regression has none; leave HEAD out")

    @property
    def depths(self) -> Depths:
        """Of the stream that is corrected."""
        return Depths.of(list(self.states.values())[-1], self.layers)

    @property
    def joined(self) -> bool:
        """Whether the encoder's READ speaks to the decoder's."""
        return len(self.states) > 1


def check_names(cell: str, control: str = "read") -> None:
    """Refuse a cell or a control that is not there, with those that are."""
    if cell not in CELLS:
        raise Refused(f"unknown cell {cell!r}; known: {', '.join(CELLS)}")
    if control not in controls.CONTROLS:
        raise Refused(f"unknown control {control!r}; known: {', '.join(controls.CONTROLS)}")


def build(shape: Shape, words: torch.Tensor | None = None) -> Head:
    """A fresh head of that shape. words: (K, D) of a verbalizer; zeros where they are still to be loaded."""
    depths = shape.depths
    if shape.control == "shuffled":
        depths = depths._replace(blocks=_mixed(depths.blocks))
    read = _reader(shape, depths)
    if shape.head == "verbalizer":
        output: nn.Module = Verbalizer(torch.zeros(shape.outputs, shape.width) if words is None else words)
    else:
        output = classifier(shape.width, shape.outputs, shape.dropout)
    return Head(read, shape.pool, shape.width, output, shape.outputs, depths)


def _reader(shape: Shape, depths: Depths) -> nn.Module:
    kind = controls.Reset if shape.control == "reset" else READ
    beside = shape.hidden * (2 if shape.bidirectional else 1) if shape.joined else 0

    def read(beside: int) -> READ:
        return kind(
            shape.width, shape.hidden, shape.cell, shape.aggregate, shape.initial, shape.scale_in, shape.scale_out,
            shape.bidirectional, beside,
        )  # fmt: skip

    if shape.control not in ("read", "reset", "shuffled"):
        with torch.device("meta"):
            size = count(read(0))
        return controls.build(shape.control, shape.width, depths, size)
    if not shape.joined:
        return read(0)
    encoder = Recurrence(shape.width, shape.hidden, shape.cell, shape.initial, shape.scale_in, shape.bidirectional)
    return Joined(encoder, read(beside), Depths.of(next(iter(shape.states.values())), shape.layers))


def _mixed(blocks: list[int]) -> list[int]:
    """The blocks in a fixed order that is not their own, where there is one."""
    orders = ([blocks[place] for place in shuffled(len(blocks), seed)] for seed in range(100))
    return next((order for order in orders if order != blocks), blocks)


def count(module: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
