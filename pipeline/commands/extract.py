"""Stage one: run the frozen backbone once and publish its states, a cache a split. A hit does no work."""

import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.build import Build
from pipeline.cluster import run_parts
from pipeline.commands.plan import Part, Planned, check_disk, prepare, summary
from pipeline.config import Extract
from pipeline.recipe import Recipe
from pipeline.show import Show, duration, size
from stages import extract
from stages.ahead import behind
from stages.backbone import Backbone
from stages.device import pick, signature
from store import files, layout, leases, manifest, transfer, trash, writer
from store.bucket import Bucket
from store.errors import Refused
from store.files import Receipt
from store.leases import Lease
from store.objects import Folder, at
from store.stores import Root
from store.writer import Building, Published

QUEUE_BYTES = 64 << 20
"""of rows that wait to be written while the backbone goes on, in bytes"""
POLL = 1.0
"""between two looks at another who extracts the same, in seconds"""
TOLD = 10.0
"""between two lines about that, in seconds"""
ATTEMPTS = 3
"""at building a cache whose folder is cleaned away meanwhile"""


def run(config: Extract, show: Show, checked: Callable[[Recipe], object] | None = None) -> dict[str, Any]:
    """The command `extract`. checked: a caller's own check of the recipe, before any work."""
    if config.reuse and config.dask:
        raise Refused("REUSE copies rows in this process, and DASK builds chunks elsewhere; leave one of them out")
    planned = prepare(config, checked=checked)
    check_disk(config.store, planned.parts)
    document: dict[str, Any] = {"task": planned.task.name, "splits": {}}
    opened = None
    for split, part in planned.parts.items():
        begun = time.perf_counter()
        if part.hit:
            show.line(f"{split}: hit {part.fingerprint[:12]}, {size(part.found.bytes)} at {part.hit}; nothing to do")
        else:
            if opened is None and config.dask is None:
                opened = Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
            published = publish_split(config, planned, split, part, opened, show)
            part = part._replace(found=manifest.load(at(published.path)))  # what is compressed is known by size only now
            spent = duration(time.perf_counter() - begun)
            what = f"{part.fingerprint[:12]}, {size(part.found.bytes)} at {published.path}"
            show.line(f"{split}: published {what} in {spent}" if published.new else f"{split}: {what} is there, after {spent}")
        document["splits"][split] = summary(part, 0.0 if part.hit else time.perf_counter() - begun)
    return document


def publish_split(config: Extract, planned: Planned, split: str, part: Part, opened: Backbone | None, show: Show) -> Published:
    """Build and publish one split; where it is. opened: the backbone, where chunks are built in this process.

    Of several who extract the same, one is waited for, unless --no-wait; what it has finished when it dies is taken over.
    """
    base = config.store.workshop
    for _ in range(ATTEMPTS):
        lease = _turn(config, base, split, part.fingerprint, show)
        if found := config.store.find(part.fingerprint) or _from_trash(config, split, part.fingerprint, show):
            if lease:
                Lease(lease).close()
            return Published(found, new=False)
        try:
            published = _publish(config, base, planned, split, part, opened, show, lease)
        except writer.Vanished as error:
            show.line(f"{split}: its folder was cleaned away ({error}); building it again")
            continue
        if published.differs:
            show.line(
                f"{split}: another extraction has published it meanwhile: {published.differs} (other hardware or libraries); "
                f"the published cache stays, and is used"
            )
        return published
    raise Refused(f"{split}: {base}/building is cleaned away again and again; see who deletes there, then run again")


def _from_trash(config: Extract, split: str, fingerprint: str, show: Show) -> Root | None:
    """The cache, brought back, where it is in the trash and whole."""
    root = config.store.target
    entry = next((entry for entry in trash.entries(root) if entry.fingerprint == fingerprint), None)
    if entry is None or not trash.whole(root, entry) or not trash.restore(root, entry):
        return None
    show.line(f"{split}: {fingerprint[:12]} was in the trash, and is back")
    return config.store.find(fingerprint)


def _turn(config: Extract, base: Path, split: str, fingerprint: str, show: Show) -> Path | None:
    """The lease to extract, once nobody else has it; None where there is none to be had, or the cache is published meanwhile."""
    told = float("-inf")
    while True:
        try:
            lease = leases.take(base, fingerprint)
        except OSError:
            return None  # not ours to write: it is advice only
        if lease or config.no_wait or config.store.find(fingerprint):
            return lease
        holder = leases.read(base / "leases" / fingerprint / leases.EXTRACT)
        if holder and time.monotonic() - told > TOLD:
            far = f", {holder.done / holder.total:.0%}" if holder.total else ""
            show.line(f"{split}: {holder.who} is extracting this{far}; waiting (NO_WAIT=1 extracts beside)")
            told = time.monotonic()
        time.sleep(POLL)


def _publish(
    config: Extract, base: Path, planned: Planned, split: str, part: Part, opened: Backbone | None, show: Show, lease: Path | None
) -> Published:
    build = part.build
    assert build is not None
    device = "dask" if config.dask else signature(pick(config.device))
    origin = hashlib.sha256(f"{device} {build.reused.digest if build.reused else ''}".encode()).hexdigest()[:16]
    with writer.building(base, part.fingerprint, origin, lease) as mine:
        if build.reused:
            build.reused.check()
            show.line(f"{split}: {int((~build.to_compute).sum()):,} examples are copied from other caches")
        objects = _build(config, planned, split, build, mine, opened, show)
        done = build.planned._replace(objects=objects)
        target = config.store.target
        if isinstance(target, Path):
            return writer.publish(target, mine.folder, done)
        files.put(mine.folder / "cache" / manifest.NAME, manifest.dump(done))
        with show.progress(f"{planned.task.name} {split} to {target}", done.bytes, "bytes") as meter:
            return transfer.push(Folder(mine.folder / "cache"), done, Bucket(target), meter.add)


def _build(
    config: Extract, planned: Planned, split: str, build: Build, mine: Building, opened: Backbone | None, show: Show
) -> dict[str, Receipt]:
    """Write all of a cache but its manifest; the receipts by path."""
    place, total = build.placement, len(build.examples.source)
    done = writer.take_over(mine, {number: build.chunk_paths(number) for number in range(place.chunks)})
    missing = [number for number in range(place.chunks) if number not in done]
    sizes = place.first[1:] - place.first[:-1]
    with show.progress(f"{planned.task.name} {split}", total, "examples") as meter:
        if done:
            show.line(f"{split}: resuming, {len(done)} of {place.chunks} chunks are there")
            meter.skip(sum(int(sizes[number]) for number in done))

        def told(count: int) -> None:
            meter.add(count)
            mine.told(meter.done, total)

        objects: dict[str, Receipt] = {}
        beside = functools.partial(tables, build, mine.folder, objects)
        if config.dask is None:
            assert opened
            done |= chunks_here(build, mine, opened, missing, told, beside)
        else:
            beside()
            task = functools.partial(_chunk_elsewhere, config, split, mine.folder.resolve(), mine.origin)
            for number, receipts in run_parts(task, missing, config.dask):
                done[number] = receipts
                told(int(sizes[number]))
    objects |= {path: receipt for receipts in done.values() for path, receipt in receipts.items()}
    assert objects.keys() == build.planned.objects.keys(), objects.keys() ^ build.planned.objects.keys()
    return objects


def tables(build: Build, folder: Path, objects: dict[str, Receipt]) -> None:
    """Write all that is no chunk of states and is known before the first forward pass; its receipts go into `objects`."""
    for path, data in build.tables.items():
        objects |= writer.write_table(folder, path, data, build.arrays[path])
    for path, text in layout.metadata(build.arrays, manifest.attributes(build.planned.recipe)).items():
        objects[path] = files.put(folder / "cache" / path, text)


def chunks_here(
    build: Build,
    mine: Building,
    backbone: Backbone,
    numbers: list[int],
    told: Callable[[int], None] = lambda _: None,
    before: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, Receipt]]:
    """Build and write chunks, the writing of one beside the forward passes of the next; returns their receipts.

    told: called with the number of examples of each batch that is done. before: written before all chunks, beside the first
    forward passes.
    """
    recipe, first, wanted = build.planned.recipe, build.placement.first, build.to_compute
    parts = [(number, range(int(first[number]), int(first[number + 1]))) for number in numbers]
    into: dict[str, np.ndarray] = {}  # one chunk's, for all of them: fresh memory costs more than what is copied into it
    whole: dict[int, extract.Chunk] = {}
    receipts: dict[int, dict[str, Receipt]] = {}

    def begin(number: int, part: range, paths: list[str]) -> None:
        if not into:
            into.update({path: np.empty(build.arrays[path].chunks, build.arrays[path].dtype) for path in paths})
        whole[number] = extract.Chunk(backbone, build.examples, part, build.states, recipe["tokens"], into)
        for piece in build.reused.pieces(number, part) if build.reused else ():
            whole[number].add(piece)

    def end(number: int) -> None:
        done = whole.pop(number)
        assert done.left == 0, (number, done.left)  # rows that never came would be zeros under a good checksum
        receipts[number] = writer.write_chunk(mine.folder, number, done.arrays, build.arrays, mine.origin)

    def take(piece: extract.Piece) -> None:
        if piece.chunk not in whole:
            begin(piece.chunk, range(int(first[piece.chunk]), int(first[piece.chunk + 1])), list(piece.arrays))
        whole[piece.chunk].add(piece)
        if piece.last:
            end(piece.chunk)

    def copy(number: int, part: range) -> None:
        begin(number, part, [path for path in build.arrays if path.split("/")[0] in build.states])
        end(number)

    with behind(QUEUE_BYTES) as do:
        do(0, before)
        for number, part in parts if build.reused else ():
            computed = int(wanted[part.start : part.stop].sum())
            if not computed:
                do(0, copy, number, part)
            told(len(part) - computed)
        for piece in extract.pieces(backbone, build.examples, parts, build.states, recipe["tokens"], recipe["codec"], wanted):
            do(piece.bytes, take, piece)
            told(len(piece.examples))
    return receipts


def _chunk_elsewhere(config: Extract, split: str, folder: Path, origin: str, number: int) -> tuple[int, dict[str, Receipt]]:
    """The same for one chunk on a dask worker, which lays the split out for itself, once; returns its number and receipts."""
    planned, backbone = _opened(config.model_copy(update={"splits": split}))
    build = planned.parts[split].build
    assert build is not None
    return number, chunks_here(build, Building(folder, None, origin), backbone, [number])[number]


@functools.lru_cache(maxsize=1)
def _opened(config: Extract) -> tuple[Planned, Backbone]:
    planned = prepare(config, again=True)
    return planned, Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
