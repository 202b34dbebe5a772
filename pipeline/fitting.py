"""Train heads from open caches and score them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config import Train
from pipeline.opening import Opened
from stages import baselines
from stages.access import Access, Choice, choose
from stages.evaluate import say_all, score
from stages.heads import Head
from stages.loader import Loader, at_once
from stages.shape import Shape, build, count
from stages.stack import stacks
from stages.standing import Keeper
from stages.tasks import labelled
from stages.train import NOWHERE, Learner, Schedule, Trained, hold_out, train
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
    """Split the train cache by the seed, and load what the heads read. Raises Refused where there is nothing to learn.

    access: chosen before; chosen here where left out.
    """
    task, labels = opened.task, opened.labels
    fit, choose = hold_out(labels[task.train], config.schedule.hold_out, seed)
    check_classes(opened, fit)
    access = access or reading(config, opened, streams, device).access

    def load(split: str, examples: np.ndarray, batch: int | None = None) -> Loader:
        cache = opened.caches[split]
        size = batch or at_once(cache, streams, EVALUATION_BATCH)
        return Loader(cache, examples, labels[split], size, device, streams, access)

    scored = {split: load(split, labelled(labels[split])) for split in task.evaluation}
    return Loaders(load(task.train, fit, config.batch), load(task.train, choose), scored)


def check_classes(opened: Opened, fit: np.ndarray) -> None:
    """Refuse a classification whose training examples are all of one class."""
    task = opened.task
    found = np.unique(opened.labels[task.train][fit])
    if task.kind == "classification" and len(found) < 2:
        only = task.classes[found[0]] if task.classes else ""
        raise Refused(
            f"{task.name}: every training label ({task.label}) is {only!r}: there is nothing to tell apart; raise LIMIT, or mend "
            f"the data"
        )


def plain(opened: Opened, loaded: Loaders, shape: Shape) -> dict[str, dict[str, dict[str, float]]]:
    """The scores of majority and linear probe on a task's own labels."""

    def own(loader: Loader, split: str) -> Loader:
        if loader.labels is opened.labels[split]:
            return loader
        return Loader(
            loader.cache, loader.examples, opened.labels[split], loader.batch, loader.device, loader.streams, loader.access
        )

    train = opened.task.train
    scored = {split: own(loader, split) for split, loader in loaded.scored.items()}
    return baselines.beside(opened.task, own(loaded.fit, train), own(loaded.choose, train), scored, shape.pool, shape.depths)


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


def learner(config: Train, opened: Opened, shape: Shape, answers: torch.Tensor | None, fit: Loader, seed: int) -> Learner:
    """A fresh head that is to learn. answers: (K, D) label words of a verbalizer. Raises Refused where it has one class."""
    check_classes(opened, fit.examples)
    head = fresh(opened, shape, answers, fit, seed)
    return Learner(head, shape, opened.task, opened.labels[opened.task.train], schedule(config, seed))


def fit(
    learners: Sequence[Learner],
    opened: Sequence[Opened],
    loaded: Loaders,
    seed: int,
    told: Callable[[int, dict[str, Any]], None] = lambda number, line: None,
    seen: Callable[[int], None] = lambda examples: None,
    keeper: Keeper = NOWHERE,
) -> list[Fitted]:
    """Train heads from one stream, keep of each its best epoch, score it. One without parameters (label words on the final state)
    is scored as it is, and one that found no number for its loss is not scored.

    opened: of each its task and its labels by split, on the same caches; a split that is none of theirs is scored by its loader's
    labels. seed: of the order of batches. keeper: as `stages.train` has it.
    """
    taught = [number for number, each in enumerate(learners) if count(each.head)]
    outcomes = [Trained(0, {}, []) for _ in learners]
    if taught:
        some = train(
            [learners[n] for n in taught], loaded.fit, loaded.choose, seed, lambda m, line: told(taught[m], line), seen, keeper
        )
        for number, outcome in zip(taught, some, strict=True):
            outcomes[number] = outcome
            learners[number].head.load_state_dict(outcome.weights or learners[number].head.state_dict())
    learned = [n for n, each in enumerate(learners) if outcomes[n].epoch or not count(each.head)]
    metrics: list[dict[str, dict[str, float]]] = [{} for _ in learners]
    made = stacks([learners[n].head for n in learned], [learners[n].shape for n in learned], [0] * len(learned))
    for split, loader in loaded.scored.items():
        for (which, _), words in zip(made, say_all([stack for _, stack in made], loader), strict=True):
            for number, said in zip((learned[m] for m in which), words, strict=True):
                metrics[number][split] = score(opened[number].task, said, opened[number].labels.get(split))
    return [Fitted(*item) for item in zip((each.head for each in learners), outcomes, metrics, strict=True)]


def fit_one(learner: Learner, opened: Opened, loaded: Loaders, seed: int) -> Fitted:
    """Train and score one head. Raises Refused where its loss was no number."""
    (fitted,) = fit([learner], [opened], loaded, seed)
    if not fitted.metrics:
        raise Refused(f"the loss was no number: the learning rate {learner.schedule.lr:g} is too high; lower LR")
    return fitted
