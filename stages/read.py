"""READ: a small recurrent network over the depths of a frozen backbone (Nguyen, Wang, Li, Wu, arXiv 2305.15348).

For one row, h_1 … h_L are the outputs of the backbone's blocks, h_0 the embedding output, h_final the last state:

    u_l   = s_in · RMSNorm(h_l)             one norm for all l, weight only, eps 1e-6
    r_l   = Cell(u_l, r_{l-1})              l = 1 … L, over depth: tokens never mix
    a     = mean_l r_l   or   r_L
    h'    = h_final + s_out · σ · (W_o a + b_o)       σ = 1 (D,), or the spread of h_final over a sample that trains

Of an encoder-decoder the decoder's one row also hears, at each block, what the encoder's READ made of the tokens that the
frozen decoder attends to there (A_l: its cross-attention, averaged over heads; r^e: the encoder's READ after its last block):

    ψ_l   = Σ_β A_l[β] · r^e_β
    r_l   = Cell([RMSNorm(h_l) ; ψ_l], r_{l-1})
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from stages.depths import Depths
from store.errors import Refused


class MinGRU(nn.Module):
    """minGRU (Feng et al., arXiv 2410.01201): r_l = (1 − g_l) r_{l−1} + g_l c_l, g_l = sigmoid(W_g u_l), c_l = W_c u_l.

    Its gates depend on the input alone, so that those of all layers are one matrix product. 2HD parameters a direction.
    """

    def __init__(self, width: int, hidden: int, batch_first: bool = True, bidirectional: bool = False) -> None:
        """As torch's cells: width: of the input. hidden: H."""
        super().__init__()
        assert batch_first
        self.directions = 2 if bidirectional else 1
        self.gate = nn.Linear(width, self.directions * hidden, bias=False)
        self.candidate = nn.Linear(width, self.directions * hidden, bias=False)

    def forward(self, inputs: Tensor, initial: Tensor | None = None) -> tuple[Tensor, None]:
        """inputs: (r, L, width), initial: (directions, r, H) -> (r, L, directions · H)."""
        gates = torch.sigmoid(self.gate(inputs)).chunk(self.directions, -1)
        candidates = self.candidate(inputs).chunk(self.directions, -1)
        outputs = []
        for direction, (gate, candidate) in enumerate(zip(gates, candidates, strict=True)):
            state = torch.zeros_like(candidate[:, 0]) if initial is None else initial[direction]  # (r, H)
            found: list[Tensor] = []
            for layer in range(inputs.shape[1])[:: -1 if direction else 1]:
                state = torch.lerp(state, candidate[:, layer], gate[:, layer])
                found.append(state)
            outputs.append(torch.stack(found[:: -1 if direction else 1], 1))
        return torch.cat(outputs, -1), None


CELLS: dict[str, Callable[..., nn.Module]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM, "mingru": MinGRU}
"""name -> cell of one layer: torch's own, `rnn` is tanh; and minGRU"""


class Correction(nn.Linear):
    """unit · (W_o a + b_o): what is added to h_final. Zero at first, so that training begins at the backbone's own state."""

    unit: Tensor

    def __init__(self, inner: int, width: int) -> None:
        """inner: of a. width: D."""
        super().__init__(inner, width)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("unit", torch.ones(width))

    def forward(self, a: Tensor) -> Tensor:
        """a: (r, inner) -> (r, D)."""
        return self.unit * super().forward(a)


class Recurrence(nn.Module):
    """RMSNorm and a cell over depth: rows (r, S, D) -> its states (r, L, H), or (r, L, 2H) in both directions."""

    def __init__(
        self,
        width: int,
        hidden: int = 256,
        cell: str = "gru",
        initial: Literal["zero", "embedding"] = "zero",
        scale_in: float = 1.0,
        bidirectional: bool = False,
        beside: int = 0,
    ) -> None:
        """
        width: D. hidden: H. initial: r_0 = 0, or W_0 RMSNorm(h_0) + b_0. scale_in: s_in. bidirectional: a second cell
        runs from the last block to the first. beside: the width of ψ.

        Raises Refused for an unknown cell, with the known ones.
        """
        super().__init__()
        if cell not in CELLS:
            raise Refused(f"unknown cell {cell!r}; known: {', '.join(CELLS)}")
        self.hidden, self.directions = hidden, 2 if bidirectional else 1
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.cell = CELLS[cell](width + beside, hidden, batch_first=True, bidirectional=bidirectional)
        self.start = nn.Linear(width, hidden) if initial == "embedding" else None
        self.scale_in = scale_in

    @property
    def outputs(self) -> int:
        """The width of its states."""
        return self.hidden * self.directions

    def states(self, rows: Tensor, depths: Depths, beside: Tensor | None = None) -> Tensor:
        """rows: (r, S, D), beside: ψ (r, L, width of ψ) -> (r, L, H)."""
        inputs = self.scale_in * self.norm(rows[:, depths.blocks])  # (r, L, D)
        if beside is not None:
            inputs = torch.cat([inputs, beside], 2)
        return self._run(inputs, self._initial(rows, depths))

    def _run(self, inputs: Tensor, initial: Tensor | tuple[Tensor, Tensor] | None) -> Tensor:
        return cast(Tensor, self.cell(inputs, initial)[0])

    def last(self, states: Tensor) -> Tensor:
        """r_L (r, H); in both directions each one's own last state."""
        forth, *back = torch.split(states, self.hidden, 2)
        return torch.cat([forth[:, -1], *(state[:, 0] for state in back)], 1)

    def _initial(self, rows: Tensor, depths: Depths) -> Tensor | tuple[Tensor, Tensor] | None:
        if self.start is None:
            return None
        if depths.embedding is None:
            raise Refused("initial state from the embedding: the cache has no `embedding` state; extract with LAYERS=0,…")
        first = self.start(self.norm(rows[:, depths.embedding])).expand(self.directions, -1, -1).contiguous()  # (1 or 2, r, H)
        return (first, torch.zeros_like(first)) if isinstance(self.cell, nn.LSTM) else first


class READ(Recurrence):
    """READ(D, H): rows (r, S, D) -> corrected final states (r, D).

    Trainable parameters: g(HD + H² + 2H) + (HD + D) + D with g = 1, 3, 4 for rnn, gru, lstm; 2HD + (HD + D) + D for
    mingru; with `initial="embedding"` HD + H more.
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
        bidirectional: bool = False,
        beside: int = 0,
    ) -> None:
        """As `Recurrence`; aggregate: a over depth. scale_out: s_out."""
        super().__init__(width, hidden, cell, initial, scale_in, bidirectional, beside)
        self.out = Correction(self.outputs, width)
        self.aggregate = aggregate
        self.scale_out = scale_out

    def forward(self, rows: Tensor, depths: Depths, beside: Tensor | None = None) -> Tensor:
        """rows: (r, S, D), beside: ψ (r, L, width of ψ) -> h' (r, D)."""
        states = self.states(rows, depths, beside)  # (r, L, H)
        a = states.mean(1) if self.aggregate == "mean" else self.last(states)  # (r, H)
        return cast(Tensor, rows[:, depths.final] + self.scale_out * self.out(a))  # (r, D)

    def contributions(self, rows: Tensor, depths: Depths, beside: Tensor | None = None) -> Tensor:
        """What each block adds to the correction: (r, L, D), whose sum over L is the correction but for b_o and r_0's part.

        A block's part is what changes in the state there, r_l − r_{l−1}, as it goes into a: it stays in the states of all later
        blocks, so that the mean over depth takes (L − l + 1) / L of it, and the last state takes all.
        """
        states = self.states(rows, depths, beside)
        first = self._initial(rows, depths)
        start = first[0] if isinstance(first, tuple) else first  # (directions, r, H) or None
        parts, count = [], states.shape[1]
        left = torch.arange(count, 0, -1, device=rows.device)[:, None] / count if self.aggregate == "mean" else 1.0
        for direction, mine in enumerate(torch.split(states, self.hidden, 2)):
            mine = mine.flip(1) if direction else mine
            before = torch.zeros_like(mine[:, :1]) if start is None else start[direction][:, None]
            part = mine.diff(dim=1, prepend=before) * left
            parts.append(part.flip(1) if direction else part)
        return self.scale_out * self.out.unit * (torch.cat(parts, 2) @ self.out.weight.T)


class Joined(nn.Module):
    """The READ of an encoder-decoder: the encoder's recurrence, ψ by the frozen cross-attention, the decoder's READ."""

    def __init__(self, encoder: Recurrence, decoder: READ, encoder_depths: Depths) -> None:
        super().__init__()
        self.encoder, self.decoder, self.encoder_depths = encoder, decoder, encoder_depths

    def forward(self, rows: Tensor, attention: Tensor, example: Tensor, decoder: Tensor, depths: Depths) -> Tensor:
        """Corrected final states of the decoder (B, D).

        rows: (r, S, D) of the encoder. attention: (r, L) of every cached decoder block. example: (r,) to which of the B
        examples a row belongs. decoder: (B, S, D). depths: the decoder's.
        """
        return cast(Tensor, self.decoder(decoder, depths, self.psi(rows, attention, example, decoder, depths)))

    def psi(self, rows: Tensor, attention: Tensor, example: Tensor, decoder: Tensor, depths: Depths) -> Tensor:
        """ψ (B, L, H): what each example's decoder row hears at each block. Arguments as above."""
        heard = self.encoder.last(self.encoder.states(rows, self.encoder_depths))  # (r, H)
        columns = [block - (0 if depths.embedding is None else depths.embedding + 1) for block in depths.blocks]
        empty = heard.new_zeros(len(decoder), heard.shape[1])
        # block by block: never (r, L, H) at once
        return torch.stack([empty.index_add(0, example, attention[:, column, None] * heard) for column in columns], 1)
