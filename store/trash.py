"""What is to be deleted goes to the trash first, from where it can come back whole.

<root>/trash/<unique>/moved.json            when, by the store's clock
<root>/trash/<unique>/<fingerprint>/        the cache; in an object store <fingerprint>.json, its manifest, and its objects stay
<root>/trash/<unique>.gone/                 being deleted
<root>/trash/<unique>/fate                  in an object store, where nothing can be renamed: "back …" or "gone", created once
"""

import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from store import catalog, files, manifest, verify
from store.bucket import Bucket
from store.errors import Damaged, Refused
from store.objects import root_at
from store.stores import Root

_MARK, _GONE = "moved.json", ".gone"
_FATE, _AWAY = "fate", b"gone\n"
IDLE = 3600.0
"""what is half made, or empty, and as old, is nobody's any more, in seconds"""
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
    entry = Entry(name, fingerprint, objects.now())
    try:
        files.sync_folder(folder)  # what is deleted later must not be deleted from under its old name, should the power go
    except FileNotFoundError:  # brought back already, by another
        pass
    except OSError:
        restore(root, entry)
        raise
    return entry


def entries(root: Root) -> Iterator[Entry]:
    """The caches in the trash."""
    objects = root_at(root)
    if isinstance(objects, Bucket):
        yield from (entry for entry, away in _far(objects) if not away)
        return
    for folder in sorted((objects.path / "trash").glob("*/")):
        with suppress(FileNotFoundError):  # on its way out, or back
            if folder.suffix != _GONE:
                for path in folder.iterdir():
                    if _NAME.fullmatch(path.name):
                        yield Entry(folder.name, path.name, _since(folder))


def _since(folder: Path) -> float:
    """When a cache came here; of a mark that a power loss took, the folder says it."""
    try:
        return (folder / _MARK).stat().st_mtime
    except FileNotFoundError:
        return folder.stat().st_mtime


def _far(objects: Bucket) -> Iterator[tuple[Entry, bool]]:
    """The caches in an object store's trash, and whether each is being deleted."""
    listed = objects.listing("trash/")
    for place, about in listed.items():
        _, name, last = (*place.split("/"), "")[:3]
        if _NAME.fullmatch(last.removesuffix(".json")):
            fate, away = f"trash/{name}/{_FATE}", False
            with suppress(FileNotFoundError):
                away = fate in listed and objects.read(fate) == _AWAY
            yield Entry(name, last.removesuffix(".json"), about.written), away


def whole(root: Root, entry: Entry) -> bool:
    """Whether every byte of a cache in the trash is as it was published; in an object store every object's size."""
    if isinstance(root, Path):
        return not any(verify.faults(root / "trash" / entry.name / entry.fingerprint))
    objects, place = Bucket(root), f"trash/{entry.name}/{entry.fingerprint}.json"
    try:
        return _complete(objects, entry.fingerprint, objects.read(place))
    except FileNotFoundError:
        return False


def _complete(objects: Bucket, fingerprint: str, text: bytes) -> bool:
    """Whether all objects that a manifest names are there, with their sizes."""
    try:
        found = manifest.parsed(text, f"{objects}/caches/{fingerprint}")
    except Refused:
        return False
    there = objects.below(f"objects/{fingerprint}/{found.write}").sizes()
    return found.fingerprint == fingerprint and there == {path: receipt.size for path, receipt in found.objects.items()}


def _decided(objects: Bucket, place: str, fate: bytes) -> bool:
    """Whether this is what becomes of a cache in the trash. The word of one who was bringing it back, and is gone, is removed."""
    if objects.create(f"{place}/{_FATE}", fate):
        return True
    about = objects.listing(f"{place}/").get(f"{place}/{_FATE}")
    with suppress(FileNotFoundError):
        if about and objects.now() - about.written > IDLE and objects.read(f"{place}/{_FATE}") != _AWAY:
            objects.delete([f"{place}/{_FATE}"])
    return False


def restore(root: Root, entry: Entry) -> bool:
    """Bring a cache back; False where one of its fingerprint is published, another was faster, or it is being deleted."""
    objects, place = root_at(root), f"trash/{entry.name}"
    if isinstance(objects, Bucket):
        try:
            text = objects.read(f"{place}/{entry.fingerprint}.json")
        except FileNotFoundError:
            return False
        if catalog.find(root, entry.fingerprint) or not _complete(objects, entry.fingerprint, text):
            return False
        if not _decided(objects, place, f"back {secrets.token_hex(8)}\n".encode()):
            return False
        published = f"caches/{entry.fingerprint}/{manifest.NAME}"
        if not objects.create(published, text):
            return False
        if not _complete(objects, entry.fingerprint, text):  # who was asleep for hours before this is told by nothing else
            objects.delete([published])
            return False
        objects.delete([f"{place}/{entry.fingerprint}.json", f"{place}/{_MARK}"])
        return True
    folder = objects.path / place
    files.make(objects.path / "caches")
    try:
        files.rename(folder / entry.fingerprint, objects.path / "caches" / entry.fingerprint)
    except OSError:
        return False
    files.sync_folder(objects.path / "caches")
    files.remove(folder)
    return True


def purge(root: Root, entry: Entry) -> bool:
    """Delete a cache that is in the trash; False where another brings it back.

    Raises OSError, or Refused, where it cannot be deleted; what is left then is tried again later.
    """
    objects, place = root_at(root), f"trash/{entry.name}"
    if isinstance(objects, Bucket):
        try:
            text = objects.read(f"{place}/{entry.fingerprint}.json")
        except FileNotFoundError:
            return False
        write, paths = "", []
        with suppress(Damaged):  # one that says nothing names no objects; another version's is refused
            gone = manifest.parsed(text, f"{objects}/{place}")
            write, paths = gone.write, list(gone.objects)
        published_write(objects, entry.fingerprint)  # raises before anything is decided
        if not _decided(objects, place, _AWAY):
            return False
        objects.delete([f"{place}/{entry.fingerprint}.json", f"{place}/{_MARK}"])
        # one that was thrown away twice, and brought back once, has the same objects
        if write and not named(objects, entry.fingerprint, write):
            objects.delete(f"objects/{entry.fingerprint}/{write}/{path}" for path in paths)
        return True
    folder = objects.path / place
    with suppress(FileNotFoundError):  # another gc was faster
        files.rename(folder, folder.with_name(entry.name + _GONE))
        files.sync_folder(folder.parent)  # what is half deleted must not come back under a name that says it is whole
    sweep(objects.path)
    return True


def sweep(root: Root) -> None:
    """Go on deleting what a killed gc left half deleted, and what it had moved nothing into."""
    if not isinstance(root, Path):
        _sweep_far(Bucket(root))
        return
    for folder in (root / "trash").glob("*/"):
        if folder.suffix == _GONE:
            files.remove(folder)
        else:
            with suppress(OSError):  # refuses where there is a cache
                idle = files.now(root) - _since(folder)
                if idle > IDLE and not [path for path in folder.iterdir() if path.name != _MARK]:
                    files.remove(folder)


def _sweep_far(objects: Bucket) -> None:
    for entry, away in list(_far(objects)):
        with suppress(Refused):
            if away:
                purge(str(objects), entry)
    names: dict[str, dict[str, float]] = {}
    for place, about in objects.listing("trash/").items():
        folder, _, name = place.rpartition("/")
        names.setdefault(folder, {})[name] = about.written
    clock = objects.now() if names else 0.0
    for folder, inside in names.items():
        # a fate stays for those who have read what it is about, and do not know it yet
        if inside.keys() <= {_MARK, _FATE} and clock - max(inside.values()) > IDLE:
            objects.delete(f"{folder}/{name}" for name in inside)


def named(objects: Bucket, fingerprint: str, write: str) -> bool:
    """Whether objects are those of a cache that is published, or in the trash.

    Raises Refused as `published_write` does. What goes from one to the other is in both for a while: looked for there, in the
    trash, and there again, it is seen.
    """
    return (
        published_write(objects, fingerprint) == write
        or any(entry.fingerprint == fingerprint for entry, _ in _far(objects))
        or published_write(objects, fingerprint) == write
    )


def published_write(objects: Bucket, fingerprint: str) -> str | None:
    """The name under which the objects of a published cache lie in an object store; None where it is not published.

    Raises Refused where its manifest does not read: nobody can tell which are its objects then.
    """
    place = f"caches/{fingerprint}"
    try:
        text = objects.read(f"{place}/{manifest.NAME}", manifest.MOST)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Damaged(f"{objects}/{place}/{manifest.NAME} is not a manifest ({error})") from None
    return manifest.parsed(text, f"{objects}/{place}").write
