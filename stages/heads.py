"""READ, pooling and output layer: what is trained, and its loss."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.depths import Depths
from stages.read import READ
from store.errors import Refused

POOLS = {"all": ("attention", "mean", "first", "last"), "first": ("first",), "last": ("last",), "mean": ("mean",)}
"""token rule of the cache -> the poolings that make sense of its rows; the first is the default"""


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


def check_pool(pool: str | None, tokens: str) -> str:
    """The pooling for a token rule, or its default. Raises Refused with those that the rule allows."""
    allowed = POOLS[tokens]
    if pool is not None and pool not in allowed:
        raise Refused(f"pool {pool!r} does not go with tokens={tokens}; it allows {', '.join(allowed)}")
    return pool or allowed[0]


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


class Head(nn.Module):
    """READ, pool, then dropout, linear D -> D, tanh, dropout, linear D -> K: a classifier, or with K = 1 a regressor."""

    offset: Tensor
    scale: Tensor

    def __init__(self, read: READ, pool: str, width: int, outputs: int, dropout: float, depths: Depths) -> None:
        """outputs: K; 1 makes a regressor, which predicts in the labels' unit by the offset and scale it was given."""
        super().__init__()
        self.read = read
        self.pool = Pool(pool, width)
        self.output = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, outputs)
        )
        self.depths = depths
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def regression(self) -> bool:
        """Whether this is a regressor."""
        return cast(nn.Linear, self.output[-1]).out_features == 1

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, K), or predictions (B, 1) in the labels' unit."""
        pooled = self.pool(self.read(batch.rows, self.depths), batch)  # (B, D)
        return cast(Tensor, self.output(pooled) * self.scale + self.offset)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy, or mean squared error in units of the labels' variance."""
        out = self(batch)
        if self.regression:
            return F.mse_loss(out[:, 0] / self.scale, batch.labels / self.scale)
        return F.cross_entropy(out, batch.labels)

    def standardise(self, labels: Any) -> None:
        """Take the offset and scale of a regressor from its training labels (n,)."""
        values = torch.as_tensor(labels, dtype=torch.float32)
        self.offset.copy_(values.mean())
        self.scale.copy_(values.std().clamp_min(1e-6) if len(values) > 1 else torch.ones(()))
