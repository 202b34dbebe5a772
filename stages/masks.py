"""Dropout of M heads, each by its own rate and from its own generator: what a head drops does not depend on its neighbours."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stages.products import room_like

APART = 0x5EED_D509
"""what tells the seed of dropout from that of the weights"""


class _Masked(Function):
    """values · mask: on its own, for the memory that both results take."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.mul(values, mask, out=room_like(mask))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.mul(grad, mask, out=room_like(mask)), None


class Masks:
    """Draws masks for (M, …) values, and multiplies."""

    def __init__(self, rates: Sequence[float], seeds: Sequence[int], device: torch.device) -> None:
        """rates: the share that is dropped, to 1/65,536."""
        self.rates = list(rates)
        self.generators = [torch.Generator(device).manual_seed(seed ^ APART) for seed in seeds]
        self._settle()

    def _settle(self) -> None:
        device = self.generators[0].device
        kept = [max(1, round((1 - rate) * 65536)) for rate in self.rates]
        self._most = torch.tensor([count - 32769 for count in kept], dtype=torch.int16, device=device)[:, None]
        self._gain = torch.tensor([1 / (1 - rate) for rate in self.rates], device=device)[:, None]

    def keep(self, which: Sequence[int]) -> None:
        """Let go of all heads but these."""
        self.rates = [self.rates[head] for head in which]
        self.generators = [self.generators[head] for head in which]
        self._settle()

    def __call__(self, values: Tensor) -> Tensor:
        """values: (M, …) -> the same, some of it 0 and the rest so much larger."""
        if not any(self.rates):
            return values
        each = values[0].numel()
        words = torch.empty(len(values), -(-each // 4), dtype=torch.int64, device=values.device)
        for row, generator in zip(words.unbind(), self.generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        mask = room_like(values).flatten(1)
        torch.le(words.view(torch.int16)[:, :each], self._most, out=mask).mul_(self._gain)
        return cast(Tensor, _Masked.apply(values, mask.view_as(values)))
