"""What nobody needs any more, and, with --delete, away with it."""

from collections import defaultdict
from typing import Any

from pipeline import runs
from pipeline.show import Show, duration, size
from pipeline.upkeep import Gc
from store import gc
from store.errors import Damaged, Refused

DAY = 24 * 3600.0


def run(config: Gc, show: Show) -> dict[str, Any]:
    """The command `gc`, of the first store: others' are theirs."""
    root, grace = config.store.check().target, config.grace * DAY

    def held() -> dict[str, list[str]]:
        found = defaultdict(list)
        for saved in runs.listing(config.store.home):
            if isinstance(saved, Damaged):
                raise Refused(f"{saved}; gc cannot tell which caches it needs: mend it, or remove its folder")
            for fingerprint in saved.told["fingerprints"].values():
                found[fingerprint].append(f"run {saved.path.name}")
        return found

    items = list(gc.look(root, held))
    going = [item for item in items if item.goes(grace)]
    rows = [
        [i.kind, i.place if i.kind != "trash" else i.fingerprint[:12], size(i.bytes), duration(i.age), _why(i, grace)]
        for i in items
    ]
    if rows:
        show.table(["", "what", "size", "age", ""], rows)
    document: dict[str, Any] = {
        "deleted": config.delete, "bytes": sum(item.bytes for item in going),
        "items": [{"kind": item.kind, "fingerprint": item.fingerprint, "place": item.place, "bytes": item.bytes,
                   "seconds": round(item.age), "held": list(item.held), "goes": item.goes(grace)} for item in items],
    }  # fmt: skip
    if config.delete:
        done = list(gc.collect(root, items, grace, held))
        document["done"] = [{"kind": item.kind, "fingerprint": item.fingerprint, "what": what} for item, what in done]
        document["faults"] = [told for told in document["done"] if told["what"].startswith((gc.NOT, gc.STILL))]
        for item, what in done:
            show.line(f"{item.kind} {item.fingerprint[:12] or item.place}: {what}")
        if any(what == "moved to the trash" for _, what in done):
            when = f"a gc in {config.grace:g} days" if config.grace else "the next gc"
            show.line(f"{when} deletes them; until then one brings back what is held again")
    elif going:
        show.line(f"{len(going)} would go, {size(document['bytes'])}; --delete (DELETE=1) does it: caches by way of the trash")
    else:
        show.line("nothing would go")
    return document


def _why(item: gc.Item, grace: float) -> str:
    if item.held:
        return f"held: {', '.join(item.held[:3])}{' …' if len(item.held) > 3 else ''}"
    if not item.goes(grace):
        return "too young"
    return "goes to the trash" if item.kind == "cache" else "is deleted"
