"""Train one head from open caches and score it: what `train` does once, and `ablate` many times."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config import Train
from pipeline.opening import Opened
from stages.access import Access, Choice, choose
from stages.evaluate import say, score
from stages.heads import Head
from stages.loader import Loader, at_once
from stages.shape import Shape, build, count
from stages.tasks import labelled
from stages.train import Schedule, Trained, hold_out, train
from store.errors import Refused

EVALUATION_BATCH = 256
"""examples that are evaluated at a time, at most"""
SAMPLE = 1024
"""examples that tell how the states spread, at most"""


class Loaders(NamedTuple):
    """The examples that train, that choose the epoch, and that score."""

    fit: Loader
    choose: Loader
    scored: dict[str, Loader]


class Fitted(NamedTuple):
    """A trained head and its scores on the evaluation splits."""

    head: Head
    outcome: Trained
    metrics: dict[str, dict[str, float]]


def reading(config: Train, opened: Opened, streams: list[str], device: torch.device) -> Choice:
    """How the caches of a run are read, all in the same way."""
    said = config.reading
    access = Access(said.access, said.memory_bytes, said.window_bytes, said.readers)
    return choose(access, opened.caches.values(), streams, device)


def loaders(
    config: Train, opened: Opened, seed: int, streams: list[str], device: torch.device, access: Access | None = None
) -> Loaders:
    """Split the train cache by the seed, and load what the head reads. Raises Refused where there is nothing to learn.

    access: chosen before; chosen here where left out.
    """
    task, labels = opened.task, opened.labels
    fit, choose = hold_out(labels[task.train], config.schedule.hold_out, seed)
    if task.kind == "classification" and len(np.unique(labels[task.train][fit])) < 2:
        only = task.classes[labels[task.train][fit][0]] if task.classes else ""
        raise Refused(f"every training label is {only!r}: there is nothing to tell apart; raise LIMIT, or mend the data")

    access = access or reading(config, opened, streams, device).access

    def load(split: str, examples: np.ndarray, batch: int | None = None) -> Loader:
        cache = opened.caches[split]
        size = batch or at_once(cache, streams, EVALUATION_BATCH)
        return Loader(cache, examples, labels[split], size, device, streams, access)

    scored = {split: load(split, labelled(labels[split])) for split in task.evaluation}
    return Loaders(load(task.train, fit, config.batch), load(task.train, choose), scored)


def fresh(opened: Opened, shape: Shape, answers: torch.Tensor | None, fit: Loader, seed: int) -> Head:
    """An untrained head on the loader's device, its weights from the seed. answers: (K, D) label words of a verbalizer."""
    torch.manual_seed(seed)
    head = build(shape, answers)
    if head.regression:
        head.standardise_labels(opened.labels[opened.task.train][fit.examples])
    head.to(fit.device)
    if shape.standardise and shape.head != "verbalizer":
        # the cache lies in shuffled order: its first examples are a random sample
        size = at_once(fit.cache, fit.streams, EVALUATION_BATCH)
        sample = Loader(fit.cache, np.sort(fit.examples)[:SAMPLE], fit.labels, size, fit.device, fit.streams, fit.access)
        head.standardise_states(sample.in_order())
    return head


def schedule(config: Train, seed: int) -> Schedule:
    """How to train, from the configuration."""
    said = config.schedule
    return Schedule(config.epochs, config.lr, said.weight_decay, said.warmup, said.clip, said.patience, seed)


def fit(
    head: Head, opened: Opened, loaded: Loaders, plan: Schedule, told: Callable[[dict[str, Any]], None] = lambda _: None
) -> Fitted:
    """Train a head, keep its best epoch, score it. One without parameters (label words on the final state) is scored as it is."""
    if count(head):
        outcome = train(head, opened.task, loaded.fit, loaded.choose, plan, told)
        head.load_state_dict(outcome.weights)
    else:
        outcome = Trained(0, {}, [])
    return Fitted(head, outcome, {s: score(opened.task, say(head, loader)) for s, loader in loaded.scored.items()})
