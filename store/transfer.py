"""Copy a cache from one store to another, every object compared with its digest on the way.

To a folder by way of `store.writer`, published by a rename. To an object store under a name of this write's own, so that nobody
else's objects, whether new or left behind, can be taken for these.
"""

import hashlib
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from store import catalog, compare, files, leases, manifest, verify, writer
from store.bucket import Bucket
from store.errors import Damaged, Refused, damaged
from store.manifest import Manifest
from store.objects import Folder, Objects
from store.stores import Root, root_of
from store.writer import Published

THREADS = 8
"""objects on their way at a time"""

Told = Callable[[int], None]
"""of bytes that have arrived"""


def copy(where: Root, root: Root, told: Told = lambda _: None) -> Published:
    """Copy a published cache to a store; where it is there already, how this differs.

    Raises Damaged for a damaged source, and for a damaged one that is there: of one in an object store sizes are compared, not
    every byte fetched.
    """
    with leases.using(where):
        objects, described = verify.placed(where)
        described = described._replace(write="")
        found = catalog.find(root, described.fingerprint)
        if found:
            _whole(found, where)
            told(described.bytes)
            return Published(found, compare.difference(found, where), new=False)
        return push(objects, described, Bucket(root), told) if isinstance(root, str) else _pull(objects, described, root, told)


def _whole(found: Root, where: Root) -> None:
    """Refuse to take for a copy of a cache what lies there under its name, and is not as it was published."""
    for fault in verify.faults(found, digests=isinstance(found, Path)):
        if fault.kind == "damaged":
            raise Damaged(
                f"{found}/{fault.place} is not as it was published ({fault.what}), and nothing is copied over it: `readcache "
                f"repair` with STORE={root_of(found)},{root_of(where)} and the options that extracted it mends it from here"
            )
        if fault.kind == "unread":
            raise Refused(f"{'/'.join(filter(None, (str(found), fault.place)))}: {fault.what}; nothing is copied over it")


def push(objects: Objects, described: Manifest, root: Bucket, told: Told = lambda _: None) -> Published:
    """Copy a cache's objects to an object store and publish it there. Raises Damaged for what is not as its manifest says."""
    write = secrets.token_hex(8)
    target, address = f"objects/{described.fingerprint}/{write}", f"{root}/caches/{described.fingerprint}"

    def send(place: str) -> int:
        root.put(f"{target}/{place}", _had(objects, described, place))
        return described.objects[place].size

    with ThreadPoolExecutor(THREADS, "push") as pool:
        for size in pool.map(send, sorted(described.objects)):
            told(size)
    text = manifest.dump(described._replace(write=write))
    if root.create(f"caches/{described.fingerprint}/{manifest.NAME}", text):
        return Published(address)
    root.delete(f"{target}/{place}" for place in described.objects)
    winner = manifest.load(root.below(f"caches/{described.fingerprint}"))
    return Published(address, None if winner.objects == described.objects else _differ(objects, address), new=False)


def _differ(objects: Objects, address: str) -> compare.Difference | None:
    return compare.difference(address, objects.path) if isinstance(objects, Folder) else None


def _pull(objects: Objects, described: Manifest, root: Path, told: Told) -> Published:
    with writer.building(root, described.fingerprint, "copy") as mine:
        siblings = [path for path in mine.folder.parent.iterdir() if path != mine.folder]

        def fetch(place: str) -> int:
            receipt, target = described.objects[place], mine.folder / "cache" / place
            for other in siblings:  # one that was killed had it already
                held = other / "cache" / place
                if held.is_file() and held.stat().st_size == receipt.size and files.sha256(held) == receipt.sha256:
                    files.link(held, target)
                    break
            else:
                files.put(target, _had(objects, described, place))
            return receipt.size

        with ThreadPoolExecutor(THREADS, "pull") as pool:
            for size in pool.map(fetch, sorted(described.objects)):
                told(size)
        for other in siblings:
            writer.clean(other)
        return writer.publish(root, mine.folder, described)


def _had(objects: Objects, described: Manifest, place: str) -> bytes:
    receipt = described.objects[place]
    try:
        data = objects.read(place, receipt.size)
    except FileNotFoundError:
        raise damaged(objects, place, "there is no such object") from None
    except ValueError as error:
        raise damaged(objects, place, str(error)) from None
    except OSError as error:
        raise Refused(f"{objects}/{place} cannot be read ({error.strerror}); see to its rights and its disk") from None
    if hashlib.sha256(data).hexdigest() != receipt.sha256:
        raise damaged(objects, place, "its sha256 is not the manifest's, and it is not copied")
    return data
