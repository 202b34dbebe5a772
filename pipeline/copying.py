"""Caches copied between stores, with what a user sees of it."""

from pathlib import Path
from typing import Any

from pipeline.show import Show, duration, size
from store import transfer, writer
from store.catalog import Found
from store.errors import Damaged, Refused
from store.stores import Root, Stores, parse

COMPARED = {True: "every byte as it was published", False: "every object of the size it was published with (`verify` reads them)"}
"""how what was there before is known to be whole: in a folder, and in an object store"""


def other(said: str, what: str) -> Stores:
    """The other store of a push or pull. Raises Refused where it is none."""
    if not said or "," in said:
        raise Refused(f"give {what}=<a folder, or s3://bucket/prefix>, and one{f', not {said}' if said else ''}")
    try:
        return parse(said)
    except ValueError as error:
        raise Refused(str(error).replace("STORE=", f"{what}=")) from None


def copy(source: Stores, target: Root, prefixes: str, show: Show) -> dict[str, Any]:
    """Copy caches. prefixes: starts of fingerprints, comma-separated, or `all`. Raises Refused before anything is copied.

    Goes on past what is damaged or cannot be had, here or there, and tells all of it.
    """
    if not prefixes:
        raise Refused("give CACHE=<starts of fingerprints, comma-separated>, or CACHE=all; `readcache catalog` lists them")
    chosen: list[Found | Damaged | str]
    chosen = list(source.check().listing()) if prefixes == "all" else [source.named(p.strip()) for p in prefixes.split(",")]
    if isinstance(target, Path):
        writer.check_writable(target)
    copied, faults = [], []
    for item in chosen:
        try:
            if isinstance(item, Damaged):
                raise item
            found = source.pick(item) if isinstance(item, str) else item
            with show.progress(f"{found.fingerprint[:12]} to {target}", found.bytes, "bytes") as meter:
                published = transfer.copy(found.path, target, meter.add)
        except Refused as error:
            faults.append(str(error))
            show.line(f"not copied: {error}")
            continue
        differs = f"; what is there differs: {published.differs}; it stays" if published.differs else ""
        name = f"{found.fingerprint[:12]} {found.about['task']}/{found.about['split']}"
        spent = f"in {duration(meter.seconds)}" if published.new else f"already, {COMPARED[isinstance(target, Path)]}"
        show.line(f"{name}: {size(found.bytes)} at {published.path} {spent}{differs}")
        told = {"fingerprint": found.fingerprint, "path": str(published.path), "bytes": found.bytes, "new": published.new}
        copied.append(told | ({"differs": str(published.differs)} if published.differs else {}))
    return {"to": str(target), "caches": copied, "faults": faults}
