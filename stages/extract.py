"""Stage one for one chunk: token ids in, packed rows out. Writes nothing."""

from collections.abc import Callable

import numpy as np

from stages import batching
from stages.backbone import Backbone
from stages.inputs import Tokens, collate
from stages.packing import pack
from stages.selection import kept, select
from store.errors import Refused


def chunk(
    backbone: Backbone,
    tokens: Tokens,
    examples: range,
    states: list[str],
    rule: str,
    codec: str,
    told: Callable[[int], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """The states of a run of examples: array path (`encoder/values`) -> (rows, S, D), in the examples' order.

    rule: which tokens are kept. told: called with the number of examples of each batch that is done. Raises Refused
    where a state is NaN or infinite, naming the examples of its batch.
    """
    lengths = tokens.lengths[examples.start : examples.stop]
    rows = kept(lengths, rule)
    ends = np.cumsum(rows)
    found: dict[str, np.ndarray] = {}
    for batch in batching.by_length(lengths):
        inputs = collate(tokens, batch + examples.start)
        mask = inputs["attention_mask"].bool().to(backbone.device, non_blocking=True)
        for stream, captured in backbone.hidden_states(inputs, states).items():
            try:
                packed = pack(select(captured, mask, rule), codec)
            except Refused as error:
                where = ", ".join(str(i) for i in tokens.source[batch + examples.start][:8])
                raise Refused(
                    f"{error} among the data set's rows {where}{'…' if len(batch) > 8 else ''} (counted from 0): the backbone "
                    f"overflows on them; look at these texts, or at the checkpoint; nothing was written"
                ) from None
            place = np.concatenate([np.arange(ends[i] - rows[i], ends[i]) for i in batch])
            for name, value in packed.items():
                block = value.cpu().numpy()
                path = f"{stream}/{name}"
                if path not in found:
                    found[path] = np.empty((int(ends[-1]), *block.shape[1:]), block.dtype)
                found[path][place] = block
        told(len(batch))
    return found
