"""What nobody needs any more: looked for, and taken away in two steps, so that what is needed after all comes back.

A cache goes to the trash where nothing holds it (a run, a pin, a lease, a cache with rows copied from it) and it is older than a
grace period; from the trash it is deleted when it has been there for as long. Ages are told by the store's clock. Anybody may
publish, pin, read and collect meanwhile: what is held again when it has been moved, is moved back.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from store import catalog, files, leases, pins, trash, verify, writer
from store.bucket import Bucket
from store.catalog import Found
from store.errors import Refused
from store.objects import Folder, root_at
from store.stores import Root
from store.writer import BUILDER

Holds = Callable[[], Mapping[str, list[str]]]
"""fingerprint -> who needs it, as it is now"""

UNPUBLISHED = 24 * 3600.0
"""objects that no manifest names stay for at least so long: theirs may be on its way, in seconds"""


NOT, STILL = "not removed", "needed, and still in the trash, from where the next gc brings it back"
"""what was done with what could not be taken away, or not brought back, begins so"""


class Item(NamedTuple):
    """Something that could go."""

    kind: str
    """cache, trash, or what the dead have left: building, run, training"""
    fingerprint: str
    place: str
    """its path under the root; of the trash its name there"""
    bytes: int
    age: float
    """in seconds, by the store's clock"""
    held: tuple[str, ...]
    """who needs it"""

    def goes(self, grace: float) -> bool:
        """Whether it is taken away. grace: in seconds."""
        return not self.held and self.age >= grace

    @property
    def in_trash(self) -> trash.Entry:
        """As the trash knows it."""
        return trash.Entry(self.place, self.fingerprint, 0.0)


def holds(root: Root, runs: Holds) -> dict[str, list[str]]:
    """Fingerprint -> who holds it: runs, pins, who is at work, and caches whose rows were copied from it."""
    objects = root_at(root)
    found = {fingerprint: list(names) for fingerprint, names in runs().items()}
    for fingerprint, names in pins.pinned(root).items():
        found.setdefault(fingerprint, []).extend(f"pin {name}" for name in names)
    for fingerprint, holders in leases.held(root, objects.now()).items():
        found.setdefault(fingerprint, []).extend(f"in use by {holder.who}" for holder in holders)
    for cache in catalog.listing(root):
        if isinstance(cache, Found):
            for source in cache.reused:
                found.setdefault(source, []).append(f"cache {cache.fingerprint[:12]}, which has rows of it")
    return found


def look(root: Root, runs: Holds) -> Iterator[Item]:
    """All that could go, and what holds it. runs: who needs a cache beside all others."""
    objects, held = root_at(root), holds(root, runs)
    clock = objects.now()
    for found in catalog.listing(root):
        if isinstance(found, Found):
            who = tuple(held.get(found.fingerprint, ()))
            yield Item("cache", found.fingerprint, f"caches/{found.fingerprint}", found.bytes, clock - found.written, who)
    for entry in trash.entries(root):
        size = sum(about.size for about in objects.listing(f"trash/{entry.name}/").values())
        who = tuple(held.get(entry.fingerprint, ()))
        if where := catalog.find(root, entry.fingerprint):
            who = () if _whole(where) else ("what is published is damaged",)
        yield Item("trash", entry.fingerprint, entry.name, size, clock - entry.written, who)
    yield from _unpublished(objects, held, clock) if isinstance(objects, Bucket) else _left(objects, clock)


def collect(root: Root, items: list[Item], grace: float, runs: Holds) -> Iterator[tuple[Item, str]]:
    """Take away those that go; with each what was done. grace: in seconds. runs: as for `look`, asked again."""
    objects, thrown = root_at(root), []
    held = holds(root, runs)
    for item in items:
        who = held.get(item.fingerprint, []) if item.kind in ("cache", "trash") else []
        try:
            if item.kind == "trash":
                if who and trash.restore(root, item.in_trash):
                    yield item, f"restored: {', '.join(who)}"
                    continue
                where = catalog.find(root, item.fingerprint)
                unneeded = _whole(where) if where else not who
                if item.goes(grace) and unneeded and trash.purge(root, item.in_trash):
                    yield item, "deleted"
            elif who or not item.goes(grace):
                continue
            elif item.kind == "cache":
                if entry := trash.throw(root, item.fingerprint):
                    thrown.append((item, entry))
            elif _clean(objects, item):
                yield item, "deleted"
        except OSError as error:
            yield item, f"{NOT} ({error.strerror}: {error.filename})"
        except Refused as error:
            yield item, f"{NOT} ({error})"
    try:
        held = holds(root, runs)
    except (OSError, Refused):  # nobody can tell any more
        for _, entry in thrown:
            _back(root, entry)
        raise
    for item, entry in thrown:
        if since := held.get(item.fingerprint):
            yield item, f"{'kept' if _back(root, entry) else STILL}: {', '.join(since)}"
        else:
            yield item, "moved to the trash"
    trash.sweep(root)
    if isinstance(root, Path):
        leases.sweep(root, objects.now())


def _back(root: Root, entry: trash.Entry) -> bool:
    try:
        return trash.restore(root, entry) or catalog.find(root, entry.fingerprint) is not None
    except (OSError, Refused):
        return False


def _whole(where: Root) -> bool:
    """Whether a cache is as it was published, so that its copy in the trash is not needed; in an object store by sizes."""
    return not any(fault.kind != "extra" for fault in verify.faults(where, digests=isinstance(where, Path)))


def _clean(objects: Folder | Bucket, item: Item) -> bool:
    """Remove what the dead have left; whether it was still that."""
    if isinstance(objects, Bucket):
        unpublished = not trash.named(objects, item.fingerprint, item.place.rsplit("/", 1)[1])
        objects.delete(list(objects.listing(f"{item.place}/")) if unpublished else [])
        return unpublished
    path = objects.path / item.place
    if item.kind == "building":
        return writer.clean(path)
    if path.is_dir():
        files.remove(path)
    else:
        path.unlink(missing_ok=True)
    return True


LEFT = {"building": "building/*/*/", "run": "runs/*/.*/", "training": "training/*.safetensors"}
"""what the dead leave: builders their folders, who was saving a run its own, interrupted training where it stands"""


def _left(objects: Folder, clock: float) -> Iterator[Item]:
    for kind, pattern in LEFT.items():
        for path in sorted(objects.path.glob(pattern)):
            with suppress(FileNotFoundError):  # over, meanwhile
                holder = leases.read(path / BUILDER, clock) if kind == "building" else None
                held = (f"built by {holder.who}",) if holder and holder.alive else ()
                inside = [entry.stat() for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else []
                every = [path.stat(), *inside]
                size, written = sum(about.st_size for about in inside or every), max(about.st_mtime for about in every)
                if kind != "building" and clock - written < trash.IDLE:  # somebody is at it, and nothing else says so
                    continue
                name = path.parent.name if kind == "building" else ""
                yield Item(kind, name, str(path.relative_to(objects.path)), size, clock - written, held)


def _unpublished(objects: Bucket, held: Mapping[str, list[str]], clock: float) -> Iterator[Item]:
    """Objects under a write's name that no manifest names, here or in the trash.

    Where a manifest does not read, or that of a cache that is needed is gone, nobody can tell, and they stay.
    """
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for place, about in objects.listing("objects/").items():
        _, fingerprint, write = (*place.split("/"), "", "")[:3]
        found.setdefault((fingerprint, write), []).append((about.size, about.written))
    thrown = {entry.fingerprint for entry in trash.entries(str(objects))}
    for (fingerprint, write), parts in sorted(found.items()):
        age = clock - max(written for _, written in parts)
        if age < UNPUBLISHED or fingerprint in thrown:
            continue
        try:
            published = trash.published_write(objects, fingerprint)
            why = held.get(fingerprint, []) if published is None else []
        except Refused as error:
            published, why = None, [str(error)]
        if published != write:
            size = sum(size for size, _ in parts)
            yield Item("building", fingerprint, f"objects/{fingerprint}/{write}", size, age, tuple(why))
