"""Scores of a saved run on a split, from the cache."""

import shlex
from typing import Any

import store
from pipeline import recipe, runs
from pipeline.config import Evaluate
from pipeline.lookup import label_column
from pipeline.runs import Run
from pipeline.show import Show
from stages import tasks
from stages.access import ONCE
from stages.device import pick
from stages.evaluate import say, score
from stages.loader import Loader
from store import Cache
from store.catalog import Found
from store.errors import Refused
from store.stores import Stores


def run(config: Evaluate, show: Show) -> dict[str, Any]:
    """The command `evaluate`."""
    device = pick(config.device)
    found = runs.find(config.store.home, config.run, config.task)
    task = found.task
    head, streams = runs.load_head(found).to(device), list(runs.load_shape(found).states)
    metrics, examples = {}, {}
    for split in [config.split] if config.split else task.evaluation:
        cache = cache_of(config.store, found, split)
        column, where = label_column(task, cache, split)
        labels = tasks.labels(task, *column, where)
        scored = tasks.labelled(labels)
        if not len(scored):
            raise Refused(f"{where} has no labels to score; `predict --run {found.path.name} --split {split}` gives the answers")
        metrics[split] = score(task, say(head, Loader(cache, scored, labels, config.batch, device, streams, ONCE)))
        examples[split] = len(scored)
    show.table(
        ["split", "examples", "metric", "score"],
        [[s, examples[s], metric, value] for s, values in metrics.items() for metric, value in values.items()],
    )
    return {"run": found.path.name, "task": task.name, "metrics": metrics, "examples": examples}


def cache_of(stores: Stores, run: Run, split: str) -> Cache:
    """The cache of a run's split: the one that it was trained or scored on, or its sibling for another split.

    Raises Refused where it is gone, saying how to get it back.
    """
    made, config = run.told["recipe"], run.told["config"]
    words = {"task": config["task"], "backbone": run.told["backbone"], "data": config["data"], "splits": split}
    words |= {name: made.get(name) for name in ("tokens", "layers", "codec", "max_length", "limit", "order_seed")}
    words |= {name: config.get(name) for name in ("prompt", "words")}
    options = " ".join(f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in words.items() if v is not None)
    again = f"extract it again: readcache extract {options}"
    fingerprint = run.told["fingerprints"].get(split)
    if fingerprint:
        path = stores.find(fingerprint)
        if path is None:
            raise Refused(f"run {run.path.name} needs cache {fingerprint[:12]} ({split}), which is gone from {stores}; {again}")
        return store.open(path)
    siblings = [
        item.path
        for item in stores.listing()
        if isinstance(item, Found)
        and recipe.family(item.recipe) == recipe.family(made)
        and item.recipe["data"]["split"] == split
        and item.about["task"] == run.task.name
    ]
    if len(siblings) != 1:
        known = ", ".join([*run.told["fingerprints"], *run.task.unlabelled])
        raise Refused(f"{len(siblings)} caches of split {split!r} match run {run.path.name} (splits: {known}); {again}")
    return store.open(siblings[0])
