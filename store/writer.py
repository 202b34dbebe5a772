"""Build a cache beside, chunk by whole chunk, and publish it in one stroke.

    <root>/building/<fingerprint>/<unique>/cache/      becomes <root>/caches/<fingerprint> by one rename
    <root>/building/<fingerprint>/<unique>/receipts/   a file a finished chunk: what resuming trusts, once re-checked
    <root>/building/<fingerprint>/<unique>.lock        held while the builder lives; advice only

A builder that died leaves its folder; the next one with the same fingerprint takes it over by renaming it and goes on
at the first missing chunk. Two builders at once work in folders of their own, and one of them publishes.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import google_crc32c
import numpy as np
from filelock import FileLock, Timeout

from store import files, layout, manifest
from store.errors import Refused
from store.files import Receipt
from store.layout import Array
from store.manifest import Manifest


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refused(f"{folder} cannot be written ({error.strerror}); choose another STORE or see to its rights") from None


@contextmanager
def building(root: Path, fingerprint: str) -> Iterator[Path]:
    """The folder to build this cache in: a dead builder's, or a new one. It stays where it is on failure."""
    here = root / "building" / fingerprint
    here.mkdir(parents=True, exist_ok=True)
    folder, lock = _take_over(here) or _fresh(here)
    try:
        yield folder
    finally:
        lock.release()
        if not folder.exists():
            Path(lock.lock_file).unlink(missing_ok=True)
            # refuses by itself while another builder is still at work in there
            _remove_if_empty(here)


def _fresh(here: Path) -> tuple[Path, FileLock]:
    folder = here / secrets.token_hex(8)
    lock = FileLock(f"{folder}.lock")
    lock.acquire()
    folder.mkdir()
    return folder, lock


def _take_over(here: Path) -> tuple[Path, FileLock] | None:
    for old in sorted(path for path in here.iterdir() if path.is_dir()):
        held = FileLock(f"{old}.lock")
        try:
            held.acquire(blocking=False)
        except Timeout:
            continue
        mine = here / secrets.token_hex(8)
        lock = FileLock(f"{mine}.lock")
        lock.acquire()
        try:
            old.rename(mine)  # one of several takers succeeds, whatever the lock is worth on this file system
        except OSError:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
            continue
        finally:
            held.release()
            Path(held.lock_file).unlink(missing_ok=True)
        return mine, lock
    return None


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass


def write_object(folder: Path, path: str, data: np.ndarray, array: Array) -> Receipt:
    """Write one chunk file of an array: its bytes and their crc32c. A short last chunk is filled with zeros."""
    block: np.ndarray | bytes = data
    if data.shape != array.chunks or data.dtype != array.dtype or not data.flags.c_contiguous:
        block = np.zeros(array.chunks, array.dtype)
        block[: len(data)] = data
    if array.compressed:
        block = layout.compress(np.asarray(block))
    check = google_crc32c.value(block).to_bytes(layout.CRC_BYTES, "little")
    return files.put(folder / "cache" / path, block, check)


def write_chunk(folder: Path, number: int, data: Mapping[str, np.ndarray], arrays: Mapping[str, Array]) -> dict[str, Receipt]:
    """Write every array's file of one chunk, whole, then the receipt that says so; returns the receipts by path.

    data: array path -> (rows of this chunk, S, …), or all C rows, which spares a copy. One fsync a file: names become durable
    by `publish`, and a receipt that a power cut takes along costs its chunk, since none is trusted unchecked.
    """
    receipts = {}
    for path, block in data.items():
        place = layout.chunk_path(path, number, len(arrays[path].shape))
        receipts[place] = write_object(folder, place, block, arrays[path])
    files.put(folder / "receipts" / f"{number}.json", json.dumps(receipts).encode(), sync=False)
    return receipts


def finished(folder: Path, number: int) -> dict[str, Receipt] | None:
    """A chunk's receipts if its files are there and are what the receipts say; None if it is to be built."""
    try:
        text = json.loads((folder / "receipts" / f"{number}.json").read_bytes())
        receipts = {path: Receipt(*item) for path, item in text.items()}
        good = all(
            (folder / "cache" / path).stat().st_size == item.size and files.sha256(folder / "cache" / path) == item.sha256
            for path, item in receipts.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return receipts if good else None


def left_behind(root: Path, fingerprint: str) -> int:
    """How much of this cache an interrupted builder has already written, in bytes."""
    folders = (root / "building" / fingerprint).glob("*/cache")
    return max((sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for folder in folders), default=0)


def write_table(folder: Path, path: str, data: np.ndarray, array: Array) -> dict[str, Receipt]:
    """Write an array of the examples group, all its chunks."""
    rows = array.chunks[0]
    places = [layout.chunk_path(path, number, len(array.shape)) for number in range(array.chunk_count())]
    return {
        place: write_object(folder, place, data[number * rows : (number + 1) * rows], array)
        for number, place in enumerate(places)
    }


def publish(root: Path, folder: Path, done: Manifest) -> Path:
    """Make the built cache visible in one stroke; returns its path. The loser of a race keeps the winner's."""
    cache = folder / "cache"
    expected, there = set(done.objects), {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()}
    for extra in there - expected:  # a torn `.part` of a killed write
        (cache / extra).unlink()
    assert expected <= there, expected - there
    files.put(cache / manifest.NAME, manifest.dump(done))
    for path in [*(p for p in cache.rglob("*") if p.is_dir()), cache]:
        files.sync_folder(path)
    target = root / "caches" / done.fingerprint
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(cache, target)
    except OSError:
        if not target.is_dir():
            raise
        winner = manifest.load(target)
        if winner.objects != done.objects:
            differ = sum(winner.objects.get(path) != item for path, item in done.objects.items())
            raise Refused(
                f"{target} was published meanwhile by another extraction, and {differ} of {len(done.objects)} of its files "
                f"differ from those built here in {folder} (other hardware or libraries); the published cache stays: "
                f"run again to use it"
            ) from None
    files.sync_folder(target.parent)
    shutil.rmtree(folder)
    return target
