"""READ, pooling and output layer: what is trained, and its loss."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.depths import Depths
from stages.read import Correction

SMALLEST_SPREAD = 0.01
"""of a dimension of the final state, as a share of their mean"""


class Batch(NamedTuple):
    """The rows of B examples, one after the other, no padding."""

    rows: Tensor
    """(r, S, D) float32"""
    example: Tensor
    """(r,) int64: to which of the B examples a row belongs, ascending"""
    start: Tensor
    """(B,) int64: an example's first row in this batch"""
    labels: Tensor
    """(B,) int64 classes, or float32; -1 or NaN where there is none"""
    place: Tensor
    """(B,) int64, on the CPU: the examples' places in the cache"""
    decoder: Tensor | None = None
    """(B, S, D) float32: of an encoder-decoder whose encoder is read too, the decoder's one row an example"""
    attention: Tensor | None = None
    """(r, L) float32: what that row takes of each encoder row at each of its blocks"""


class Pool(nn.Module):
    """Corrected rows (r, D) to one vector an example (B, D)."""

    def __init__(self, kind: str, width: int) -> None:
        """kind: first | last | mean | attention; attention has a learned query of `width` numbers."""
        super().__init__()
        self.kind = kind
        self.query = nn.Parameter(torch.zeros(width)) if kind == "attention" else None

    def forward(self, rows: Tensor, batch: Batch) -> Tensor:
        """rows: (r, D) -> (B, D)."""
        if self.kind == "first" or len(rows) == len(batch.start):
            return rows if len(rows) == len(batch.start) else rows[batch.start]
        count = len(batch.start)
        lengths = torch.bincount(batch.example, minlength=count)
        if self.kind == "last":
            return rows[batch.start + lengths - 1]
        if self.query is None:
            weights = (1 / lengths)[batch.example]
        else:
            scores = torch.tanh(rows) @ self.query  # (r,)
            top = scores.new_full((count,), -torch.inf).scatter_reduce(0, batch.example, scores.detach(), "amax")
            power = torch.exp(scores - top[batch.example])
            total = power.new_zeros(count).index_add(0, batch.example, power)
            weights = power / total[batch.example]  # softmax over an example's rows
        return rows.new_zeros(count, rows.shape[1]).index_add(0, batch.example, rows * weights[:, None])


def classifier(width: int, outputs: int, dropout: float) -> nn.Module:
    """Dropout, linear D -> D, tanh, dropout, linear D -> K; with K = 1 a regressor."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, outputs))


class Verbalizer(nn.Module):
    """The logits of the label words: h' · E[words], their rows of the frozen output embedding. Nothing is trained in it."""

    words: Tensor

    def __init__(self, words: Tensor) -> None:
        """words: (K, D)."""
        super().__init__()
        self.register_buffer("words", words)

    def forward(self, states: Tensor) -> Tensor:
        """states: (B, D) -> (B, K)."""
        return states @ self.words.T


class Head(nn.Module):
    """READ (or a control in its place); (h' − centre) / spread, 0 and 1 until they are taken; pool; output layer."""

    offset: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, read: nn.Module, pool: str, width: int, output: nn.Module, outputs: int, depths: Depths) -> None:
        """outputs: K; 1 makes a regressor, which predicts in the labels' unit by the offset and scale it was given."""
        super().__init__()
        self.read = read
        self.pool = Pool(pool, width)
        self.output = output
        self.depths = depths
        self.regression = outputs == 1
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, K), or predictions (B, 1) in the labels' unit."""
        states = (self._corrected(batch) - self.centre) / self.spread
        pooled = self.pool(states, batch) if batch.decoder is None else states  # (B, D)
        return cast(Tensor, self.output(pooled) * self.scale + self.offset)

    def _corrected(self, batch: Batch) -> Tensor:
        """h' (r, D); of an encoder-decoder (B, D)."""
        if batch.decoder is None:
            return cast(Tensor, self.read(batch.rows, self.depths))
        return cast(Tensor, self.read(batch.rows, batch.attention, batch.example, batch.decoder, self.depths))

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy, or mean squared error in units of the labels' variance."""
        out = self(batch)
        if self.regression:
            return F.mse_loss(out[:, 0] / self.scale, batch.labels / self.scale)
        return F.cross_entropy(out, batch.labels)

    @torch.no_grad()
    def standardise_states(self, batches: Iterable[Batch]) -> None:
        """Take centre and spread of what the output layer would read without a correction, and make the spread its unit.

        Final states of one backbone spread five times as much as those of another, around offsets several times that: one
        learning rate does for all only where the head's inputs are alike. What hardly moves is not magnified beyond measure.
        """
        states = torch.cat([self._plain(batch) for batch in batches])  # (n, D)
        spread = states.std(0, correction=0)
        self.centre.copy_(states.mean(0))
        self.spread.copy_(spread.clamp_min(SMALLEST_SPREAD * spread.mean()) if spread.any() else torch.ones_like(spread))
        for module in self.read.modules():
            if isinstance(module, Correction):
                module.unit.copy_(self.spread)

    def _plain(self, batch: Batch) -> Tensor:
        """(B, D), pooled: h_final for what corrects it, and of the others what they give untrained."""
        if not any(isinstance(module, Correction) for module in self.read.modules()):
            return cast(Tensor, self.pool(self._corrected(batch), batch))
        if batch.decoder is not None:
            return batch.decoder[:, self.depths.final]
        return cast(Tensor, self.pool(batch.rows[:, self.depths.final], batch))

    def standardise_labels(self, labels: Any) -> None:
        """Take the offset and scale of a regressor from its training labels (n,)."""
        values = torch.as_tensor(labels, dtype=torch.float32)
        self.offset.copy_(values.mean())
        self.scale.copy_(values.std().clamp_min(1e-6) if len(values) > 1 else torch.ones(()))
