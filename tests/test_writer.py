"""Building, resuming and publishing: whatever happens in between, the same bytes or none."""

import itertools
import os
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from store import files, layout, manifest, writer
from store.codecs import codec
from store.errors import Damaged, Refused
from store.fingerprint import fingerprint

LENGTHS = np.array([3, 1, 4, 1, 5, 2, 6, 4, 4, 3, 6])
STATES = ["embedding", "block.1"]


class Crash(BaseException):
    """The process is gone."""


class Toy:
    """A cache to be, with known content: what a dictionary would hold."""

    def __init__(self, lengths=LENGTHS, seed=0, content_seed=None, name="bf16"):
        random = np.random.default_rng(seed if content_seed is None else content_seed)
        self.place = layout.place(lengths, 2 * codec(name).state_bytes(3), 8 * 2 * codec(name).state_bytes(3))
        self.codec = codec(name)
        self.rows = random.normal(size=(int(lengths.sum()), 2, 3)).astype(np.float32)
        self.lengths = lengths
        self.arrays = layout.state_arrays("encoder", name, self.place, STATES, 3)
        self.tables = {"examples/start": self.place.start, "examples/length": lengths.astype(np.int64)}
        self.arrays |= {path: layout.flat_array(data) for path, data in self.tables.items()}
        self.recipe = {"states": STATES, "codec": name, "seed": seed}

    def expected(self, example):
        end = int(self.lengths[: example + 1].sum())
        return self.codec.decode(self.codec.encode(self.rows[end - self.lengths[example] : end]), 3)

    def build(self, root, only=None):
        """Build what is missing; returns the chunks that were built. only: stop after these many chunks."""
        built = []
        with writer.building(root, fingerprint(self.recipe)) as folder:
            for number in range(self.place.chunks):
                if writer.finished(folder, number) is None:
                    if only is not None and len(built) == only:
                        raise Crash
                    first, last = self.place.first[number], self.place.first[number + 1]
                    begin, end = int(self.lengths[:first].sum()), int(self.lengths[:last].sum())
                    packed = self.codec.encode(self.rows[begin:end])
                    writer.write_chunk(folder, number, {f"encoder/{n}": v for n, v in packed.items()}, self.arrays)
                    built.append(number)
            objects = {p: r for n in range(self.place.chunks) for p, r in writer.finished(folder, n).items()}
            for path, data in self.tables.items():
                objects |= writer.write_table(folder, path, data, self.arrays[path])
            for path, text in layout.metadata(self.arrays, {}).items():
                objects[path] = files.put(folder / "cache" / path, text)
            counts = {"examples": len(self.lengths), "rows": int(self.lengths.sum()), "width": 3}
            writer.publish(root, folder, manifest.Manifest(self.recipe, {}, counts, objects))
        return built

    def path(self, root):
        return root / "caches" / fingerprint(self.recipe)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40).map(np.array), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_a_cache_gives_back_what_a_dictionary_would(tmp_path_factory, lengths, seed):
    root, toy = tmp_path_factory.mktemp("root"), Toy(lengths, seed)
    toy.build(root)
    cache = store.open(toy.path(root))
    for example in range(len(lengths)):
        assert np.array_equal(cache.rows(example), toy.expected(example))


def test_every_file_is_synced_once_and_names_when_published(tmp_path, monkeypatch):
    """A power cut after publishing costs nothing; until then a receipt may go, and its chunk is built again."""
    synced, original = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}").removesuffix(".part"))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    toy = Toy()
    toy.build(tmp_path)
    inner = [path.split("/cache/", 1)[1] for path in synced if "/building/" in path and "/cache/" in path]
    folders = [str(p.relative_to(toy.path(tmp_path))) for p in toy.path(tmp_path).rglob("*") if p.is_dir()]
    assert sorted(inner) == sorted([*content(toy.path(tmp_path)), *folders])  # each once: a chunk costs one
    assert not any("receipts" in path for path in synced)
    assert synced[-1] == str(tmp_path / "caches")


def test_publishing_leaves_nothing_behind(tmp_path):
    Toy().build(tmp_path)
    assert list((tmp_path / "building").iterdir()) == []


def test_resuming_goes_on_at_the_first_missing_chunk(tmp_path):
    toy = Toy()
    with pytest.raises(Crash):
        toy.build(tmp_path, only=2)
    assert not toy.path(tmp_path).exists()
    assert toy.build(tmp_path) == list(range(2, toy.place.chunks))


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "empty"])
def test_a_receipt_is_checked_again_before_it_is_trusted(tmp_path, harm):
    toy = Toy()
    with pytest.raises(Crash):
        toy.build(tmp_path, only=3)
    victim = next((tmp_path / "building").rglob("c.1.0.0"))
    data = victim.read_bytes()
    if harm == "remove":
        victim.unlink()
    else:
        victim.write_bytes({"flip": bytes([data[0] ^ 1]) + data[1:], "truncate": data[:-1], "empty": b""}[harm])
    assert toy.build(tmp_path)[0] == 1
    store.open(toy.path(tmp_path))


def test_a_crash_at_any_step_costs_nothing(tmp_path, monkeypatch):
    """Die before each write, fsync and rename in turn; the next run ends in the same bytes."""
    toy = Toy()
    toy.build(tmp_path / "whole")
    whole = content(toy.path(tmp_path / "whole"))
    steps = 0
    for deadline in itertools.count():
        root = tmp_path / f"crash{deadline}"
        left = deadline

        def step(original, *args, **kwargs):
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            import pathlib

            for owner, name in ((os, "fsync"), (os, "rename"), (pathlib.Path, "replace"), (files, "put")):
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, _o=original, **k: step(_o, *a, **k))
            try:
                toy.build(root)
                crashed = False
            except Crash:
                crashed = True
        if toy.path(root).exists():
            assert content(toy.path(root)) == whole
        if not toy.path(root).exists():
            toy.build(root)
        assert content(toy.path(root)) == whole
        shutil.rmtree(root)
        if not crashed:
            steps = deadline
            break
    assert steps > 50


def test_two_builders_end_with_one_cache(tmp_path):
    toy, done = Toy(), []
    gate = threading.Barrier(2)

    def go():
        gate.wait()
        done.append(toy.build(tmp_path))

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2
    store.open(toy.path(tmp_path))
    assert list((tmp_path / "building").iterdir()) == []


def test_a_live_builders_folder_is_not_taken_over(tmp_path):
    with writer.building(tmp_path, "f" * 64) as first, writer.building(tmp_path, "f" * 64) as second:
        assert first != second and first.is_dir()


def test_a_builder_that_disagrees_keeps_the_published_cache_and_says_so(tmp_path, monkeypatch):
    Toy(content_seed=1).build(tmp_path)
    before = content(Toy().path(tmp_path))
    with pytest.raises(Refused, match="published meanwhile .* differ"):
        Toy(content_seed=2).build(tmp_path)
    assert content(Toy().path(tmp_path)) == before


def test_a_full_disk_leaves_finished_chunks_for_the_next_run(tmp_path, monkeypatch):
    toy, original, count = Toy(), files.put, itertools.count()

    def full(path, *pieces, **how):
        if next(count) == 5:
            raise OSError(28, "No space left on device", str(path))
        return original(path, *pieces, **how)

    with monkeypatch.context() as patch:
        patch.setattr(files, "put", full)
        with pytest.raises(OSError, match="No space left"):
            toy.build(tmp_path)
    assert toy.build(tmp_path)[0] > 0
    assert store.open(toy.path(tmp_path)).manifest.recipe == toy.recipe


def test_the_manifest_counts_its_own_bytes(tmp_path):
    toy = Toy()
    toy.build(tmp_path)
    found = store.open(toy.path(tmp_path)).manifest
    assert found.bytes == sum(len(data) for data in content(toy.path(tmp_path)).values())
    planned = manifest.planned(found.recipe, found.about, found.counts, {p: r.size for p, r in found.objects.items()})
    assert planned.bytes == found.bytes


def test_a_manifest_that_is_no_manifest_is_damaged(tmp_path):
    for text in (b"", b"[]", b"{", b"null", b'{"digest": 1}', b'{"digest": "x", "format": 1}', b"\xff"):
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(Damaged, match="is not a manifest"):
            manifest.load(tmp_path)
