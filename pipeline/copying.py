"""Caches copied between stores, with what a user sees of it."""

from pathlib import Path
from typing import Any

from pipeline.show import Show, duration, size
from store import transfer, writer
from store.catalog import Found
from store.errors import Refused
from store.stores import Root, Stores, parse


def other(said: str, what: str) -> Stores:
    """The other store of a push or pull. Raises Refused where it is none."""
    if not said or "," in said:
        raise Refused(f"give {what}=<a folder, or s3://bucket/prefix>, and one{f', not {said}' if said else ''}")
    try:
        return parse(said)
    except ValueError as error:
        raise Refused(str(error).replace("STORE=", f"{what}=")) from None


def copy(source: Stores, target: Root, prefixes: str, show: Show) -> dict[str, Any]:
    """Copy caches. prefixes: starts of fingerprints, comma-separated, or `all`. Raises Refused before anything is copied."""
    if not prefixes:
        raise Refused("give CACHE=<starts of fingerprints, comma-separated>, or CACHE=all; `readcache catalog` lists them")
    if prefixes == "all":
        chosen = [item for item in source.check().listing() if isinstance(item, Found)]
    else:
        chosen = [source.pick(prefix.strip()) for prefix in prefixes.split(",")]
    if isinstance(target, Path):
        writer.check_writable(target)
    copied = []
    for found in chosen:
        with show.progress(f"{found.fingerprint[:12]} to {target}", found.bytes, "bytes") as meter:
            published = transfer.copy(found.path, target, meter.add)
        differs = f"; what is there differs: {published.differs}; it stays" if published.differs else ""
        name = f"{found.fingerprint[:12]} {found.about['task']}/{found.about['split']}"
        show.line(f"{name}: {size(found.bytes)} at {published.path} in {duration(meter.seconds)}{differs}")
        told = {"fingerprint": found.fingerprint, "path": str(published.path), "bytes": found.bytes}
        copied.append(told | ({"differs": str(published.differs)} if published.differs else {}))
    return {"to": str(target), "caches": copied}
