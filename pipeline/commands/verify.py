"""Caches compared with what was published, byte by byte; and with what the backbone says today."""

from typing import Any

import numpy as np

import store
from pipeline.build import Build
from pipeline.commands.plan import Planned, prepare
from pipeline.show import Show, size
from pipeline.upkeep import Verify
from stages import batching, extract
from stages.backbone import Backbone
from stages.device import pick
from stages.packing import unpack
from store import Cache, catalog, codecs, leases, verify
from store.errors import Refused
from store.order import shuffled
from store.stores import Root, root_of


def run(config: Verify, show: Show) -> dict[str, Any]:
    """The command `verify`: of one cache, of those of a task that are recomputed, or of all; each in every store that has it."""
    document: dict[str, Any] = {"caches": 0, "bytes": 0, "faults": []}
    chosen: list[str] | None = None
    if config.recompute:
        planned = prepare(config, again=True)
        chosen = [part.fingerprint for part in planned.parts.values()]
        missing = [split for split, part in planned.parts.items() if config.store.find(part.fingerprint) is None]
        if missing:
            raise Refused(f"{config.store} has no cache of {config.task}, {', '.join(missing)}, with these options; see `plan`")
    elif config.cache:
        chosen = [config.store.named(config.cache)]
    for root in config.store.check().roots:
        for where in catalog.places(root):
            if chosen is None or _name(where) in chosen:
                _verify(where, document, show)
    if config.recompute:
        document["recomputed"] = _recomputed(config, planned, show, document["faults"])
    for fault in document["faults"]:
        show.line(f"{fault['cache']}/{fault['place']}: {fault['what']}")
    if document["faults"]:
        show.line("`readcache repair` with the options that extracted a cache mends what is damaged")
    return document


def _name(where: Root) -> str:
    """A cache's fingerprint, by where it lies."""
    return str(where).rsplit("/", 1)[1]


def _verify(where: Root, document: dict[str, Any], show: Show) -> None:
    with leases.using(where):
        wrong = list(verify.faults(where))
    if wrong and catalog.find(root_of(where), _name(where)) is None:
        return  # to the trash, meanwhile
    document["faults"] += [{"cache": str(where), "place": fault.place, "what": fault.what} for fault in wrong]
    held = verify.bytes_of(where)
    document["caches"], document["bytes"] = document["caches"] + 1, document["bytes"] + held
    show.line(f"{where}: {size(held)}, {f'{len(wrong)} faults' if wrong else 'as published'}")


def _recomputed(config: Verify, planned: Planned, show: Show, faults: list[dict[str, str]]) -> dict[str, Any]:
    """Of each split how far what the backbone says today is from what is stored; a damaged cache is passed over."""
    damaged = {fault["cache"] for fault in faults}
    backbone = Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
    told: dict[str, Any] = {}
    for split, part in planned.parts.items():
        assert part.build
        where = config.store.find(part.fingerprint)
        if where is None or str(where) in damaged:
            show.line(f"{split}: not recomputed, its cache is damaged")
            continue
        cache = store.open(where)
        if not np.array_equal(cache.table("key"), part.build.tables["examples/key"]):
            faults.append({"cache": str(where), "place": "examples/key", "what": "the data's inputs are others today"})
            continue
        worst, count, exact = _distance(cache, part.build, backbone, config.recompute)
        most = codecs.codec(cache.codec).tolerance
        told[split] = {"examples": count, "relative": worst, "tolerance": most, "identical": exact}
        show.line(f"{split}: {count} examples again: {'bit for bit the same' if exact else f'off by {worst:.2g} of a state'}")
        if not worst <= most:
            what = f"a state is off by {worst:.2g} of its norm; for {cache.codec} at most {most:g} is due to hardware or batches"
            faults.append({"cache": str(where), "place": f"{cache.main}/values", "what": what})
    return told


def _distance(cache: Cache, build: Build, backbone: Backbone, wanted: int) -> tuple[float, int, bool]:
    """Over about so many examples, in the batches that the plan says: the largest distance of a state, relative to its norm; how
    many they were; and whether all numbers are the same as stored."""
    recipe, first, lengths = build.planned.recipe, build.placement.first, build.examples.lengths
    worst, done, exact = 0.0, 0, True
    for number in shuffled(build.placement.chunks, 0).tolist():
        part = np.arange(first[number], first[number + 1])
        for group in batching.by_length(lengths[part]):
            examples = part[group]
            found = extract.rows(backbone, build.examples.collate(examples), build.states, recipe["tokens"], recipe["codec"])
            for stream in build.states:
                held = cache.gather(examples, stream)
                fresh = {path.split("/")[1]: a.cpu() for path, a in found.arrays.items() if path.startswith(f"{stream}/")}
                exact &= all(np.array_equal(held[name], values.numpy()) for name, values in fresh.items())
                there = codecs.codec(cache.codec).decode({n: held[n] for n in fresh}, cache.width)
                here = unpack(fresh, recipe["codec"], cache.width).numpy()
                norm = np.linalg.norm(there, axis=2).clip(min=1e-12)
                worst = max(worst, float((np.linalg.norm(here - there, axis=2) / norm).max()))
            done += len(group)
            if done >= wanted:
                return worst, done, exact
    return worst, done, exact
