"""How states become the numbers on disk, and back: one entry a codec. numpy only; no files.

A codec turns states (r, S, D) in float32 into named arrays whose first two axes are row and state, and back.
`stages.packing` holds the torch twin of each, for the device; a test pins the two to each other, bit for bit.

    fp32    the states themselves
    bf16    the upper 16 bits of each, rounded
    int8    x ≈ q · s, with s = max|x| / 127 over a row's state
    int4    64 dimensions at a time: y = H x / 8 (H: Hadamard's matrix, which spreads an outlier over all of them),
            y ≈ (q + ½) · s, q in -8 … 7, s = 0.92 max|y| / 7.5 as a bfloat16; two q a byte. 0.92 trades a little clipping
            for finer steps: the least squared error on real states, where the rotation itself halves it
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from store.errors import Refused

Arrays = dict[str, np.ndarray]

GROUP = 64
"""dimensions that int4 rotates together and that share a scale; a power of 4, so that 1 / sqrt(GROUP) is exact"""
ROTATION = np.float32(1 / 8)
"""1 / sqrt(GROUP): makes Hadamard's matrix its own inverse"""
STEP = np.float32(0.92 / 7.5)
"""int4's scale, as a share of a group's largest magnitude"""
TINY = np.float32(2.0**-126)
"""the least scale: what is smaller has no inverse"""


class Stored(NamedTuple):
    """One array of a codec."""

    dtype: str
    """numpy dtype on disk, little-endian"""
    width: Callable[[int], int]
    """numbers a state, given D"""
    meaning: str
    """what the numbers are, for readers that know only Zarr"""


class Codec(NamedTuple):
    """One way to store states."""

    arrays: dict[str, Stored]
    """by name; each is (r, S, its width)"""
    encode: Callable[[np.ndarray], Arrays]
    """(r, S, D) float32 -> arrays"""
    decode: Callable[[Arrays, int], np.ndarray]
    """arrays and D -> (r, S, D) float32"""
    tolerance: float
    """how far a state may be off, relative to its norm, that other hardware or another batch computed: last bits of float32,
    which may move a number to the codec's next step"""

    def state_bytes(self, width: int) -> int:
        """What a state takes on disk, in bytes. width: D."""
        return sum(int(np.dtype(array.dtype).itemsize) * array.width(width) for array in self.arrays.values())


def groups(width: int) -> int:
    """How many groups D dimensions make; the last is filled up with zeros."""
    return -(-width // GROUP)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even, as the hardware does
    rounded: np.ndarray = (bits + half) >> np.uint32(16)
    return rounded.astype("<u2")


def _from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    values: np.ndarray = (bits.astype("<u4") << np.uint32(16)).view("<f4")
    return values.astype(np.float32, copy=False)


def _int8_encode(states: np.ndarray) -> Arrays:
    scales = np.maximum(np.abs(states).max(2, keepdims=True) / np.float32(127), TINY)  # (r, S, 1)
    return {"values": np.rint(states / scales).astype("i1"), "scales": scales.astype("<f4")}


def _rotate(groups: np.ndarray) -> np.ndarray:
    """Hadamard's matrix on the last axis, by sums and differences in a fixed order, so that the twin has the same bits."""
    shape, span = groups.shape, 1
    while span < GROUP:
        halves = groups.reshape(*shape[:-1], GROUP // (2 * span), 2, span)
        one, two = halves[..., 0, :], halves[..., 1, :]
        groups = np.stack([one + two, one - two], -2).reshape(shape)
        span *= 2
    return groups * ROTATION


def _int4_encode(states: np.ndarray) -> Arrays:
    rows, depths, width = states.shape
    filled = np.zeros((rows, depths, groups(width) * GROUP), np.float32)
    filled[..., :width] = states
    turned = _rotate(filled.reshape(rows, depths, -1, GROUP))
    scales = _bf16_bits(np.maximum(np.abs(turned).max(3) * STEP, TINY))  # (r, S, groups)
    steps = np.clip(np.floor(turned / _from_bf16_bits(scales)[..., None]), -8, 7)
    nibbles = (steps + np.float32(8)).astype(np.uint8).reshape(rows, depths, -1, 2)
    return {"values": nibbles[..., 0] | (nibbles[..., 1] << np.uint8(4)), "scales": scales}


def _int4_decode(arrays: Arrays, width: int) -> np.ndarray:
    packed, scales = arrays["values"], _from_bf16_bits(arrays["scales"])
    nibbles = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], -1).reshape(*scales.shape, GROUP)
    turned = (nibbles.astype(np.float32) - np.float32(7.5)) * scales[..., None]
    states: np.ndarray = _rotate(turned).reshape(*scales.shape[:2], -1)[..., :width]
    return states


CODECS: dict[str, Codec] = {
    "fp32": Codec(
        {"values": Stored("<f4", lambda width: width, "float32")},
        lambda states: {"values": np.ascontiguousarray(states, "<f4")},
        lambda arrays, _: arrays["values"].astype(np.float32, copy=False),
        1e-3,
    ),
    "bf16": Codec(
        {"values": Stored("<u2", lambda width: width, "bfloat16 bits: the upper 16 bits of a float32, rounded to nearest even")},
        lambda states: {"values": _bf16_bits(states)},
        lambda arrays, _: _from_bf16_bits(arrays["values"]),
        1e-2,
    ),
    "int8": Codec(
        {
            "values": Stored("|i1", lambda width: width, "q: a state is q times its scale"),
            "scales": Stored("<f4", lambda _: 1, "float32, one a row and state"),
        },
        _int8_encode,
        lambda arrays, _: arrays["values"].astype(np.float32) * arrays["scales"],
        2e-2,
    ),
    "int4": Codec(
        {
            "values": Stored(
                "|u1",
                lambda width: groups(width) * GROUP // 2,
                "two numbers 0 … 15 a byte, the lower four bits first: (number - 7.5) times the scale of its 64 dimensions, then "
                "Hadamard's matrix of size 64 over 8, gives the state; dimensions past the width are filling",
            ),
            "scales": Stored("<u2", groups, "bfloat16 bits, one for each 64 dimensions of a row's state"),
        },
        _int4_encode,
        _int4_decode,
        0.2,
    ),
}


LOSSLESS = "+blosc"
"""behind a codec's name: its chunks are compressed without loss, for cold storage"""


def parse(name: str) -> tuple[str, bool]:
    """`int8+blosc` as its codec and whether chunks are compressed. Raises Refused with the known names."""
    base = name.removesuffix(LOSSLESS)
    if base not in CODECS:
        raise Refused(f"unknown codec {name!r}; known: {', '.join(CODECS)}, and each with {LOSSLESS}, such as bf16{LOSSLESS}")
    return base, base != name


def codec(name: str) -> Codec:
    """The codec of that name, compressed or not. Raises Refused with the known names."""
    return CODECS[parse(name)[0]]
