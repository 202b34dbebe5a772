"""What stage one would do, before anything is spent. `extract` goes through the same door."""

import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import store
from pipeline import recipe
from pipeline.config import Plan
from pipeline.lookup import label_column
from pipeline.show import Show, duration, size
from stages import depths, extract, inputs, selection, sources, tasks
from stages.backbone import Anatomy, Backbone, describe
from stages.device import pick
from stages.tasks import Task
from store import catalog, layout, manifest, writer
from store.codecs import codec
from store.errors import Refused
from store.fingerprint import fingerprint
from store.layout import Array, Placement
from store.manifest import Manifest

SAMPLE_TOKENS = 4096
"""of each split that are run to estimate the time"""


class Build(NamedTuple):
    """A split that is to be extracted."""

    tokens: inputs.Tokens
    placement: Placement
    arrays: dict[str, Array]
    tables: dict[str, np.ndarray]
    """what is stored of the examples, by array path"""
    planned: Manifest


class Part(NamedTuple):
    """A split: there already, or to be built."""

    fingerprint: str
    hit: Path | None
    found: Manifest
    """of the cache, or of the one to be"""
    build: Build | None


class Planned(NamedTuple):
    """All that stage one will do."""

    task: Task
    anatomy: Anatomy
    checkpoint: sources.Checkpoint
    states: list[str]
    parts: dict[str, Part]


def run(config: Plan, show: Show) -> dict[str, Any]:
    """The command `plan`."""
    planned = prepare(config)
    builds = {split: part.build for split, part in planned.parts.items() if part.build}
    backbone = Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device)) if builds else None
    seconds = {split: estimate(config, backbone, build, planned.states) for split, build in builds.items() if backbone}
    document = {"task": planned.task.name, "splits": {s: summary(part, seconds.get(s, 0.0)) for s, part in planned.parts.items()}}
    free = free_bytes(config.store)
    needed = sum(part.found.bytes for part in planned.parts.values() if not part.hit)
    show.table(
        ["split", "", "examples", "cut", "tokens", "rows", "bytes", "time", "fingerprint"],
        [
            [s, "hit" if p.hit else "miss", p.found.counts["examples"], p.found.counts["cut"], p.found.counts["tokens"],
             p.found.counts["rows"], size(p.found.bytes), "" if p.hit else duration(seconds[s]), p.fingerprint[:12]]
            for s, p in planned.parts.items()
        ],
    )  # fmt: skip
    show.line(f"to write: {size(needed)}; free under {config.store}: {size(free)}; states {', '.join(planned.states)}")
    return document | {"bytes_to_write": needed, "free_bytes": free}


def summary(part: Part, seconds: float) -> dict[str, Any]:
    """A split in the documents of `plan` and `extract`."""
    counts = part.found.counts
    return {
        "fingerprint": part.fingerprint, "hit": part.hit is not None, "examples": counts["examples"], "rows": counts["rows"],
        "bytes": part.found.bytes, "seconds": round(seconds, 3), "tokens": counts["tokens"], "cut": counts["cut"],
    }  # fmt: skip


def prepare(config: Plan, again: bool = False) -> Planned:
    """Check everything that can be wrong, cheapest first, and lay out every split. Raises Refused; writes nothing.

    again: lay out even what is published already.
    """
    task = tasks.find(config.task)
    selection.check(config.tokens)
    codec(config.codec)
    depths.parse(config.layers)
    pick(config.device)
    writer.check_writable(config.store)
    source = sources.data(task, config.data)
    checkpoint = sources.checkpoint(config.backbone, local=False)
    assert checkpoint is not None
    anatomy = describe(checkpoint.path, config.backbone)
    states = depths.names(config.layers, anatomy.depth, anatomy.final)
    tokenizer = inputs.tokenizer(checkpoint)
    longest = min(anatomy.longest, tokenizer.model_max_length)
    least = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2) + len(task.text)
    if config.max_length < least:
        raise Refused(f"max_length {config.max_length} leaves no room for text: task {task.name} needs at least {least}")
    if config.max_length > longest:
        raise Refused(f"max_length {config.max_length} is above the {longest} tokens that backbone {config.backbone} takes")
    known = {
        split: recipe.complete(
            recipe.known(config, task, split, source.digest(split), checkpoint),
            kind=anatomy.kind,
            states=states,
            everything=states == depths.names("all", anatomy.depth, anatomy.final),
            attention=anatomy.attention,
            dtype="float32",
        )
        for split in wanted(config, task, source)
    }
    hits = {split: None if again else _hit(config.store, known[split]) for split in known}
    splits = {split: inputs.load(task, source, split) for split in known if hits[split] is None}
    for split, loaded in splits.items():
        if not source.files:  # from the hub: the digest is known only now
            known[split]["data"]["digest"] = loaded.digest
            hits[split] = None if again else _hit(config.store, known[split])
    _check_labels(task, source, splits, {split: hit for split, hit in hits.items() if hit})
    parts = {}
    for split, found in known.items():
        hit = hits[split]
        if hit:
            parts[split] = Part(hit.fingerprint, hit.path, hit.manifest, None)
        else:
            build = _lay_out(config, task, anatomy, tokenizer, splits[split], found)
            parts[split] = Part(build.planned.fingerprint, None, build.planned, build)
    return Planned(task, anatomy, checkpoint, states, parts)


def _check_labels(task: Task, source: sources.Source, splits: dict[str, inputs.Split], hits: dict[str, store.Cache]) -> None:
    """Refuse a label outside its classes, in new data and in caches that are there already."""
    columns, where = {}, {}
    for split in (task.train, *task.evaluation):
        if split in hits:
            columns[split], where[split] = label_column(task, hits[split], split)
        elif split in splits:
            columns[split], where[split] = splits[split].columns[task.label], inputs.place(source, split)
    tasks.settle(task, columns, where)


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


def _hit(root: Path, found: recipe.Recipe) -> store.Cache | None:
    if "digest" not in found["data"]:
        return None
    path = catalog.find(root, fingerprint(found))
    return store.open(path) if path else None


def _lay_out(config: Plan, task: Task, anatomy: Anatomy, tokenizer: Any, split: inputs.Split, found: recipe.Recipe) -> Build:
    rows = inputs.order(len(split.dataset), config.limit, config.order_seed)
    tokens = inputs.tokenize(tokenizer, split.dataset, task.text, rows, config.max_length)
    kept = selection.kept(tokens.lengths, config.tokens)
    states = found["states"]
    row_bytes = sum(np.dtype(d).itemsize for d in codec(config.codec).dtypes.values()) * len(states) * anatomy.width
    placement = layout.place(kept, row_bytes, recipe.CHUNK_BYTES)
    tables: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "start": (placement.start, {}),
        "length": (kept.astype(np.int64), {}),
        "row": (rows.astype(np.int64), {"meaning": "the example's row in the data set's split, from 0"}),
        "offset": (tokens.offset, {"meaning": "where an example's tokens begin in input_ids"}),
        "input_ids": (tokens.ids, {}),
        "key": (tokens.keys(), {"meaning": "blake2b-128 of the example's input_ids and token_type_ids"}),
    }
    if tokens.types is not None:
        tables["token_type_ids"] = (tokens.types, {})
    for name, (values, distinct) in split.columns.items():
        few = {} if distinct is None else {"values": distinct}
        tables[layout.column_path(name)] = (values[rows], {"column": name} | few)
    arrays = layout.state_arrays("encoder", config.codec, placement, states, anatomy.width)
    for name, (values, attributes) in tables.items():
        arrays[f"examples/{name}"] = layout.flat_array(values, **attributes)
    about = {
        "task": task.name, "split": split.name, "backbone": Path(config.backbone).name, "max_length": config.max_length,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "zarr", "numpy")},
    }  # fmt: skip
    counts = {
        "examples": len(rows), "rows": int(kept.sum()), "tokens": int(tokens.lengths.sum()), "cut": tokens.cut,
        "states": len(states), "width": anatomy.width,
    }  # fmt: skip
    sizes = {path: array.chunk_bytes() for path, array in layout.chunk_paths(arrays)}
    sizes |= {path: len(text) for path, text in layout.metadata(arrays, manifest.attributes(found)).items()}
    planned = manifest.planned(found, about, counts, sizes)
    return Build(tokens, placement, arrays, {f"examples/{n}": v for n, (v, _) in tables.items()}, planned)


def free_bytes(root: Path) -> int:
    """Free space under a root, in bytes."""
    return shutil.disk_usage(root).free


def check_disk(root: Path, parts: dict[str, Part]) -> None:
    """Refuse now if the disk cannot hold what will be written; what an interrupted extraction has left counts."""
    needed = sum(p.found.bytes - writer.left_behind(root, p.fingerprint) for p in parts.values() if not p.hit)
    free = free_bytes(root)
    if needed > free:
        raise Refused(
            f"the disk is too small: {size(needed)} are still to be written, {size(free)} are free under {root}; "
            f"choose TOKENS=first or mean, fewer LAYERS, CODEC=bf16, a LIMIT, or another STORE"
        )


def estimate(config: Plan, backbone: Backbone, build: Build, states: list[str]) -> float:
    """Seconds that extracting a split will take: a sample of it is run and scaled up by tokens."""
    tokens = build.tokens
    count = max(1, int(np.searchsorted(tokens.offset, SAMPLE_TOKENS, "right")) - 1)
    spent = 0.0
    for _ in range(2):  # the first run warms up
        begun = time.perf_counter()
        extract.chunk(backbone, tokens, range(count), states, config.tokens, config.codec)
        spent = time.perf_counter() - begun
    return spent * int(tokens.offset[-1]) / int(tokens.offset[count])
