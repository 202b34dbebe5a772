"""Put back what was published, object by object: only bytes with the digest that the manifest says."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from store import catalog, files, manifest, verify
from store.bucket import Bucket
from store.errors import Refused
from store.manifest import Manifest
from store.objects import Folder, Objects, at
from store.stores import Root


def put(objects: Objects, built: Path, places: Iterable[str]) -> None:
    """Put files that were built, and are known to have the right digests, in the places of damaged ones."""
    for place in sorted(places):
        _put(objects, place, (built / place).read_bytes())


def manifest_from(where: Root, fingerprint: str, other: Root) -> bool:
    """Put another store's manifest of a cache in the place of a damaged one; whether it has one.

    It says which bytes are the cache's: what is here is compared with it then.
    """
    found = catalog.find(other, fingerprint)
    try:
        described = manifest.load(at(found)) if found else None
    except Refused:
        return False
    if described is None or described.fingerprint != fingerprint or not isinstance(where, Path):
        return False  # in an object store only its own says where its objects are
    _put(Folder(where), manifest.NAME, manifest.dump(described._replace(write="")))
    return True


def copy(objects: Objects, described: Manifest, places: Iterable[str], other: Root) -> set[str]:
    """Put what another store has whole in the places of damaged objects; which ones it had."""
    where = catalog.find(other, described.fingerprint)
    if where is None:
        return set()
    try:
        theirs, _ = verify.placed(where)
    except Refused:
        return set()
    had = set()
    for place in places:
        try:
            data = theirs.read(place, described.objects[place].size)
        except (OSError, ValueError, Refused):
            continue
        if hashlib.sha256(data).hexdigest() == described.objects[place].sha256:
            _put(objects, place, data)
            had.add(place)
    return had


def remove(objects: Objects, places: Iterable[str]) -> None:
    """Remove what is no part of a cache."""
    _writable(objects).delete(places)


def _put(objects: Objects, place: str, data: bytes) -> None:
    held = _writable(objects)
    if isinstance(held, Folder):
        for folder in [held.path / parent for parent in Path(place).parents if parent.name]:
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                folder.unlink()  # a link would lead the bytes elsewhere
        path = held.path / place
        if path.is_dir() and not path.is_symlink():
            raise Refused(f"{path} is a folder where a file was published; move it away, then repair again")
        files.write(path, data)
    else:
        held.put(place, data)


def _writable(objects: Objects) -> Folder | Bucket:
    if not isinstance(objects, Folder | Bucket):
        raise Refused(f"{objects} cannot be written from here; repair a folder or s3://…")
    return objects
