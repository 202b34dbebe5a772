"""Which layers a READ listens to."""

import torch

from stages.heads import Head
from stages.loader import Loader
from stages.read import READ, Joined

EXAMPLES = 256
"""that are looked at, at most"""


def listening(head: Head, loader: Loader) -> list[float] | None:
    """The norm of each block's contribution to the correction, as a share of the norm of the final state, on average (L,).

    None for a head that has no READ.
    """
    read = head.read.decoder if isinstance(head.read, Joined) else head.read
    if type(read) is not READ:
        return None
    norms, final, done = torch.zeros(len(head.depths.blocks)), 0.0, 0
    with torch.inference_mode():
        for batch in loader.in_order():
            rows, psi = batch.rows, None
            if batch.decoder is not None:
                rows = batch.decoder
            if isinstance(head.read, Joined):
                assert batch.attention is not None
                psi = head.read.psi(batch.rows, batch.attention, batch.example, rows, head.depths)
            norms += read.contributions(rows, head.depths, psi).norm(dim=2).sum(0).cpu()
            final += float(rows[:, head.depths.final].norm(dim=1).sum())
            done += len(batch.labels)
            if done >= EXAMPLES:
                break
    return (norms / final).tolist()
