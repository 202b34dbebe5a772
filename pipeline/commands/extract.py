"""Stage one: run the frozen backbone once and publish its states, a cache a split. A hit does no work."""

import functools
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
from stages.device import pick
from store import files, layout, manifest, writer
from store.files import Receipt

QUEUE_BYTES = 64 << 20
"""of rows that wait to be written while the backbone goes on, in bytes"""


def run(config: Extract, show: Show, checked: Callable[[Recipe], object] | None = None) -> dict[str, Any]:
    """The command `extract`. checked: a caller's own check of the recipe, before any work."""
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
            path = publish_split(config, planned, split, part, opened, show)
            part = part._replace(found=manifest.load(path))  # what is compressed is known by size only now
            spent = duration(time.perf_counter() - begun)
            show.line(f"{split}: published {part.fingerprint[:12]}, {size(part.found.bytes)} at {path} in {spent}")
        document["splits"][split] = summary(part, 0.0 if part.hit else time.perf_counter() - begun)
    return document


def publish_split(config: Extract, planned: Planned, split: str, part: Part, opened: Backbone | None, show: Show) -> Path:
    """Build and publish one split; returns its path. opened: the backbone, where chunks are built in this process."""
    build = part.build
    assert build is not None
    with writer.building(config.store, part.fingerprint) as folder:
        place = build.placement
        found = {number: writer.finished(folder, number) for number in range(place.chunks)}
        done = {number: receipts for number, receipts in found.items() if receipts is not None}
        missing = [number for number in found if number not in done]
        sizes = place.first[1:] - place.first[:-1]
        with show.progress(f"{planned.task.name} {split}", len(build.examples.source), "examples") as meter:
            if done:
                show.line(f"{split}: resuming, {len(done)} of {place.chunks} chunks are there")
                meter.skip(sum(int(sizes[number]) for number in done))
            objects: dict[str, Receipt] = {}
            beside = functools.partial(_tables, build, folder, objects)
            if config.dask is None:
                assert opened
                done |= chunks_here(build, folder, opened, missing, meter.add, beside)
            else:
                beside()
                task = functools.partial(_chunk_elsewhere, config, split, folder.resolve())
                for number, receipts in run_parts(task, missing, config.dask):
                    done[number] = receipts
                    meter.add(int(sizes[number]))
        objects |= {path: receipt for receipts in done.values() for path, receipt in receipts.items()}
        return writer.publish(config.store, folder, build.planned._replace(objects=objects))


def _tables(build: Build, folder: Path, objects: dict[str, Receipt]) -> None:
    """Write all that is no chunk of states and is known before the first forward pass; its receipts go into `objects`."""
    for path, data in build.tables.items():
        objects |= writer.write_table(folder, path, data, build.arrays[path])
    for path, text in layout.metadata(build.arrays, manifest.attributes(build.planned.recipe)).items():
        objects[path] = files.put(folder / "cache" / path, text)


def chunks_here(
    build: Build,
    folder: Path,
    backbone: Backbone,
    numbers: list[int],
    told: Callable[[int], None] = lambda _: None,
    before: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, Receipt]]:
    """Build and write chunks, the writing of one beside the forward passes of the next; returns their receipts.

    told: called with the number of examples of each batch that is done. before: written before all chunks, beside the first
    forward passes.
    """
    recipe, first = build.planned.recipe, build.placement.first
    parts = [(number, range(int(first[number]), int(first[number + 1]))) for number in numbers]
    into: dict[str, np.ndarray] = {}  # one chunk's, for all of them: fresh memory costs more than what is copied into it
    whole, receipts = {}, {}

    def take(piece: extract.Piece) -> None:
        if piece.chunk not in whole:
            if not into:
                into.update({path: np.empty(build.arrays[path].chunks, build.arrays[path].dtype) for path in piece.arrays})
            part = range(int(first[piece.chunk]), int(first[piece.chunk + 1]))
            whole[piece.chunk] = extract.Chunk(backbone, build.examples, part, build.states, recipe["tokens"], into)
        whole[piece.chunk].add(piece)
        if piece.last:
            done = whole.pop(piece.chunk)
            assert done.left == 0, (piece.chunk, done.left)  # rows that never came would be zeros under a good checksum
            receipts[piece.chunk] = writer.write_chunk(folder, piece.chunk, done.arrays, build.arrays)

    with behind(QUEUE_BYTES) as do:
        do(0, before)
        for piece in extract.pieces(backbone, build.examples, parts, build.states, recipe["tokens"], recipe["codec"]):
            do(piece.bytes, take, piece)
            told(len(piece.examples))
    return receipts


def _chunk_elsewhere(config: Extract, split: str, folder: Path, number: int) -> tuple[int, dict[str, Receipt]]:
    """The same for one chunk on a dask worker, which lays the split out for itself, once; returns its number and receipts."""
    planned, backbone = _opened(config.model_copy(update={"splits": split}))
    build = planned.parts[split].build
    assert build is not None
    return number, chunks_here(build, folder, backbone, [number])[number]


@functools.lru_cache(maxsize=1)
def _opened(config: Extract) -> tuple[Planned, Backbone]:
    planned = prepare(config, again=True)
    return planned, Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
