"""Batches from a cache: every example once, with its own rows, whatever the window."""

import numpy as np
import pytest
import torch
from test_writer import Toy

import store
from stages.loader import Loader

CPU = torch.device("cpu")
LENGTHS = np.random.default_rng(0).integers(1, 8, 60)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    Toy(LENGTHS).build(root)
    return store.open(Toy(LENGTHS).path(root))


def loader(cache, window_chunks=100, examples=None, batch=7):
    examples = np.arange(len(LENGTHS)) if examples is None else examples
    return Loader(cache, examples, np.arange(len(LENGTHS)) * 10, batch, CPU, None, window_chunks * cache.chunk_bytes(["encoder"]))


@pytest.mark.parametrize("window_chunks", [1, 3, 100])
@pytest.mark.parametrize("examples", [None, np.arange(0, 60, 3)])
def test_an_epoch_gives_every_example_once_with_its_own_rows(cache, window_chunks, examples):
    mine = loader(cache, window_chunks, examples)
    for batches in (mine.epoch(0, 1), mine.in_order()):
        seen = []
        for batch in batches:
            assert len(batch.labels) <= 7
            for number, example in enumerate(batch.place.tolist()):
                own = batch.rows[batch.example == number]
                assert np.array_equal(own.numpy(), cache.rows(example))
                assert torch.equal(own, batch.rows[batch.start[number] : batch.start[number] + LENGTHS[example]])
            assert torch.equal(batch.labels, batch.place * 10)
            seen += batch.place.tolist()
        assert sorted(seen) == list(range(60) if examples is None else examples)


def order(mine, seed, epoch):
    return [example for batch in mine.epoch(seed, epoch) for example in batch.place.tolist()]


def test_the_order_is_a_function_of_seed_and_epoch(cache):
    assert order(loader(cache), 0, 1) == order(loader(cache), 0, 1)
    assert len({tuple(order(loader(cache), *key)) for key in ((0, 1), (0, 2), (1, 1))}) == 3


def test_a_cache_that_fits_is_read_once(cache, monkeypatch):
    reads = []
    original = store.Cache.chunk
    monkeypatch.setattr(store.Cache, "chunk", lambda self, number, stream: reads.append(number) or original(self, number, stream))
    mine = loader(cache)
    order(mine, 0, 1), order(mine, 0, 2)
    assert sorted(reads) == list(range(cache.chunks))
    small = loader(cache, 2)
    reads.clear()
    order(small, 0, 1), order(small, 0, 2)
    assert sorted(reads) == sorted(2 * list(range(cache.chunks)))


def test_at_most_two_windows_are_in_memory(cache, monkeypatch):
    from stages import loader as module

    alive = most = 0
    original = module._Window.__init__

    def count(self, *args):
        nonlocal alive, most
        original(self, *args)
        alive += 1
        most = max(most, alive)

    def gone(self):
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(module._Window, "__init__", count)
    monkeypatch.setattr(module._Window, "__del__", gone, raising=False)
    order(loader(cache, 1), 0, 1)
    assert most <= 2 < cache.chunks


def test_a_damaged_chunk_stops_training(cache, tmp_path):
    import shutil

    path = shutil.copytree(cache.path, tmp_path / "cache")
    victim = path / "encoder/values/c.1.0.0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    with pytest.raises(store.Damaged, match=r"c\.1\.0\.0"):
        order(loader(store.open(path)), 0, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gets_the_same_batches(cache):
    mine = Loader(cache, np.arange(60), np.arange(60), 7, torch.device("cuda"))
    for here, there in zip(loader(cache).epoch(0, 1), mine.epoch(0, 1), strict=True):
        assert there.rows.is_cuda and torch.equal(here.rows, there.rows.cpu())
