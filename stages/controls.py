"""What READ is compared with: the same head on other readings of the same states, of the same trainable size where it has any.

Each is called as READ is: rows (r, S, D) -> (r, D). h_final is the state that READ would correct.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.depths import Depths
from stages.read import READ, Correction


class Final(nn.Module):
    """h_final as it is: the head alone."""

    def forward(self, rows: Tensor, depths: Depths) -> Tensor:
        """rows: (r, S, D) -> (r, D)."""
        return rows[:, depths.final]


class Mean(nn.Module):
    """mean_l RMSNorm(h_l): normed as READ's inputs are, or the last blocks of a pre-norm model would drown the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, rows: Tensor, depths: Depths) -> Tensor:
        """rows: (r, S, D) -> (r, D)."""
        mixed: Tensor = self.norm(rows[:, depths.blocks]).mean(1)
        return mixed


class ScalarMix(nn.Module):
    """γ · Σ_l softmax(w)_l RMSNorm(h_l) over the embedding and all blocks (Peters et al., arXiv 1802.05365)."""

    def __init__(self, width: int, depths: Depths) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.weights = nn.Parameter(torch.zeros(len(depths.every)))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, rows: Tensor, depths: Depths) -> Tensor:
        """rows: (r, S, D) -> (r, D)."""
        return self.gamma * torch.einsum("s,rsd->rd", self.weights.softmax(0), self.norm(rows[:, depths.every]))


class LayerAttention(nn.Module):
    """h_final + σ · W_o Σ_l α_l V RMSNorm(h_l), α = softmax_l(q · tanh(K RMSNorm(h_l))): attention in place of recurrence."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.key, self.value = nn.Linear(width, inner), nn.Linear(width, inner)
        self.query = nn.Parameter(torch.zeros(inner))
        self.out = Correction(inner, width)

    def forward(self, rows: Tensor, depths: Depths) -> Tensor:
        """rows: (r, S, D) -> (r, D)."""
        inputs = self.norm(rows[:, depths.blocks])  # (r, L, D)
        weights = (torch.tanh(self.key(inputs)) @ self.query).softmax(1)  # (r, L)
        mixed: Tensor = self.out(torch.einsum("rl,rlm->rm", weights, self.value(inputs)))
        return rows[:, depths.final] + mixed


class Concatenated(nn.Module):
    """h_final + σ · W_2 tanh(W_1 [RMSNorm(h_1) ; … ; RMSNorm(h_L)]): every layer at once, no order."""

    def __init__(self, width: int, inner: int, depths: Depths) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.first = nn.Linear(width * len(depths.blocks), inner)
        self.out = Correction(inner, width)

    def forward(self, rows: Tensor, depths: Depths) -> Tensor:
        """rows: (r, S, D) -> (r, D)."""
        mixed: Tensor = self.out(torch.tanh(self.first(self.norm(rows[:, depths.blocks]).flatten(1))))
        return rows[:, depths.final] + mixed


class Reset(READ):
    """READ whose state begins anew at every block: the same parameters, no recurrence."""

    def _run(self, inputs: Tensor, initial: Any) -> Tensor:
        alone: Tensor = self.cell(inputs.flatten(0, 1).unsqueeze(1), _repeated(initial, inputs.shape[1]))[0]  # (r · L, 1, H)
        return alone.reshape(*inputs.shape[:2], -1)


CONTROLS: dict[str, str] = {
    "read": "READ",
    "reset": "READ, its state reset at every layer",
    "shuffled": "READ, layers in a fixed shuffled order",
    "final": "final state alone",
    "mean": "mean of layers",
    "scalar": "scalar mix of layers",
    "attention": "attention over layers",
    "concatenated": "concatenation + MLP",
}
"""name -> what it is in a table"""


def build(control: str, width: int, depths: Depths, size: int) -> nn.Module:
    """A control that is not a READ. size: trainable parameters that it may have, those of READ."""
    made: dict[str, Callable[[], nn.Module]] = {
        "final": Final,
        "mean": lambda: Mean(width),
        "scalar": lambda: ScalarMix(width, depths),
        # m(3D + 3) + 2D, and m(LD + D + 1) + 2D parameters
        "attention": lambda: LayerAttention(width, max(1, (size - 2 * width) // (3 * width + 3))),
        "concatenated": lambda: Concatenated(width, max(1, (size - 2 * width) // (width * (len(depths.blocks) + 1) + 1)), depths),
    }
    return made[control]()


def _repeated(initial: Any, times: int) -> Any:
    """A first state (1, r, H) for every block of its row: (1, r · L, H)."""
    if initial is None:
        return None
    if isinstance(initial, tuple):
        return tuple(_repeated(state, times) for state in initial)
    return initial.repeat_interleave(times, 1)
