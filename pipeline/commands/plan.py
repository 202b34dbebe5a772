"""What stage one would do, before anything is spent. `extract` goes through the same door."""

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import store
from pipeline import recipe
from pipeline.build import Build, answers, lay_out, open_reading
from pipeline.config import Plan
from pipeline.lookup import label_column
from pipeline.show import Show, duration, size
from stages import depths, extract, images, inputs, sources, tasks
from stages.anatomy import Anatomy, describe, read_config
from stages.backbone import Backbone
from stages.device import pick
from stages.images import Processor
from stages.kinds import KINDS, article, tokens_of
from stages.tasks import Task
from store import writer
from store.codecs import codec, parse
from store.errors import Refused
from store.fingerprint import fingerprint
from store.manifest import Manifest
from store.stores import Root, Stores

SAMPLE_TOKENS = 4096
"""of each split that are run to estimate the time"""


class Part(NamedTuple):
    """A split: there already, or to be built."""

    fingerprint: str
    hit: Root | None
    found: Manifest
    """of the cache, or of the one to be"""
    build: Build | None


class Planned(NamedTuple):
    """All that stage one will do."""

    task: Task
    anatomy: Anatomy
    checkpoint: sources.Checkpoint
    parts: dict[str, Part]


def run(config: Plan, show: Show) -> dict[str, Any]:
    """The command `plan`."""
    planned = prepare(config)
    builds = {split: part.build for split, part in planned.parts.items() if part.build}
    backbone = Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device)) if builds else None
    seconds = {split: estimate(backbone, build) for split, build in builds.items() if backbone}
    document = {"task": planned.task.name, "splits": {s: summary(part, seconds.get(s, 0.0)) for s, part in planned.parts.items()}}
    free = free_bytes(config.store.workshop)
    needed = sum(part.found.bytes for part in planned.parts.values() if not part.hit)
    copied = ["reused"] if config.reuse else []
    show.table(
        ["split", "", "examples", "cut", "tokens", "rows", *copied, "bytes", "time", "fingerprint"],
        [
            [s, "hit" if p.hit else "miss", p.found.counts["examples"], p.found.counts["cut"], p.found.counts["tokens"],
             p.found.counts["rows"], *(sum(n for _, n in p.found.reused) for _ in copied), size(p.found.bytes),
             "" if p.hit else duration(seconds[s]), p.fingerprint[:12]]
            for s, p in planned.parts.items()
        ],
    )  # fmt: skip
    kept = "; ".join(", ".join(names) for names in recipe.states(next(iter(planned.parts.values())).found.recipe).values())
    most = "at most " if parse(config.codec)[1] else ""
    show.line(f"to write: {most}{size(needed)}; free under {config.store.workshop}: {size(free)}; states {kept}")
    return document | {"bytes_to_write": needed, "free_bytes": free}


def summary(part: Part, seconds: float) -> dict[str, Any]:
    """A split in the documents of `plan` and `extract`."""
    counts = part.found.counts
    return {
        "fingerprint": part.fingerprint, "hit": part.hit is not None, "examples": counts["examples"], "rows": counts["rows"],
        "bytes": part.found.bytes, "seconds": round(seconds, 3), "tokens": counts["tokens"], "cut": counts["cut"],
        "reused": sum(count for _, count in part.found.reused),
    }  # fmt: skip


def prepare(
    config: Plan,
    again: bool = False,
    checked: Callable[[recipe.Recipe], object] | None = None,
    copied_from: Iterable[str] | None = None,
) -> Planned:
    """Check everything that can be wrong, cheapest first, and lay out every split. Raises Refused; writes nothing.

    again: lay out even what is published already. checked: a caller's own check of the recipe, before data are read. copied_from:
    caches from which rows are copied; where left out, as --reuse says.
    """
    task = tasks.find(config.task)
    codec(config.codec)
    depths.parse(config.layers)
    pick(config.device)
    source = sources.data(task, config.data)
    checkpoint = sources.checkpoint(config.backbone, local=False)
    assert checkpoint is not None
    anatomy, processor = _anatomy(config, task, checkpoint)
    known = {
        split: recipe.complete(
            recipe.known(config, task, anatomy.kind, split, source.digest(split), checkpoint), anatomy, dtype="float32"
        )
        for split in wanted(config, task, source)
    }
    if checked:
        checked(next(iter(known.values())))
    reading = open_reading(config, task, checkpoint, anatomy, processor)
    hits = {split: None if again else _hit(config.store, known[split]) for split in known}
    if None in hits.values() and not again:
        writer.check_writable(config.store.workshop)
    splits = {split: inputs.load(task, source, split) for split in known if hits[split] is None}
    for split, loaded in splits.items():
        if not source.files:  # from the hub: the digest is known only now
            known[split]["data"]["digest"] = loaded.digest
            hits[split] = None if again else _hit(config.store, known[split])
    task = _settled(task, source, splits, {split: hit for split, hit in hits.items() if hit})
    if any(hit is None for hit in hits.values()) and "words" in next(iter(known.values())):
        reading = reading._replace(answers=answers(config, task, checkpoint, anatomy, reading.tokenizer))
    parts = {}
    for split, found in known.items():
        hit = hits[split]
        if hit:
            parts[split] = Part(hit.fingerprint, config.store.find(hit.fingerprint), hit.manifest, None)
        else:
            build = lay_out(config, task, anatomy, reading, splits[split], found, copied_from)
            parts[split] = Part(build.planned.fingerprint, None, build.planned, build)
    return Planned(task, anatomy, checkpoint, parts)


def _anatomy(config: Plan, task: Task, checkpoint: sources.Checkpoint) -> tuple[Anatomy, Processor | None]:
    """What the backbone gives, once it is clear that it reads what the task has, and keeps what the user asks for."""
    _, kind = read_config(checkpoint.path, config.backbone)
    reads, has = KINDS[kind].reads, "image" if task.image else "text"
    if reads != has:
        raise Refused(
            f"task {task.name} has {has}s, and backbone {config.backbone} is {article(kind)} backbone, which reads {reads}s; "
            f"choose another"
        )
    rule = tokens_of(kind, config.tokens)
    processor, pixels = images.processor(checkpoint) if reads == "image" else (None, None)
    anatomy = describe(checkpoint.path, config.backbone, pixels)
    if reads == "image" and rule.startswith("first") and anatomy.prefix == 0:
        raise Refused(f"backbone {config.backbone} has no class token, which tokens={rule} would keep; give TOKENS=mean or all")
    return anatomy, processor


def _settled(task: Task, source: sources.Source, splits: dict[str, inputs.Split], hits: dict[str, store.Cache]) -> Task:
    """The task with its classes named. Refuses a label outside them, in new data and in caches that are there already."""
    columns, where = {}, {}
    for split in (task.train, *task.evaluation):
        if split in hits:
            columns[split], where[split] = label_column(task, hits[split], split)
        elif split in splits:
            columns[split], where[split] = splits[split].columns[task.label], inputs.place(source, split)
    return tasks.settle(task, columns, where)[0]


def wanted(config: Plan, task: Task, source: sources.Source) -> list[str]:
    """The splits to extract, in the task's order."""
    every = [task.train, *task.evaluation, *task.unlabelled]
    there = [split for split in every if not source.files or split in source.files]
    if not source.files and task.name not in tasks.TASKS:
        there = [split for split in there if split not in task.unlabelled]  # a hub data set need not have a test split
    if config.splits is None:
        return there
    chosen = [split.strip() for split in config.splits.split(",")]
    for split in chosen:
        if split not in there:
            raise Refused(f"task {task.name} has no split {split!r} in {source.text}; it has {', '.join(there)}")
    return [split for split in there if split in chosen]


def _hit(stores: Stores, found: recipe.Recipe) -> store.Cache | None:
    if "digest" not in found["data"]:
        return None
    path = stores.find(fingerprint(found))
    return store.open(path) if path else None


def free_bytes(root: Path) -> int:
    """Free space under a root, in bytes."""
    return shutil.disk_usage(root).free


def check_disk(stores: Stores, parts: dict[str, Part]) -> None:
    """Refuse now if the disk cannot hold what will be written; what an interrupted extraction has left counts."""
    root = stores.workshop
    needed = sum(p.found.bytes - writer.left_behind(root, p.fingerprint) for p in parts.values() if not p.hit)
    free = free_bytes(root)
    if needed > free:
        raise Refused(
            f"the disk is too small: {size(needed)} are still to be written, {size(free)} are free under {root}; "
            f"choose TOKENS=first or mean, fewer LAYERS, CODEC=bf16, a LIMIT, or another STORE"
        )


def estimate(backbone: Backbone, build: Build) -> float:
    """Seconds that extracting a split will take: a sample of it is run and scaled up by tokens."""
    lengths = build.examples.lengths
    made, ends = build.planned.recipe, np.cumsum(lengths)
    count = max(1, int(np.searchsorted(ends, SAMPLE_TOKENS, "right")))
    spent = 0.0
    for _ in range(2):  # the first run warms up
        begun = time.perf_counter()
        extract.chunk(backbone, build.examples, range(count), build.states, made["tokens"], made["codec"])
        spent = time.perf_counter() - begun
    return spent * int(lengths[build.to_compute].sum()) / int(ends[count - 1])
