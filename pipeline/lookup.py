"""Which caches in the store are the ones that a training run means, without loading backbone, tokenizer or data."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import recipe
from pipeline.config import Train
from stages import sources
from stages.tasks import Task
from store import Cache, catalog
from store.catalog import Found
from store.errors import Refused
from store.fingerprint import canonical
from store.stores import Root

_BY_HAND = "choose one with CACHE=<fingerprint prefix>"


class Looked(NamedTuple):
    """What was found."""

    caches: dict[str, Root] | None
    """split -> cache; None where one is missing"""
    near: list[str]
    """for a message: caches of the same task, in what they differ, and damaged ones; the last three"""
    unchecked: list[str]
    """what was not at hand, so that names had to decide"""


def look(config: Train, task: Task) -> Looked:
    """Find the caches of the splits that training needs. Raises Refused where several match."""
    checkpoint = sources.checkpoint(config.backbone, local=True)
    source = sources.data(task, config.data, partly=True)
    digests = {split: source.digest(split) for split in source.files}
    needed = (task.train, *task.evaluation)
    unchecked = [] if checkpoint else [f"backbone {config.backbone}: its files are not here"]
    unchecked += [f"{split} of {task.name}: {source.text} is not at hand" for split in needed if not digests.get(split)]
    near = []
    every = []
    for found in config.store.listing():
        if isinstance(found, Found):
            every.append(found)
        else:
            near.append(str(found))
    picked = _picked(config, every)
    families: dict[bytes, dict[str, list[Found]]] = {}
    for split in needed:
        digest = digests.get(split)
        names = ({} if checkpoint else {"backbone": Path(config.backbone).name}) | ({} if digest else {"task": task.name})
        for found in every:
            about, theirs = found.about, found.recipe
            kind = theirs["backbone"].get("kind", "")
            if (picked and not _goes_with(found, picked)) or not recipe.possible(config, task, kind):
                continue
            wanted = (recipe.identity if picked else recipe.known)(config, task, kind, split, digest, checkpoint)
            if catalog.agrees(theirs, wanted) and catalog.agrees(about, names):
                family = families.setdefault(canonical(recipe.family(theirs)), {})
                family.setdefault(split, []).append(found)
            elif about.get("task") == task.name and about.get("split") == split:
                differs = catalog.differences(theirs, wanted) + catalog.differences(about, names)
                near.append(f"{found.fingerprint[:12]} ({split}) differs in {'; '.join(differs)}")
    whole_families = [family for family in families.values() if len(family) == 1 + len(task.evaluation)]
    if len(whole_families) > 1 or any(len(f) > 1 for family in whole_families for f in family.values()):
        several = [_describe(found) for family in whole_families for group in family.values() for found in group]
        raise Refused(f"several caches match task {task.name}; {_BY_HAND}: {'; '.join(several)}")
    if picked and not whole_families:
        raise Refused(
            f"cache {picked.fingerprint[:12]} does not serve task {task.name}: {_describe(picked)}; "
            f"{'; '.join(near) or 'its other splits are not there'}; extract again, or choose another"
        )
    caches = {split: group[0].path for split, group in whole_families[0].items()} if whole_families else None
    return Looked(caches, near[-3:], unchecked)


def _picked(config: Train, every: list[Found]) -> Found | None:
    if config.cache is None:
        return None
    found = [item for item in every if item.fingerprint.startswith(config.cache)]
    families = {canonical(recipe.family(item.recipe)) for item in found}
    if not config.cache or len(families) != 1:
        known = "; ".join(_describe(item) for item in (found or every)) or "none"
        raise Refused(f"CACHE={config.cache} names {len(found)} caches under {config.store}; there are: {known}")
    return found[0]


def label_column(task: Task, cache: Cache, split: str) -> tuple[tuple[np.ndarray, list[Any] | None], str]:
    """A cache's label column, and what to call it in a message. Raises Refused where the cache carries none."""
    where = f"cache {cache.fingerprint[:12]}, split {split}"
    if task.label not in cache.columns():
        raise Refused(f"{where}: no label column {task.label!r}; it carries {', '.join(cache.columns()) or 'none'}")
    return cache.column(task.label), where


def _goes_with(found: Found, picked: Found) -> bool:
    """Whether a cache is the picked one, or a sibling of it for another split."""
    one, two = found.recipe, picked.recipe
    return found == picked or (recipe.family(one) == recipe.family(two) and one["data"]["split"] != two["data"]["split"])


def _describe(found: Found) -> str:
    about, made = found.about, found.recipe
    told: dict[str, Any] = {"tokens": made["tokens"], "layers": made["layers"], "codec": made["codec"]}
    told |= {"max_length": made.get("max_length"), "limit": made.get("limit"), "order_seed": made.get("order_seed")}
    choices = " ".join(f"{name}={value}" for name, value in told.items() if value is not None)
    return f"{found.fingerprint[:12]} {about['task']}/{about['split']} on {about['backbone']} {choices}"
