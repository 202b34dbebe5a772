"""Stage one for one batch and for one chunk: inputs in, packed rows out. Writes nothing."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages import batching
from stages.backbone import Backbone
from stages.images import Images
from stages.kinds import main_stream
from stages.packing import pack
from stages.selection import kept, select
from stages.texts import Tokens
from store.errors import Refused
from store.layout import CROSS_ATTENTION


class Rows(NamedTuple):
    """The kept rows of one batch, on the device."""

    arrays: dict[str, Tensor]
    """array path (`encoder/values`) -> (rows, S, D), packed"""
    lengths: dict[str, Tensor]
    """stream -> (B,) int64 rows of each example"""
    attention: Tensor | None
    """(rows of the encoder, L) of an encoder-decoder: what the decoder's row takes of each encoder token"""


def rows(backbone: Backbone, inputs: dict[str, Tensor], states: dict[str, list[str]], rule: str, codec: str) -> Rows:
    """The kept rows of one padded batch, by example, then by position.

    states: of each stream those that are kept. rule: which tokens of the main stream; of an encoder-decoder's decoder it
    is its one row an example.
    """
    captured = backbone.hidden_states(inputs, states)
    main = main_stream(backbone.anatomy.kind, rule)
    arrays: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    for stream, seen in captured.states.items():
        mask = captured.mask[stream]
        if rule == "mean" and backbone.anatomy.prefix:
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) >= backbone.anatomy.prefix)  # patches alone
        own = rule if stream == main else "all"
        arrays |= {f"{stream}/{name}": value for name, value in pack(select(seen, mask, own), codec).items()}
        lengths[stream] = mask.sum(1) if own == "all" else torch.ones_like(mask[:, 0], dtype=torch.long)
    attention = None if captured.attention is None else captured.attention[captured.mask["encoder"]]  # (r, L)
    return Rows(arrays, lengths, attention)


def chunk(
    backbone: Backbone,
    examples: Tokens | Images,
    part: range,
    states: dict[str, list[str]],
    rule: str,
    codec: str,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """The rows of a run of examples, in the examples' order: array path -> (rows, …).

    told: called with the number of examples of each batch that is done. Raises Refused where a state is NaN or infinite,
    naming the examples of its batch.
    """
    lengths = examples.lengths[part.start : part.stop]
    main = main_stream(backbone.anatomy.kind, rule)
    counts = {stream: kept(lengths, rule) if stream == main else np.ones_like(lengths) for stream in states}
    ends = {stream: np.cumsum(count) for stream, count in counts.items()}
    found: dict[str, np.ndarray] = {}
    for batch in batching.by_length(lengths):
        try:
            packed = rows(backbone, examples.collate(batch + part.start), states, rule, codec)
        except Refused as error:
            where = ", ".join(str(i) for i in examples.source[batch + part.start][:8])
            raise Refused(
                f"{error} among the data set's rows {where}{'…' if len(batch) > 8 else ''} (counted from 0): the backbone "
                f"overflows on them; look at these inputs, or at the checkpoint; nothing was written"
            ) from None
        place = {s: np.concatenate([np.arange(ends[s][i] - counts[s][i], ends[s][i]) for i in batch]) for s in states}
        beside = {} if packed.attention is None else {CROSS_ATTENTION: packed.attention}
        for path, value in (packed.arrays | beside).items():
            block, stream = value.cpu().numpy(), path.split("/")[0]
            if path not in found:
                found[path] = np.empty((int(ends[stream][-1]), *block.shape[1:]), block.dtype)
            found[path][place[stream]] = block
        told(len(batch))
    return found
