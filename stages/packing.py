"""The torch twins of `store.codecs`, for the device: states to stored numbers and back, bit for bit the same."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from store.errors import Refused

Packed = dict[str, Tensor]


class Twin(NamedTuple):
    """A codec on the device."""

    pack: Callable[[Tensor], Packed]
    """(r, S, D) float32 -> arrays"""
    unpack: Callable[[Packed], Tensor]
    """arrays -> (r, S, D) float32"""


def _finite(rows: Tensor) -> Tensor:
    if not torch.isfinite(rows).all():
        raise Refused("a state is not finite")
    return rows


TWINS: dict[str, Twin] = {
    "fp32": Twin(lambda rows: {"values": _finite(rows)}, lambda packed: packed["values"]),
    "bf16": Twin(
        # finite after rounding: the largest floats round to infinity
        lambda rows: {"values": _finite(rows.to(torch.bfloat16)).view(torch.uint16)},
        lambda packed: packed["values"].view(torch.bfloat16).float(),
    ),
}


def pack(rows: Tensor, codec: str) -> Packed:
    """Encode rows (r, S, D). Raises Refused where a state is NaN or infinite, or becomes so."""
    return TWINS[codec].pack(rows)


def unpack(packed: Packed, codec: str) -> Tensor:
    """Decode rows: (r, S, D) float32."""
    return TWINS[codec].unpack(packed)
