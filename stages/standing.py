"""Where the training of some heads stands between two epochs: numbers and tensors, enough to go on to the same weights."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Standing(NamedTuple):
    """Between two epochs."""

    numbers: dict[str, Any]
    """what JSON can say"""
    tensors: dict[str, Tensor]


class Keeper(Protocol):
    """Where a standing is kept, should the process be killed."""

    def load(self) -> Standing | None:
        """What was kept; None where nothing was."""

    def due(self) -> bool:
        """Whether it is time to keep one again."""

    def save(self, standing: Standing) -> None:
        """Keep it, in place of the one before."""


class Nowhere:
    """Keeps nothing."""

    def load(self) -> None:
        """Nothing."""

    def due(self) -> bool:
        """Never."""
        return False

    def save(self, standing: Standing) -> None:
        """Not called."""


def of_stack(stack: Any, optimiser: Any, name: str) -> dict[str, Tensor]:
    """Parameters, moments, steps and generators of a stack's heads, under a name."""
    found = {f"{name}.rows": stack.rows, f"{name}.means": optimiser.moments[0], f"{name}.squares": optimiser.moments[1]}
    found[f"{name}.steps"] = torch.stack(optimiser.steps)
    found[f"{name}.generators"] = torch.stack([generator.get_state() for generator in stack.masks.generators])
    return {path: value.detach().cpu().contiguous() for path, value in found.items()}


def to_stack(stack: Any, optimiser: Any, name: str, tensors: dict[str, Tensor]) -> None:
    """The reverse, on a stack and an optimiser of the same heads."""
    with torch.no_grad():
        stack.rows.copy_(tensors[f"{name}.rows"])
        for moment, kept in zip(optimiser.moments, ("means", "squares"), strict=True):
            moment.copy_(tensors[f"{name}.{kept}"])
        for step, value in zip(optimiser.steps, tensors[f"{name}.steps"], strict=True):
            step.copy_(value)
    for generator, state in zip(stack.masks.generators, tensors[f"{name}.generators"], strict=True):
        generator.set_state(state.clone())  # which reads it from the beginning of its storage
