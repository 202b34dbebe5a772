"""A cache that lies elsewhere, at an address, is the same cache: the same bytes, or a loud error."""

import multiprocessing
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from test_writer import Toy, content

import store
from stages.access import Access
from stages.loader import Loader
from store import Damaged, Refused
from store.objects import Folder, Remote

CODECS = ["fp32", "bf16", "int4", "bf16+blosc"]


@pytest.fixture(scope="module", params=CODECS)
def whole(request, tmp_path_factory):
    """A cache in a folder of this machine."""
    root = tmp_path_factory.mktemp("whole")
    toy = Toy(name=request.param)
    toy.build(root)
    return toy.path(root)


@pytest.fixture(params=["memory", "file"])
def address(request, whole, tmp_path):
    """The same cache where fsspec reaches it: whole objects, in no folder of ours."""
    if request.param == "file":
        yield f"file://{shutil.copytree(whole, tmp_path / 'elsewhere')}"
        return
    held = fsspec.filesystem("memory")
    held.put(str(whole), "/bucket/cache", recursive=True)
    yield "memory://bucket/cache"
    held.rm("/bucket", recursive=True)


def everything(cache):
    names = ["start", "length", *(f"columns/{name}" for name in cache.columns())]
    return [
        *(cache.table(name) for name in names),
        *(values for number in range(cache.chunks) for values in cache.chunk(number, "encoder").values()),
        *cache.gather(np.array([10, 0, 3, 3]), "encoder").values(),
        *(cache.rows(example) for example in range(len(cache.length))),
    ]


def same(one, other):
    return len(one) == len(other) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_gives_what_the_folder_gives(whole, address):
    near, far = store.open(whole), store.open(address)
    assert isinstance(near.objects, Folder) and isinstance(far.objects, Remote)
    assert same(everything(near), everything(far))
    far.check()
    assert near.manifest == far.manifest and near.arrays == far.arrays


def batches(cache, how):
    access = Access(how, memory_bytes=0, window_bytes=2 * cache.chunk_bytes(["encoder"]))
    mine = Loader(cache, np.arange(11), np.arange(11) * 10, 3, torch.device("cpu"), None, access)
    return mine, [(batch.place.tolist(), batch.rows.numpy().tolist()) for batch in mine.epoch(0, 1)]


def test_stage_two_reads_it_by_windows_in_the_order_of_a_folder(whole, address):
    chosen, found = batches(store.open(address), "auto")
    assert chosen.access.how == "windows"
    assert found == batches(store.open(whole), "windows")[1]
    with pytest.raises(Refused, match=rf"random needs rows by themselves, and {address} is no folder"):
        batches(store.open(address), "random")


PLACES = ["manifest.json", "encoder/values/c.1.0.0", "encoder/values/zarr.json", "examples/start/c.0"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("harm", ["missing", "truncated", "zero", "flipped"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_harm_is_loud(address, place, harm, when):
    """After opening too: to zarr a missing object is zeros."""
    held, base = fsspec.url_to_fs(address)
    cache = store.open(address) if when == "after" else None
    data = held.cat_file(f"{base}/{place}")
    if harm == "missing":
        held.rm(f"{base}/{place}")
    else:
        changed = {"truncated": data[:-1], "zero": b"", "flipped": bytes([data[0] ^ 1]) + data[1:]}[harm]
        held.pipe_file(f"{base}/{place}", changed)
    if cache and place.endswith(".json"):  # what was read at the beginning is not read again
        assert len(everything(cache)) > len(cache.length)
        return
    with pytest.raises(Damaged, match="extract again") as told:
        everything(cache or store.open(address))
    assert f"{address}/{place}" in str(told.value)


@pytest.mark.parametrize("address", ["memory"], indirect=True)
@pytest.mark.parametrize("error", [PermissionError("not yours"), ConnectionError("gone"), RuntimeError("as some system says it")])
def test_what_cannot_be_had_now_is_not_called_damaged(address, error, monkeypatch):
    """Nobody should throw a cache away because the network was down."""
    cache = store.open(address)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fails)
    for read in (lambda: store.open(address), lambda: cache.chunk(0, "encoder")):
        with pytest.raises(Refused, match=f"cannot be had .{type(error).__name__}: {error}") as told:
            read()
        assert not isinstance(told.value, Damaged)


@pytest.mark.parametrize("address", ["file"], indirect=True)
@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_read_the_same(whole, address, context):
    with multiprocessing.get_context(context).Pool(1) as pool:
        assert same(pool.apply(everything, [store.open(address)]), everything(store.open(whole)))


def test_a_folder_inside_that_is_a_link_leads_nowhere(whole, tmp_path):
    mine = shutil.copytree(whole, tmp_path / "cache")
    (mine / "encoder").rename(tmp_path / "encoder")
    (mine / "encoder").symlink_to(tmp_path / "encoder")
    with pytest.raises(Damaged, match="may not leave its cache"):
        store.open(mine)


def test_sizes_are_those_of_every_object(whole, address):
    told = {path: len(data) for path, data in content(whole).items()}
    assert Folder(whole).sizes() == Remote(address).sizes() == told


@pytest.mark.parametrize("address", ["memory"], indirect=True)
def test_what_a_listing_said_before_is_not_believed(address, monkeypatch):
    """File systems keep listings for a while."""
    cache, held = store.open(address), fsspec.filesystem("memory")
    victim = "/bucket/cache/encoder/values/c.1.0.0"
    before = held.info(victim)
    held.rm(victim)
    for name, stale in (("info", before), ("size", before["size"]), ("exists", True)):
        monkeypatch.setattr(type(held), name, lambda *_, stale=stale, **__: stale)
    with pytest.raises(Damaged, match=r"c\.1\.0\.0: there is no such file"):
        cache.chunk(1, "encoder")


@pytest.mark.parametrize("address", ["file"], indirect=True)
def test_a_link_at_an_address_leads_nowhere(address, tmp_path):
    place = Path(address.removeprefix("file://")) / "encoder/values/c.0.0.0"
    place.rename(tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(Damaged, match="may not leave its cache"):
        store.open(address)


def test_tables_of_several_chunks_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("store.layout.FLAT_CHUNK", 4)  # of 11 examples
    toy = Toy()
    toy.build(tmp_path)
    near, far = store.open(toy.path(tmp_path)), store.open(f"file://{toy.path(tmp_path)}")
    assert near.arrays["examples/start"].chunk_count() == 3
    assert same(everything(near), everything(far))
    far.check()


@pytest.mark.parametrize("address", ["memory://", "file:///", "s3://"])
def test_an_address_of_no_place_is_refused(address):
    with pytest.raises(Refused, match="names no place"):
        store.open(address)


@pytest.mark.parametrize(
    "address, reason",
    [("gopher://there/cache", "Protocol not known"), ("gcs://bucket/cache", "gcsfs"), ("dir://x", "AttributeError"),
     ("zip://x", "IsADirectoryError|FileNotFoundError"), ("reference://x", "TypeError")],
)  # fmt: skip
def test_an_address_that_cannot_be_reached_is_refused(address, reason):
    with pytest.raises(Refused, match=f"{address} cannot be reached from here: .*{reason}"):
        store.open(address)


def test_an_address_without_a_cache_says_so():
    with pytest.raises(Damaged, match=r"memory://nothing/manifest\.json is missing"):
        store.open("memory://nothing")
