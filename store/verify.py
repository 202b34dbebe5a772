"""Every byte of a cache compared with what was published. Goes on past what is wrong, and tells all of it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from store import manifest, reader
from store.errors import Damaged, Refused
from store.manifest import Manifest
from store.objects import Folder, Objects, at

THREADS = 4


class Fault(NamedTuple):
    """What is wrong with an object."""

    place: str
    """its path in the cache"""
    what: str
    kind: Literal["damaged", "extra", "unread"] = "damaged"
    """not as published, no part of the cache, or it cannot be told now"""


def placed(where: Path | str) -> tuple[Objects, Manifest]:
    """Where the objects of a cache lie, and its manifest. Raises Damaged where this does not read."""
    objects = at(where)
    described = manifest.load(objects)
    return (objects.written(described.fingerprint, described.write) if described.write else objects), described


def bytes_of(where: Path | str) -> int:
    """The size that a cache says it has, in bytes; 0 where it does not say."""
    try:
        return placed(where)[1].bytes
    except Refused:
        return 0


def faults(where: Path | str, digests: bool = True) -> Iterator[Fault]:
    """All that is wrong with a cache: missing and extra objects, sizes, sha256, and what only opening it tells.

    digests: whether every byte is read; otherwise what a listing tells, and the small files.
    """
    try:
        objects, described = placed(where)
        misplaced = reader.misplaced(where, described)
        if misplaced:
            yield Fault(manifest.NAME, misplaced)
            return
        there = objects.sizes()
        strange = objects.strange() if isinstance(objects, Folder) else []
    except Damaged as error:
        yield Fault(manifest.NAME, str(error))
        return
    except (Refused, OSError) as error:
        yield Fault("", f"it cannot be read now ({error})", "unread")
        return
    for place in sorted(there.keys() - described.objects.keys() - {manifest.NAME}):
        yield Fault(place, "it is no part of this cache", "extra")
    for place in strange:
        if place not in described.objects:
            yield Fault(place, "it is no part of this cache, nor a file", "extra")

    def check(place: str) -> Fault | None:
        receipt = described.objects[place]
        if place not in there:
            return Fault(place, "it is missing, or a link")
        if there[place] != receipt.size:
            return Fault(place, f"it has {there[place]} bytes, the manifest says {receipt.size}")
        if not digests:
            return None
        try:
            found = objects.sha256(place)
        except (OSError, Refused) as error:
            return Fault(place, f"it cannot be read now ({error})", "unread")
        return None if found == receipt.sha256 else Fault(place, f"its sha256 is {found[:12]}…, not {receipt.sha256[:12]}…")

    sound = True
    with ThreadPoolExecutor(THREADS, "verify") as pool:
        for fault in pool.map(check, sorted(described.objects)):
            if fault:
                sound = False
                yield fault
    if sound:  # what manifest, metadata and tables say of each other
        try:
            cache = reader.open(where)
            for stream in cache.states:
                cache.place(stream)
        except Damaged as error:
            yield Fault("", str(error))
        except (Refused, OSError) as error:
            yield Fault("", f"it cannot be read now ({error})", "unread")
