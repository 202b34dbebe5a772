"""READ: a small recurrent network over the depths of a frozen backbone (Nguyen, Wang, Li, Wu, arXiv 2305.15348).

For one row, h_1 … h_L are the outputs of the backbone's blocks, h_0 the embedding output, h_final the last state:

    u_l   = s_in · RMSNorm(h_l)             one norm for all l, weight only, eps 1e-6
    r_l   = Cell(u_l, r_{l-1})              l = 1 … L, over depth: tokens never mix
    a     = mean_l r_l   or   r_L
    h'    = h_final + s_out · (W_o a + b_o)
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from stages.depths import Depths
from store.errors import Refused

CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
"""name -> torch's own cell, one layer; `rnn` is tanh"""


class READ(nn.Module):
    """READ(D, H): rows (r, S, D) -> corrected final states (r, D).

    Trainable parameters: g(HD + H² + 2H) + (HD + D) + D with g = 1, 3, 4 for rnn, gru, lstm; with `initial="embedding"`
    HD + H more. W_o and b_o begin at zero, so that training begins at the backbone's own state.
    """

    def __init__(
        self,
        width: int,
        hidden: int = 256,
        cell: str = "gru",
        aggregate: Literal["mean", "last"] = "mean",
        initial: Literal["zero", "embedding"] = "zero",
        scale_in: float = 1.0,
        scale_out: float = 1.0,
    ) -> None:
        """
        width: D. hidden: H. initial: r_0 = 0, or W_0 RMSNorm(h_0) + b_0. scale_in, scale_out: s_in, s_out.

        Raises Refused for an unknown cell, with the known ones.
        """
        super().__init__()
        if cell not in CELLS:
            raise Refused(f"unknown cell {cell!r}; known: {', '.join(CELLS)}")
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.cell = CELLS[cell](width, hidden, batch_first=True)
        self.out = nn.Linear(hidden, width)
        self.start = nn.Linear(width, hidden) if initial == "embedding" else None
        self.aggregate = aggregate
        self.scale_in, self.scale_out = scale_in, scale_out
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, rows: Tensor, depths: Depths) -> Tensor:
        """rows: (r, S, D) -> h' (r, D)."""
        inputs = self.scale_in * self.norm(rows[:, depths.blocks])  # (r, L, D)
        outputs = self.cell(inputs, self._initial(rows, depths))[0]  # (r, L, H)
        a = outputs.mean(1) if self.aggregate == "mean" else outputs[:, -1]  # (r, H)
        return cast(Tensor, rows[:, depths.final] + self.scale_out * self.out(a))  # (r, D)

    def _initial(self, rows: Tensor, depths: Depths) -> Tensor | tuple[Tensor, Tensor] | None:
        if self.start is None:
            return None
        if depths.embedding is None:
            raise Refused("initial state from the embedding: the cache has no `embedding` state; extract with LAYERS=0,…")
        first = self.start(self.norm(rows[:, depths.embedding])).unsqueeze(0)  # (1, r, H)
        return (first, torch.zeros_like(first)) if isinstance(self.cell, nn.LSTM) else first
