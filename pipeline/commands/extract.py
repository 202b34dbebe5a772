"""Stage one: run the frozen backbone once and publish its states, a cache a split. A hit does no work."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.build import Build
from pipeline.cluster import run_parts
from pipeline.commands.plan import Part, Planned, check_disk, prepare, summary
from pipeline.config import Extract
from pipeline.recipe import Recipe
from pipeline.show import Show, duration, size
from stages import extract
from stages.backbone import Backbone
from stages.device import pick
from store import files, layout, manifest, writer


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
            path = _build(config, planned, split, part, opened, show)
            spent = duration(time.perf_counter() - begun)
            show.line(f"{split}: published {part.fingerprint[:12]}, {size(part.found.bytes)} at {path} in {spent}")
        document["splits"][split] = summary(part, 0.0 if part.hit else time.perf_counter() - begun)
    return document


def _build(config: Extract, planned: Planned, split: str, part: Part, opened: Backbone | None, show: Show) -> Path:
    build = part.build
    assert build is not None
    with writer.building(config.store, part.fingerprint) as folder:
        place = build.placement
        receipts = {number: writer.finished(folder, number) for number in range(place.chunks)}
        missing = [number for number, receipt in receipts.items() if receipt is None]
        sizes = place.first[1:] - place.first[:-1]
        with show.progress(f"{planned.task.name} {split}", len(build.examples.source), "examples") as meter:
            if len(missing) < place.chunks:
                show.line(f"{split}: resuming, {place.chunks - len(missing)} of {place.chunks} chunks are there")
                meter.skip(sum(int(sizes[number]) for number in receipts if number not in missing))
            if opened:
                task = functools.partial(_chunk_here, build, folder, opened, meter.add)
            else:
                task = functools.partial(_chunk_elsewhere, config, split, folder.resolve())
            for number in run_parts(task, missing, config.dask):
                meter.add(0 if opened else int(sizes[number]))
        objects = {path: r for n in range(place.chunks) for path, r in (writer.finished(folder, n) or {}).items()}
        for path, data in build.tables.items():
            objects |= writer.write_table(folder, path, data, build.arrays[path])
        for path, text in layout.metadata(build.arrays, manifest.attributes(build.planned.recipe)).items():
            objects[path] = files.write(folder / "cache" / path, text)
        return writer.publish(config.store, folder, build.planned._replace(objects=objects))


def _chunk_here(build: Build, folder: Path, backbone: Backbone, told: Callable[[int], None], number: int) -> int:
    """Build and write one chunk; returns its number."""
    examples = range(int(build.placement.first[number]), int(build.placement.first[number + 1]))
    recipe = build.planned.recipe
    data = extract.chunk(backbone, build.examples, examples, build.states, recipe["tokens"], recipe["codec"], told)
    writer.write_chunk(folder, number, data, build.arrays)
    return number


def _chunk_elsewhere(config: Extract, split: str, folder: Path, number: int) -> int:
    """The same on a dask worker, which lays the split out for itself, once."""
    planned, backbone = _opened(config.model_copy(update={"splits": split}))
    build = planned.parts[split].build
    assert build is not None
    return _chunk_here(build, folder, backbone, lambda _: None, number)


@functools.lru_cache(maxsize=1)
def _opened(config: Extract) -> tuple[Planned, Backbone]:
    planned = prepare(config, again=True)
    return planned, Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
