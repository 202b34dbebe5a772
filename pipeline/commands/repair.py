"""Damaged caches mended in place: by what another store has whole, or by extracting the damaged chunks again."""

from typing import Any

from pipeline.commands import extract
from pipeline.commands.plan import Part, Planned, prepare
from pipeline.config import Extract
from pipeline.show import Show
from pipeline.upkeep import Repair
from stages.backbone import Backbone
from stages.device import pick
from store import catalog, leases, mend, trash, verify, writer
from store.errors import Damaged, Refused
from store.files import Receipt
from store.manifest import Manifest
from store.objects import Objects
from store.stores import Root, Stores
from store.verify import Fault


def run(config: Repair, show: Show) -> dict[str, Any]:
    """The command `repair`: of the first store; the others are only read."""
    planned = prepare(config, again=True)
    document: dict[str, Any] = {"task": planned.task.name, "splits": {}}
    for split, part in planned.parts.items():
        where = catalog.find(config.store.target, part.fingerprint)
        if where is None:
            show.line(f"{split}: no cache {part.fingerprint[:12]} under {config.store.target}; `readcache extract` makes it")
            continue
        with leases.using(where):
            wrong = list(verify.faults(where))
            if wrong:
                _mend(config, planned, split, part, where, wrong, show)
            still = list(verify.faults(where)) if wrong else []
        if still:
            raise Refused(f"{where}/{still[0].place} is still damaged ({still[0].what}); move it away and extract again")
        places = [fault.place for fault in wrong]
        document["splits"][split] = {"fingerprint": part.fingerprint, "damaged": places, "mended": places}
        mended = f"mended: {len(wrong)} file{'s' if wrong[1:] else ''}"
        show.line(f"{split}: {where} {mended if wrong else 'is as published'}")
    if not document["splits"]:
        raise Refused(f"{config.store.target} has no cache of {planned.task.name} with these options; `readcache plan` says more")
    return document


def _mend(config: Repair, planned: Planned, split: str, part: Part, where: Root, wrong: list[Fault], show: Show) -> None:
    """Bring back what is wrong with a cache. Raises Refused where the published bytes cannot be had here."""
    others = config.store.roots[1:]
    for fault in wrong:
        if fault.kind == "unread":
            raise Refused(f"{where}/{fault.place}: {fault.what}; see to the disk, rights or connection, then repair again")
    try:
        objects, described = verify.placed(where)
    except Damaged:
        # without its manifest nothing here says which bytes were published
        if not any(mend.manifest_from(where, part.fingerprint, other) for other in others):
            _anew(config, planned, split, part, show)
            return
        objects, described = verify.placed(where)
        wrong = list(verify.faults(where))
    if described.fingerprint != part.fingerprint:
        raise Refused(f"{where}: {wrong[0].what}")
    mend.remove(objects, [fault.place for fault in wrong if fault.kind == "extra"])
    left = [fault.place for fault in wrong if fault.kind == "damaged"]
    if not set(left) <= described.objects.keys():
        raise Refused(f"{where}: {wrong[0].what}: no file is damaged, the cache was made like that; move it away")
    for other in others:
        copied = mend.copy(objects, described, left, other)
        if copied:
            show.line(f"{split}: {len(copied)} files copied from {other}")
        left = [place for place in left if place not in copied]
    if left:
        _rebuild(config, planned, split, part, described, set(left), objects, show)


def _anew(config: Repair, planned: Planned, split: str, part: Part, show: Show) -> None:
    """Extract all of a cache again; what is there goes to the trash."""
    root = config.store.target
    again = Extract.part_of(config, split).model_copy(update={"store": Stores((root,))})
    backbone = Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
    show.line(f"{split}: the manifest is damaged: the cache goes to the trash, and all of it is extracted again")
    trash.throw(root, part.fingerprint)
    extract.publish_split(again, planned, split, part, backbone, show)


def _rebuild(
    config: Repair, planned: Planned, split: str, part: Part, described: Manifest, wanted: set[str], objects: Objects, show: Show
) -> None:
    """Build damaged files again beside, and take those that have the digests that were published."""
    if described.reused:  # rows that were copied are to be copied again
        sources = [fingerprint for fingerprint, _ in described.reused]
        part = prepare(config.model_copy(update={"splits": split}), again=True, copied_from=sources).parts[split]
    build = part.build
    assert build
    numbers = [number for number in range(build.placement.chunks) if wanted & set(build.chunk_paths(number))]
    with writer.building(config.store.workshop, part.fingerprint, "repair") as mine:
        made: dict[str, Receipt] = {}
        extract.tables(build, mine.folder, made)
        if numbers:
            show.line(f"{split}: {len(numbers)} of {build.placement.chunks} chunks are extracted again")
            backbone = Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
            for receipts in extract.chunks_here(build, mine, backbone, numbers).values():
                made |= receipts
        other = sorted(place for place in wanted if made.get(place) != described.objects[place])
        mend.put(objects, mine.folder / "cache", wanted - set(other))
    if other:
        raise Refused(
            f"{objects}/{other[0]}{f' and {len(other) - 1} more' if other[1:] else ''}: here it comes out with other last bits "
            f"than were published (other hardware, threads or libraries): repair where it was extracted, name a store that has "
            f"it whole (STORE=this,other), or remove {objects} and extract again"
        )
