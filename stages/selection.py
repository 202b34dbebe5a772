"""Which tokens are kept, always by the mask, so that padding on either side ends here."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from store.errors import Refused

States = list[Tensor]
"""S tensors (B, T, D)"""


def _at(states: States, index: Tensor) -> Tensor:
    """Rows at flat positions (r,) of (B, T): (r, S, D)."""
    return torch.stack([state.flatten(0, 1).index_select(0, index) for state in states], 1)


def _all(states: States, mask: Tensor) -> Tensor:
    return _at(states, mask.flatten().nonzero().squeeze(1))  # (r, S, D)


def _first(states: States, mask: Tensor) -> Tensor:
    tokens = mask.shape[1]
    return _at(states, mask.int().argmax(1) + tokens * torch.arange(len(mask), device=mask.device))  # (B, S, D)


def _last(states: States, mask: Tensor) -> Tensor:
    tokens = mask.shape[1]
    last = tokens - 1 - mask.int().flip(1).argmax(1)
    return _at(states, last + tokens * torch.arange(len(mask), device=mask.device))  # (B, S, D)


def _mean(states: States, mask: Tensor) -> Tensor:
    share = (mask.float() / mask.sum(1, keepdim=True)).unsqueeze(1)  # (B, 1, T)
    return torch.cat([share @ state.float() for state in states], 1)  # (B, S, D)


TOKENS: dict[str, Callable[[States, Tensor], Tensor]] = {"all": _all, "first": _first, "last": _last, "mean": _mean}


def check(rule: str) -> str:
    """The rule itself, or Refused with the known ones."""
    if rule not in TOKENS:
        raise Refused(f"unknown token rule {rule!r}; known: {', '.join(TOKENS)}")
    return rule


def select(states: States, mask: Tensor, rule: str) -> Tensor:
    """Keep rows: states S × (B, T, D), mask (B, T) bool -> (r, S, D), by example, then by position."""
    return TOKENS[check(rule)](states, mask)


def kept(lengths: np.ndarray, rule: str) -> np.ndarray:
    """How many rows each example keeps, (N,), given its tokens (N,)."""
    return lengths if check(rule) == "all" else np.ones_like(lengths)
