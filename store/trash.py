"""What is to be deleted goes to the trash first, from where it can come back whole.

<root>/trash/<unique>/moved.json            when, by the store's clock
<root>/trash/<unique>/<fingerprint>/        the cache; in an object store <fingerprint>.json, its manifest, and its objects stay
<root>/trash/<unique>.gone/                 being deleted
"""

import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from store import files, manifest, verify
from store.bucket import Bucket
from store.errors import Damaged
from store.objects import root_at
from store.stores import Root

_MARK, _GONE = "moved.json", ".gone"
_IDLE = 3600.0
"""an empty folder of the trash that is as old is nobody's any more, in seconds"""
_NAME = re.compile("[0-9a-f]{64}")


class Entry(NamedTuple):
    """A cache in the trash."""

    name: str
    fingerprint: str
    written: float
    """when it came here, by the store's clock, in seconds"""


def throw(root: Root, fingerprint: str) -> Entry | None:
    """Move a published cache to the trash; None where it is gone already."""
    name, objects = secrets.token_hex(8), root_at(root)
    place = f"trash/{name}"
    if isinstance(objects, Bucket):
        try:
            text = objects.read(f"caches/{fingerprint}/{manifest.NAME}")
        except FileNotFoundError:
            return None
        objects.put(f"{place}/{fingerprint}.json", text)
        objects.put(f"{place}/{_MARK}", b"{}\n")
        try:
            same = objects.read(f"caches/{fingerprint}/{manifest.NAME}") == text
        except FileNotFoundError:
            same = False
        if not same:  # another gc was faster, and somebody may have published again
            objects.delete([f"{place}/{fingerprint}.json", f"{place}/{_MARK}"])
            return None
        objects.delete([f"caches/{fingerprint}/{manifest.NAME}"])
        return Entry(name, fingerprint, objects.now())
    folder = objects.path / place
    files.make(folder.parent, sync=True)
    files.make(folder, sync=True)
    files.put(folder / _MARK, b"{}\n", sync=False)
    try:
        files.rename(objects.path / "caches" / fingerprint, folder / fingerprint)
    except FileNotFoundError:
        files.remove(folder)
        return None
    with suppress(FileNotFoundError):  # brought back already, by another
        files.sync_folder(folder)  # what is deleted later must not be deleted from under its old name, should the power go
    return Entry(name, fingerprint, objects.now())


def entries(root: Root) -> Iterator[Entry]:
    """The caches in the trash."""
    objects = root_at(root)
    if isinstance(objects, Bucket):
        listed = objects.listing("trash/")
        for place, about in listed.items():
            _, name, last = (*place.split("/"), "")[:3]
            if _NAME.fullmatch(last.removesuffix(".json")):
                yield Entry(name, last.removesuffix(".json"), about.written)
        return
    for folder in sorted((objects.path / "trash").glob("*/")):
        with suppress(FileNotFoundError):  # on its way out, or back
            if folder.suffix != _GONE:
                for path in folder.iterdir():
                    if _NAME.fullmatch(path.name):
                        yield Entry(folder.name, path.name, (folder / _MARK).stat().st_mtime)


def whole(root: Root, entry: Entry) -> bool:
    """Whether every byte of a cache in the trash is as it was published; of one in an object store its manifest says so."""
    return not isinstance(root, Path) or not any(verify.faults(root / "trash" / entry.name / entry.fingerprint))


def restore(root: Root, entry: Entry) -> bool:
    """Bring a cache back; False where one of its fingerprint has been published since, or another was faster."""
    objects, place = root_at(root), f"trash/{entry.name}"
    if isinstance(objects, Bucket):
        try:
            text = objects.read(f"{place}/{entry.fingerprint}.json")
        except FileNotFoundError:
            return False
        back = objects.create(f"caches/{entry.fingerprint}/{manifest.NAME}", text)
        if back:
            objects.delete([f"{place}/{entry.fingerprint}.json", f"{place}/{_MARK}"])
        return back
    folder = objects.path / place
    files.make(objects.path / "caches")
    try:
        files.rename(folder / entry.fingerprint, objects.path / "caches" / entry.fingerprint)
    except OSError:
        return False
    files.sync_folder(objects.path / "caches")
    files.remove(folder)
    return True


def purge(root: Root, entry: Entry) -> None:
    """Delete a cache that is in the trash. Raises OSError where rights are lacking; what is left then is tried again later."""
    objects, place = root_at(root), f"trash/{entry.name}"
    if isinstance(objects, Bucket):
        text = b""
        with suppress(FileNotFoundError):
            text = objects.read(f"{place}/{entry.fingerprint}.json")
        # nobody brings it back from now on
        objects.delete([f"{place}/{entry.fingerprint}.json", f"{place}/{_MARK}"])
        with suppress(Damaged):
            gone = manifest.parsed(text, f"{objects}/{place}")
            others = any(other.fingerprint == entry.fingerprint for other in entries(root))
            # one that was brought back, or thrown away twice, has the same objects
            if gone.write and gone.write != published_write(objects, entry.fingerprint) and not others:
                objects.delete(f"objects/{entry.fingerprint}/{gone.write}/{path}" for path in gone.objects)
        return
    folder = objects.path / place
    with suppress(FileNotFoundError):  # another gc was faster
        files.rename(folder, folder.with_name(entry.name + _GONE))
        files.sync_folder(folder.parent)  # what is half deleted must not come back under a name that says it is whole
    sweep(objects.path)


def sweep(root: Path) -> None:
    """Go on deleting what a killed gc left half deleted, and what it had moved nothing into."""
    for folder in (root / "trash").glob("*/"):
        if folder.suffix == _GONE:
            files.remove(folder)
        else:
            with suppress(OSError):  # refuses where there is a cache
                idle = files.now(root) - (folder / _MARK).stat().st_mtime
                if idle > _IDLE and [path.name for path in folder.iterdir()] == [_MARK]:
                    files.remove(folder)


def published_write(objects: Bucket, fingerprint: str) -> str | None:
    """The name under which the objects of a published cache lie in an object store; None where it is not published."""
    try:
        return manifest.load(objects.below(f"caches/{fingerprint}")).write
    except Damaged:
        return None
