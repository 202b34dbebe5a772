"""What the state axis of a row means: names of states, which are kept, what READ makes of them. No torch."""

import re
from typing import NamedTuple

from store.errors import Refused


def parse(layers: str) -> list[int] | None:
    """`0,2,4-6` as sorted depths; None for `all`. Raises Refused for anything else."""
    if layers == "all":
        return None
    found: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise Refused(f"layers {layers!r} is neither `all` nor depths and ranges such as 0,2,4-6")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def normal(layers: str) -> str:
    """The one spelling of a choice of layers."""
    depths = parse(layers)
    return "all" if depths is None else ",".join(map(str, depths))


def names(layers: str, depth: int, final: bool) -> list[str]:
    """The states that are kept, (S,): some of `embedding`, `block.1` … `block.L`, and always the final state.

    depth: L. final: whether the final state differs from the last block's output. Raises Refused for a depth that is
    not there.
    """
    every = ["embedding", *(f"block.{number}" for number in range(1, depth + 1))]
    depths = parse(layers)
    for number in depths or []:
        if number > depth:
            raise Refused(f"layer {number} is out of range: this backbone has depths 0 (the embedding) … {depth}")
    kept = [name for number, name in enumerate(every) if depths is None or number in depths]
    return kept if not final and every[-1] in kept else [*kept, "final"]


class Depths(NamedTuple):
    """What each index of the state axis is to READ."""

    embedding: int | None
    """h_0"""
    blocks: list[int]
    """h_1 … h_L, as far as they were kept"""
    final: int
    """h_final, which is h_L where no norm follows"""

    @property
    def every(self) -> list[int]:
        """h_0 … h_L, as far as they are there."""
        return ([] if self.embedding is None else [self.embedding]) + self.blocks

    @classmethod
    def of(cls, states: list[str], layers: str = "all") -> "Depths":
        """From the names of a cache's states.

        layers: the blocks that are used, of those that were kept. Raises Refused for one that was not, or for none.
        """
        there = {int(name.removeprefix("block.")): index for index, name in enumerate(states) if name.startswith("block.")}
        if not there:
            raise Refused(f"READ runs over block outputs, and of {', '.join(states)} none is one; extract with more LAYERS")
        # h_L, whatever blocks are used: without a `final` state the last block's output is it
        final = states.index("final") if "final" in states else there[max(there)]
        wanted = sorted(there) if (chosen := parse(layers)) is None else chosen
        for number in wanted:
            if number not in there:
                known = ", ".join(map(str, sorted(there)))
                raise Refused(f"layer {number} is out of range for read.layers={layers}: the cache has blocks {known}")
        return cls(states.index("embedding") if "embedding" in states else None, [there[n] for n in wanted], final)
