"""numpy codecs, their torch twins, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from stages.packing import TWINS, pack, unpack
from store import Refused
from store.codecs import CODECS, codec

STATES = arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.floats(-(2.0**126), 2.0**126, width=32))


@given(STATES)
def test_fp32_gives_back_every_bit(states):
    kind = codec("fp32")
    assert kind.decode(kind.encode(states)).tobytes() == states.tobytes()


@given(STATES)
def test_bf16_is_torchs_rounding(states):
    kind = codec("bf16")
    expected = torch.from_numpy(states).to(torch.bfloat16)
    assert np.array_equal(kind.encode(states)["values"], expected.view(torch.uint16).numpy())
    assert np.array_equal(kind.decode(kind.encode(states)), expected.float().numpy())


def test_bf16_rounds_ties_to_even():
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32).reshape(2, 1, 1)
    assert codec("bf16").decode(codec("bf16").encode(ties)).ravel().tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize("name", CODECS)
@given(states=STATES)
def test_the_device_stores_the_same_bits_as_numpy(name, states):
    plain, packed = CODECS[name].encode(states), pack(torch.from_numpy(states), name)
    assert plain.keys() == packed.keys() == CODECS[name].dtypes.keys()
    for array in plain:
        assert plain[array].dtype == np.dtype(CODECS[name].dtypes[array])
        assert plain[array].tobytes() == packed[array].numpy().tobytes()
    assert np.array_equal(CODECS[name].decode(plain), unpack(packed, name).numpy())


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name, bad):
    states = torch.zeros(2, 3, 4)
    states[1, 2, 3] = bad
    with pytest.raises(Refused, match="not finite"):
        pack(states, name)


def test_what_becomes_infinite_by_rounding_is_refused():
    with pytest.raises(Refused, match="not finite"):
        pack(torch.full((1, 1, 1), torch.finfo(torch.float32).max), "bf16")


def test_every_codec_has_its_twin_and_an_unknown_one_is_answered_with_the_known():
    assert CODECS.keys() == TWINS.keys()
    with pytest.raises(Refused, match="unknown codec 'zip'; known: fp32, bf16"):
        codec("zip")
