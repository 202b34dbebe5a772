"""Build a cache beside, chunk by whole chunk, and publish it in one stroke.

    <root>/building/<fingerprint>/<unique>/cache/         becomes <root>/caches/<fingerprint> by one rename
    <root>/building/<fingerprint>/<unique>/receipts/      a file a finished chunk: what resuming trusts, once re-checked
    <root>/building/<fingerprint>/<unique>/builder.json   whose it is, renewed while the builder lives

Every builder has a folder of its own, so that none can harm another, alive or not. What another has finished it takes over as
links, chunk by chunk, each checked against its receipt; the folders of those that are gone it removes then.
"""

import contextlib
import errno
import itertools
import json
import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from store import files, layout, leases, manifest
from store.compare import Difference, difference
from store.errors import Refused
from store.files import Receipt
from store.layout import Array
from store.leases import Lease
from store.manifest import Manifest
from store.objects import Folder

BUILDER = "builder.json"


class Vanished(Exception):
    """A builder's folder was cleaned away while it was thought to be gone: build again, what is published is not concerned."""


class Published(NamedTuple):
    """A cache that is there now."""

    path: Path | str
    differs: Difference | None = None
    """how another's, which came first, differs from the one that was built"""
    new: bool = True
    """whether it was published by this very call"""


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before any work."""
    try:
        files.make(folder, sync=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refused(
            f"{folder} cannot be written ({error.strerror}); choose another STORE or see to its rights; "
            f"STORE=<yours>,<this one> reads here and writes there"
        ) from None


class Building(NamedTuple):
    """A builder's folder."""

    folder: Path
    lease: Lease | None
    origin: str
    """what fixes its last bits beside the recipe: chunks of builders that differ in it are not mixed"""

    def told(self, done: int, total: int) -> None:
        """Say how far it is, with the next heartbeat."""
        if self.lease:
            self.lease.told |= {"done": done, "total": total}


@contextmanager
def building(root: Path, fingerprint: str, origin: str = "", lease: Path | None = None) -> Iterator[Building]:
    """A new folder to build this cache in; gone at the end. On failure it stays, for the next builder to take over.

    lease: that is held, kept fresh as well. Raises Vanished where the folder was cleaned away meanwhile.
    """
    folder = root / "building" / fingerprint / secrets.token_hex(8)
    files.make(root, sync=True)
    files.make(folder)
    try:
        held = Lease(*([lease] if lease else []), needed=folder / BUILDER)
    except OSError:
        files.remove(folder)
        raise
    try:
        yield Building(folder, held, origin)
    except BaseException as error:
        robbed = not (folder / BUILDER).exists()
        held.close(folder / BUILDER)
        if robbed:  # what was written since is all that there is
            _away(folder)
            if isinstance(error, OSError | Vanished):
                raise Vanished(str(error)) from error
        raise
    held.close()
    _away(folder)


def _away(folder: Path) -> None:
    files.remove(folder)
    with contextlib.suppress(OSError):  # refuses by itself while another builder is still at work in there
        folder.parent.rmdir()


def take_over(mine: Building, chunks: Mapping[int, Collection[str]]) -> dict[int, dict[str, Receipt]]:
    """Chunks that other builders of the same have finished, linked into our folder; their receipts. What is gone is removed.

    chunks: the paths of each chunk's files.
    """
    found: dict[int, dict[str, Receipt]] = {}
    for other in sorted(path for path in mine.folder.parent.iterdir() if path.is_dir() and path != mine.folder):
        for number, paths in chunks.items():
            if number not in found and (receipts := finished(other, number, paths, mine.origin)) is not None:
                try:
                    for place in receipts:
                        files.link(other / "cache" / place, mine.folder / "cache" / place)
                    _receipt(mine.folder, number, receipts, mine.origin)
                except FileNotFoundError:  # cleaned away under our hands
                    break
                found[number] = receipts
        clean(other)
    return found


def clean(folder: Path) -> bool:
    """Remove the folder of a builder that is gone; whether it was."""
    holder = leases.read(folder / BUILDER)
    try:
        idle = files.now(folder.parent) - folder.stat().st_mtime
    except OSError:
        return False
    if holder.alive if holder else idle < leases.EXPIRES:
        return False
    _away(folder)
    return True


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


def write_chunk(
    folder: Path, number: int, data: Mapping[str, np.ndarray], arrays: Mapping[str, Array], origin: str = ""
) -> dict[str, Receipt]:
    """Write every array's file of one chunk, whole, then the receipt that says so; returns the receipts by path.

    data: array path -> (rows of this chunk, S, …), or all C rows, which spares a copy. One fsync a file: names become durable
    by `publish`, and a receipt that a power cut takes along costs its chunk, since none is trusted unchecked.
    """
    receipts = {}
    for path, block in data.items():
        place = layout.chunk_path(path, number, len(arrays[path].shape))
        receipts[place] = write_object(folder, place, block, arrays[path])
    _receipt(folder, number, receipts, origin)
    return receipts


def _receipt(folder: Path, number: int, receipts: dict[str, Receipt], origin: str) -> None:
    text = json.dumps({"origin": origin, "objects": receipts}).encode()
    files.put(folder / "receipts" / f"{number}.json", text, sync=False)


def finished(folder: Path, number: int, paths: Collection[str], origin: str = "") -> dict[str, Receipt] | None:
    """A chunk's receipts if they are of these very files, which are there and as they say, and of that origin; None if it is to
    be built."""
    try:
        told = json.loads((folder / "receipts" / f"{number}.json").read_bytes())
        receipts = {path: Receipt(*item) for path, item in told["objects"].items()}
        good = (
            told["origin"] == origin
            and receipts.keys() == set(paths)
            and all(
                (folder / "cache" / path).stat().st_size == item.size and files.sha256(folder / "cache" / path) == item.sha256
                for path, item in receipts.items()
            )
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return receipts if good else None


def left_behind(root: Path, fingerprint: str) -> int:
    """How much of this cache an interrupted builder has already written, in bytes."""
    sizes: dict[str, int] = {}
    for place, about in Folder(root).listing(f"building/{fingerprint}/").items():
        _, _, builder, part, *_ = (*place.split("/"), "")
        if part == "cache":
            sizes[builder] = sizes.get(builder, 0) + about.size
    return max(sizes.values(), default=0)


def write_table(folder: Path, path: str, data: np.ndarray, array: Array) -> dict[str, Receipt]:
    """Write an array of the examples group, all its chunks."""
    rows = array.chunks[0]
    places = [layout.chunk_path(path, number, len(array.shape)) for number in range(array.chunk_count())]
    return {
        place: write_object(folder, place, data[number * rows : (number + 1) * rows], array)
        for number, place in enumerate(places)
    }


def publish(root: Path, folder: Path, done: Manifest) -> Published:
    """Make the built cache visible in one stroke. The loser of a race keeps the winner's, and says how much they differ.

    Raises Vanished where the folder was cleaned away.
    """
    cache = folder / "cache"
    expected, there = set(done.objects), {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()}
    for extra in there - expected:  # a torn `.part` of a killed write
        (cache / extra).unlink()
    if expected - there:
        raise Vanished(f"{folder} lacks {len(expected - there)} of its files")
    files.put(cache / manifest.NAME, manifest.dump(done))
    for path in [*(p for p in cache.rglob("*") if p.is_dir()), cache]:
        files.sync_folder(path)
    target = root / "caches" / done.fingerprint
    files.make(target.parent)
    files.sync_folder(root)  # where `caches` is new
    for attempt in itertools.count():
        first = _number(target)
        try:
            files.rename(cache, target)
            published = Published(target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not target.is_dir():
                raise
        try:
            published = Published(target, difference(target, cache), new=False)
            break
        except Refused:
            if attempt > 9 or (first is not None and _number(target) == first):
                raise
            # it went to the trash meanwhile: ours, then
    files.sync_folder(target.parent)
    return published


def _number(folder: Path) -> int | None:
    """What tells a folder from another that has come to its name; None where there is none."""
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None
