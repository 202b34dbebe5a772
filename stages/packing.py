"""The torch twins of `store.codecs`, for the device: states to stored numbers and back, bit for bit the same."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from store.codecs import GROUP, ROTATION, STEP, TINY, groups, parse

Packed = dict[str, Tensor]

Room = Callable[[torch.Size], Tensor]
"""gives a float32 tensor on the device to decode into, its numbers anything"""

MOST = 1024.0
"""times its scale a state is less than this, as int8 and as int4: what is finite as stored is finite when it is decoded"""


class Twin(NamedTuple):
    """A codec on the device."""

    pack: Callable[[Tensor], Packed]
    """(r, S, D) float32 -> arrays"""
    unpack: Callable[[Packed, int, Room], Tensor]
    """arrays and D -> (r, S, D) float32"""


def _int8_pack(rows: Tensor) -> Packed:
    # by a tensor: by a number a GPU multiplies with the inverse, which is another last bit
    scales = (rows.abs().amax(2, keepdim=True) / rows.new_tensor(127.0)).clamp_min(float(TINY))  # (r, S, 1)
    return {"values": (rows / scales).round().to(torch.int8), "scales": scales}


def _rotate(rows: Tensor) -> Tensor:
    """Hadamard's matrix on the last axis, in the order of `store.codecs`."""
    shape, span = rows.shape, 1
    while span < GROUP:
        one, two = rows.reshape(*shape[:-1], GROUP // (2 * span), 2, span).unbind(-2)
        rows = torch.stack([one + two, one - two], -2).reshape(shape)
        span *= 2
    return rows * float(ROTATION)


def _int4_pack(rows: Tensor) -> Packed:
    width = rows.shape[2]
    filled = F.pad(rows, (0, groups(width) * GROUP - width))
    turned = _rotate(filled.reshape(*rows.shape[:2], -1, GROUP))  # (r, S, groups, GROUP)
    scales = (turned.abs().amax(3) * float(STEP)).clamp_min(float(TINY)).to(torch.bfloat16)
    steps = (turned / scales.float()[..., None]).floor().clamp(-8, 7)
    low, high = (steps + 8).to(torch.uint8).reshape(*steps.shape[:3], -1, 2).unbind(-1)
    return {"values": (low | (high << 4)).flatten(2), "scales": scales.view(torch.uint16)}


def _int4_unpack(packed: Packed, width: int, _: Room) -> Tensor:
    values, scales = packed["values"], packed["scales"].view(torch.bfloat16).float()  # (r, S, groups)
    nibbles = torch.stack([values & 15, values >> 4], -1).reshape(*scales.shape, GROUP)
    return _rotate((nibbles.float() - 7.5) * scales[..., None]).flatten(2)[..., :width]


TWINS: dict[str, Twin] = {
    "fp32": Twin(lambda rows: {"values": rows}, lambda packed, *_: packed["values"]),
    "bf16": Twin(
        lambda rows: {"values": rows.to(torch.bfloat16).view(torch.uint16)},
        lambda packed, _, room: room(packed["values"].shape).copy_(packed["values"].view(torch.bfloat16)),
    ),
    "int8": Twin(
        _int8_pack, lambda packed, _, room: torch.mul(packed["values"], packed["scales"], out=room(packed["values"].shape))
    ),
    "int4": Twin(_int4_pack, _int4_unpack),
}


def pack(rows: Tensor, codec: str) -> Packed:
    """Encode rows (r, S, D)."""
    return TWINS[parse(codec)[0]].pack(rows)


def pack_each(rows: Iterable[Tensor], codec: str) -> Packed:
    """Encode rows that come a state at a time, S × (r, D): the same arrays, and float32 of one state at a time only."""
    parts = [pack(state.unsqueeze(1), codec) for state in rows]
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def finite(packed: Packed) -> Tensor:
    """Whether every state was finite and still is, as stored: a bool () on the device, so that nobody waits for it here.

    Seen in the scales where there are any, since the largest magnitude is in them: NaN and infinity go through, and so does
    what a rotation adds up to infinity. Where there are none, in the values: the largest floats round to infinity.
    """
    told = packed.get("scales", packed["values"])
    least, most = torch.aminmax(told.view(torch.bfloat16) if told.dtype == torch.uint16 else told)
    times = MOST if "scales" in packed else 1
    return torch.isfinite(least.float()) & torch.isfinite(most.float() * times)


def unpack(packed: Packed, codec: str, width: int, room: Room | None = None) -> Tensor:
    """Decode rows: (r, S, D) float32. width: D. room: gives the memory for them; new memory where left out."""
    new = functools.partial(torch.empty, dtype=torch.float32, device=packed["values"].device)
    return TWINS[parse(codec)[0]].unpack(packed, width, room or new)
