"""The caches that stage two trains from: found, or extracted first; their labels; the shape of a head on them."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

import store
from pipeline.config import Extract, Train
from pipeline.lookup import label_column, look
from pipeline.recipe import Recipe, check_words, states, words
from pipeline.show import Show, size
from stages import depths, tasks
from stages.access import check_codec
from stages.kinds import KINDS, article, check_rule, pool_of
from stages.shape import Shape, check_names
from stages.tasks import Task
from store import Cache, leases, transfer
from store.errors import Refused
from store.stores import Root, root_of


class Opened(NamedTuple):
    """What a head can be trained from."""

    task: Task
    """with its classes named"""
    caches: dict[str, Cache]
    """by split"""
    labels: dict[str, np.ndarray]
    """by split, (N,)"""
    unlabelled: dict[str, int]
    """how many examples of each split have no label"""
    unchecked: list[str]
    """what was not at hand to compare the caches with"""

    @property
    def recipe(self) -> Recipe:
        """Of the train split."""
        return self.caches[self.task.train].manifest.recipe


@contextmanager
def using(*opened: Opened) -> Iterator[None]:
    """Say that caches are in use, so that nobody's `gc` takes them: until what was trained is saved, and holds them itself."""
    with leases.using(*dict.fromkeys(cache.where for each in opened for cache in each.caches.values())):
        yield


def check(config: Train) -> Task:
    """Refuse what can be refused by name alone; returns the task."""
    task = tasks.find(config.task)
    if config.label not in (None, task.label):
        # another column of the same data: its classes are found in it
        task = replace(task, label=config.label, classes=None, words=None)
    check_rule(config.tokens)
    check_codec(config.codec, config.reading.access)
    check_names(config.cell)
    if config.head == "verbalizer":
        answers = words(config, task)
        if task.kind == "regression" or not answers:
            raise Refused(
                f"HEAD=verbalizer answers with label words, and task {task.name} has none: give WORDS=a,b in the order of its "
                f"classes, or `words:` in its file"
                if task.kind == "classification"
                else f"HEAD=verbalizer answers with label words, and {task.name} is a regression; leave HEAD out"
            )
    if config.cache is None:
        kept = depths.parse(config.layers)
        if kept is not None and not any(kept):
            raise Refused(f"layers {config.layers} keeps no block, and READ runs over block outputs; add some of 1 … L")
        if config.read.initial == "embedding" and kept is not None and 0 not in kept:
            raise Refused(f"read.initial=embedding needs layer 0, and layers is {config.layers}; add 0 to it")
    depths.parse(config.read.layers)
    return task


def shape_of(config: Train, task: Task, recipe: Recipe, width: int = 1, **more: Any) -> Shape:
    """The head that is asked for, on caches of that recipe. Raises Refused where they do not go together."""
    kind, rule, read = recipe["backbone"]["kind"], recipe["tokens"], config.read
    if config.head == "verbalizer" and not KINDS[kind].speaks:
        speak = ", ".join(name for name, about in KINDS.items() if about.speaks)
        raise Refused(
            f"HEAD=verbalizer needs a backbone with an output embedding ({speak}); {config.backbone} is {article(kind)}; "
            f"leave HEAD out"
        )
    check_words(config, kind)
    every = states(recipe)
    if read.joiner == "attention" and len(every) == 1:
        raise Refused(
            f"read.joiner=attention needs an encoder-decoder and all its tokens; these are tokens={rule} of {article(kind)}: "
            f"leave it out"
        )
    streams = every if read.joiner != "none" else dict(list(every.items())[-1:])
    return Shape(
        width, streams, task.outputs, pool_of(kind, rule, config.pool), config.hidden, config.cell, read.aggregate, read.initial,
        read.scale_in, read.scale_out, read.bidirectional, read.layers, config.head, read.dropout,
        KINDS[kind].standardise if read.standardise is None else read.standardise, **more,
    )  # fmt: skip


def open_caches(config: Train, task: Task, show: Show) -> Opened:
    """Find or extract the caches of train and the evaluation splits, and check them and their labels."""
    found = look(config, task)
    if found.caches is not None:
        caches = {split: store.open(_near(config, path, show)) for split, path in found.caches.items()}
        shape_of(config, task, caches[task.train].manifest.recipe)
        if found.unchecked:
            unchecked = "; ".join(found.unchecked)
            show.line(f"not compared with the cache: {unchecked}; the cache was chosen by the names in its manifest")
    elif config.no_extract:
        near = f"; near: {'; '.join(found.near)}" if found.near else ""
        raise Refused(f"no cache under {config.store} matches task {task.name}, and --no-extract forbids to make one{near}")
    else:
        for line in found.near:
            show.line(f"not used: {line}")
        caches = {split: store.open(_near(config, path, show)) for split, path in _extract(config, task, show).items()}
    for split, cache in caches.items():
        show.line(f"{split}: cache {cache.fingerprint[:12]}, {len(cache.length):,} examples, {size(cache.manifest.bytes)}")
    return _labelled(task, caches, found.unchecked if found.caches else [], show)


def _extract(config: Train, task: Task, show: Show) -> dict[str, Root]:
    # only now is the backbone's side needed: where the cache is there, transformers need not be
    extract = importlib.import_module("pipeline.commands.extract")
    asked = Extract.part_of(config, ",".join((task.train, *task.evaluation)))
    if config.head == "verbalizer":
        asked = asked.model_copy(update={"words": ",".join(words(config, task))})  # they must be there, then
    made = extract.run(asked, show, checked=lambda recipe: shape_of(config, task, recipe))["splits"]
    found = {split: config.store.find(said["fingerprint"]) for split, said in made.items()}
    for split, path in found.items():
        if path is None:
            raise Refused(
                f"cache {made[split]['fingerprint'][:12]} ({split}) was removed meanwhile; run again, and pin what must stay"
            )
    return {split: path for split, path in found.items() if path}


def _near(config: Train, where: Root, show: Show) -> Root:
    """Where a cache is read: where it is, or a copy of it in the first folder of STORE."""
    home = config.store.home
    if not config.reading.mirror or root_of(where) == home:
        return where
    show.line(f"copying {where} to {home}")
    return transfer.copy(where, home).path


def _labelled(task: Task, caches: dict[str, Cache], unchecked: list[str], show: Show) -> Opened:
    columns, where = {}, {}
    for split, cache in caches.items():
        columns[split], where[split] = label_column(task, cache, split)
    task, labels = tasks.settle(task, columns, where)
    for split in task.evaluation:
        if not len(tasks.labelled(labels[split])):
            raise Refused(f"split {split} of {task.name} has no labels: it cannot be scored")
        caches[split].check()  # these are read last: what is wrong with them is said first
    unlabelled = {split: int(len(known) - len(tasks.labelled(known))) for split, known in labels.items()}
    if any(unlabelled.values()):
        show.line(f"without a label, and left out: {', '.join(f'{count:,} of {s}' for s, count in unlabelled.items() if count)}")
    return Opened(task, caches, labels, unlabelled, unchecked)


def label_words(config: Train, opened: Opened, shape: Shape) -> torch.Tensor | None:
    """The label words' rows (K, D) for a verbalizer. Raises Refused where the cache carries not those that are asked for."""
    if shape.head != "verbalizer":
        return None
    cache = opened.caches[opened.task.train]
    held, asked = cache.manifest.recipe.get("words", []), words(config, opened.task)
    name = f"cache {cache.fingerprint[:12]}"
    if held != list(asked):
        raise Refused(f"{name} has the label words {', '.join(held) or '(none)'}, not {', '.join(asked)}; leave CACHE out")
    if cache.words is None:
        raise Refused(
            f"{name} carries no rows for the label words {', '.join(asked)}: one of them is several tokens or not in the "
            f"vocabulary, or the model's logits are no product with an output embedding; give WORDS=a,b in the classes' order"
        )
    if len(cache.words) != shape.outputs:
        raise Refused(f"{len(cache.words)} label words for the {shape.outputs} classes {', '.join(opened.task.classes or ())}")
    return torch.from_numpy(cache.words.copy())
