"""Opening gives exactly the bytes that were published, or fails loudly; plain Zarr reads the same."""

import json
import shutil

import numpy as np
import pytest
import zarr
from test_writer import Toy, content

import store
from store import Damaged
from store.codecs import codec

OBJECTS = sorted(
    {
        "encoder/values/c.0.0.0", "encoder/values/c.1.0.0", "encoder/values/zarr.json", "encoder/zarr.json", "zarr.json",
        "examples/start/c.0", "examples/length/c.0", "examples/start/zarr.json", "manifest.json",
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    Toy().build(root)
    return Toy().path(root)


@pytest.fixture
def mine(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "cache")


def read_all(path):
    cache = store.open(path)
    return [cache.rows(example) for example in range(len(cache.length))]


def test_the_list_of_objects_to_harm_is_complete(whole):
    kinds = {path.rsplit("/c.", 1)[0] for path in content(whole)}
    assert kinds == {path.rsplit("/c.", 1)[0] for path in OBJECTS} | {"examples/length/zarr.json", "examples/zarr.json"}


@pytest.mark.parametrize("place", OBJECTS)
@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "zero", "flipped first", "flipped last", "zeros", "folder"])
def test_any_harm_to_any_object_is_loud(mine, place, harm):
    path = mine / place
    data = path.read_bytes()
    if harm in ("missing", "folder"):
        path.unlink()
        if harm == "folder":
            path.mkdir()
    else:
        path.write_bytes(
            {
                "truncated": data[:-1],
                "longer": data + b"x",
                "zero": b"",
                "flipped first": bytes([data[0] ^ 4]) + data[1:],
                "flipped last": data[:-2] + bytes([data[-2] ^ 4]) + data[-1:],
                "zeros": bytes(len(data)),
            }[harm]
        )
    with pytest.raises(Damaged) as told:
        read_all(mine)
    assert place in str(told.value) and "extract again" in str(told.value)


def test_a_changed_word_in_the_manifest_is_seen(mine):
    path = mine / "manifest.json"
    said = json.loads(path.read_text())
    said["counts"]["examples"] -= 1
    path.write_text(json.dumps(said, indent=1) + "\n")
    with pytest.raises(Damaged, match="was altered"):
        store.open(mine)


def test_another_format_is_named(mine):
    path = mine / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(Damaged, match="format 2, this version reads 1"):
        store.open(mine)


def test_a_link_in_a_caches_place_is_refused(mine, tmp_path):
    place = mine / "encoder/values/c.0.0.0"
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match="may not leave its cache"):
        store.open(mine)


def test_what_is_no_cache_says_so(tmp_path):
    with pytest.raises(Damaged, match=r"manifest\.json is missing"):
        store.open(tmp_path)


def test_plain_zarr_reads_it_without_our_code(whole):
    group = zarr.open_group(str(whole), mode="r", zarr_format=3)
    values, cache = group["encoder/values"], store.open(whole)
    assert values.dtype == np.uint16 and "bfloat16" in values.attrs["meaning"]
    assert values.attrs["states"] == ["embedding", "block.1"] == cache.states["encoder"]
    stored = np.asarray(values[:])
    start, length = np.asarray(group["examples/start"][:]), np.asarray(group["examples/length"][:])
    for example, (begin, rows) in enumerate(zip(start, length, strict=True)):
        plain = codec("bf16").decode({"values": stored[begin : begin + rows]})
        assert np.array_equal(plain, cache.rows(example))
        assert np.array_equal(plain, Toy().expected(example))


def test_plain_zarr_sees_a_flipped_bit_too(mine):
    path = mine / "encoder/values/c.0.0.0"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(str(mine), mode="r", zarr_format=3)["encoder/values"][:]
