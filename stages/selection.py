"""Which tokens are kept, always by the mask, so that padding on either side ends here."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from store.errors import Refused

States = list[Tensor]
"""S tensors (B, T, D)"""

Rows = Iterator[Tensor]
"""S tensors (r, D), one after the other, so that no more than one of them is in memory"""


def _at(states: States, index: Tensor) -> Rows:
    """Rows at flat positions (r,) of (B, T)."""
    return (state.flatten(0, 1).index_select(0, index) for state in states)


def _all(states: States, mask: Tensor, _: Tensor) -> Rows:
    return _at(states, mask.flatten().nonzero().squeeze(1))


def _first(states: States, mask: Tensor, _: Tensor) -> Rows:
    tokens = mask.shape[1]
    return _at(states, mask.int().argmax(1) + tokens * torch.arange(len(mask), device=mask.device))


def _last(states: States, mask: Tensor, _: Tensor) -> Rows:
    tokens = mask.shape[1]
    last = tokens - 1 - mask.int().flip(1).argmax(1)
    return _at(states, last + tokens * torch.arange(len(mask), device=mask.device))


def _mean(states: States, _: Tensor, content: Tensor) -> Rows:
    share = (content.float() / content.sum(1, keepdim=True)).unsqueeze(1)  # (B, 1, T)
    return ((share @ state.float()).squeeze(1) for state in states)


def _first_and_mean(states: States, mask: Tensor, content: Tensor) -> Rows:
    both = zip(_first(states, mask, content), _mean(states, mask, content), strict=True)
    return (torch.stack(pair, 1).flatten(0, 1) for pair in both)  # (2B, D)


class Rule(NamedTuple):
    """One way to keep tokens."""

    select: Callable[[States, Tensor, Tensor], Rows]
    """S × (B, T, D), which positions are real (B, T), which of them a mean is over (B, T) -> S × (r, D)"""
    rows: int | None
    """of an example; None: as many as it has tokens"""


TOKENS = {
    "all": Rule(_all, None), "first": Rule(_first, 1), "last": Rule(_last, 1), "mean": Rule(_mean, 1),
    "first+mean": Rule(_first_and_mean, 2),
}  # fmt: skip


def check(rule: str) -> str:
    """The rule itself, or Refused with the known ones."""
    if rule not in TOKENS:
        raise Refused(f"unknown token rule {rule!r}; known: {', '.join(TOKENS)}")
    return rule


def select(states: States, mask: Tensor, rule: str, prefix: int = 0) -> Rows:
    """Keep rows: states S × (B, T, D), mask (B, T) bool -> S × (r, D), by example, then by position.

    prefix: positions at the beginning that a mean leaves out: an image's class token and registers.
    """
    content = mask & (torch.arange(mask.shape[1], device=mask.device) >= prefix) if prefix else mask
    return TOKENS[check(rule)].select(states, mask, content)


def kept(lengths: np.ndarray, rule: str) -> np.ndarray:
    """How many rows each example keeps, (N,), given its tokens (N,)."""
    rows = TOKENS[check(rule)].rows
    return lengths if rows is None else np.full_like(lengths, rows)
