"""How states become the numbers on disk, and back: one entry a codec. numpy only; no files.

A codec turns states (r, S, D) in float32 into named arrays whose first axis is the row, and back. `stages.packing`
holds the torch twin of each, for the device; a test pins the two to each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from store.errors import Refused

Arrays = dict[str, np.ndarray]


class Codec(NamedTuple):
    """One way to store states."""

    dtypes: dict[str, str]
    """array name -> numpy dtype on disk, little-endian"""
    meaning: dict[str, str]
    """array name -> what its numbers are, for readers that know only Zarr"""
    encode: Callable[[np.ndarray], Arrays]
    """(r, S, D) float32 -> arrays"""
    decode: Callable[[Arrays], np.ndarray]
    """arrays -> (r, S, D) float32"""


def _fp32_encode(states: np.ndarray) -> Arrays:
    return {"values": np.ascontiguousarray(states, "<f4")}


def _fp32_decode(arrays: Arrays) -> np.ndarray:
    return arrays["values"].astype(np.float32, copy=False)


def _bf16_encode(states: np.ndarray) -> Arrays:
    bits = np.ascontiguousarray(states, "<f4").view("<u4")
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even, as the hardware does
    return {"values": ((bits + half) >> np.uint32(16)).astype("<u2")}


def _bf16_decode(arrays: Arrays) -> np.ndarray:
    return (arrays["values"].astype("<u4") << np.uint32(16)).view("<f4").astype(np.float32, copy=False)


CODECS: dict[str, Codec] = {
    "fp32": Codec({"values": "<f4"}, {"values": "float32"}, _fp32_encode, _fp32_decode),
    "bf16": Codec(
        {"values": "<u2"},
        {"values": "bfloat16 bits: the upper 16 bits of a float32, rounded to nearest even"},
        _bf16_encode,
        _bf16_decode,
    ),
}


def codec(name: str) -> Codec:
    """The codec of that name. Raises Refused with the known names."""
    if name not in CODECS:
        raise Refused(f"unknown codec {name!r}; known: {', '.join(CODECS)}")
    return CODECS[name]
