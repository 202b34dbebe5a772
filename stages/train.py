"""Train M heads from one stream: AdamW, warm-up then linear decay, clipping, early stopping, best epoch: of each its own."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.evaluate import say_all, score
from stages.heads import Batch, Head
from stages.loader import Loader
from stages.optimise import AdamW
from stages.shape import Shape
from stages.stack import Stack, stacks
from stages.standing import Keeper, Nowhere, Standing, of_stack, to_stack
from stages.tasks import Task, labelled
from store.errors import Refused
from store.order import shuffled

NOWHERE = Nowhere()


@dataclass(frozen=True)
class Schedule:
    """How to train a head."""

    epochs: int = 10
    lr: float = 1e-3
    """peak learning rate"""
    weight_decay: float = 0.01
    warmup: float = 0.06
    """share of all steps over which the rate rises"""
    clip: float = 1.0
    """largest norm of the gradient"""
    patience: int = 3
    """epochs without a better score before training stops"""
    seed: int = 0
    """of dropout"""

    def rate(self, done: float) -> float:
        """Learning rate after the share `done` of all examples of all epochs."""
        return self.lr * min(1.0, done / self.warmup if self.warmup else 1.0, (1 - done) / (1 - self.warmup))


class Learner(NamedTuple):
    """A head that is to learn."""

    head: Head
    """fresh"""
    shape: Shape
    """of equal ones, but for dropout, a stack is made"""
    task: Task
    labels: np.ndarray
    """(N,) of the cache that trains; of learners that train together the same examples have one"""
    schedule: Schedule


class Trained(NamedTuple):
    """The outcome of training."""

    epoch: int
    """the best, counted from 1; 0 where there is none, since the loss was no number in the first"""
    weights: dict[str, Tensor]
    """of the best epoch, on the CPU"""
    curve: list[dict[str, Any]]
    """a line an epoch: loss, score on the choosing part, learning rate, seconds since training began"""
    lost: int = 0
    """the epoch in which its loss was no number, and training stopped; 0 for none"""


class _Group:
    """Heads of one shape that still learn."""

    def __init__(self, which: list[int], stack: Stack, learners: Sequence[Learner], columns: Sequence[int]) -> None:
        """which: of all learners. columns: of each of all learners, which of the label arrays is its own."""
        self.which, self.stack = which, stack
        self.columns, self.schedules = [columns[n] for n in which], [learners[n].schedule for n in which]
        self.optimiser = AdamW(stack, [s.weight_decay for s in self.schedules], [s.clip for s in self.schedules])
        self.loss = torch.zeros(len(which), device=stack.rows.device)
        """summed over the examples of an epoch"""

    def step(self, batch: Batch, labels: Sequence[Tensor], done: float) -> None:
        """One step. labels: (B,) of each of all label arrays. done: epochs."""
        one = len(set(self.columns)) == 1
        losses = self.stack.losses(batch, torch.stack([labels[column] for column in self.columns[: 1 if one else None]]))
        self.stack.backward(losses)
        self.optimiser.step([schedule.rate(min(1.0, done / schedule.epochs)) for schedule in self.schedules])
        self.loss += losses.detach() * len(batch.labels)

    def keep(self, left: list[int]) -> None:
        """Let go of all heads but these."""
        if left:
            self.stack.keep(left)
            self.optimiser.keep(left)
        self.which, self.columns = [self.which[m] for m in left], [self.columns[m] for m in left]
        self.schedules = [self.schedules[m] for m in left]


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the labelled examples into those that train and those that choose: two index arrays.

    What chooses is one run of neighbours from a seeded place on. The cache lies in shuffled order, so this is a random
    sample, and one that can be read without reading the rest.

    labels: (N,) with -1 or NaN where there is none.
    """
    found = labelled(labels)
    if len(found) < 2:
        raise Refused(f"{len(found)} labelled training examples: at least 2 are needed; raise LIMIT or label more")
    count = max(1, round(share * len(found)))
    turned = np.roll(found, -int(shuffled(len(found), seed, 1)[0]))
    return np.sort(turned[count:]), np.sort(turned[:count])


def train(
    learners: Sequence[Learner],
    fit: Loader,
    choose: Loader,
    seed: int,
    told: Callable[[int, dict[str, Any]], None] = lambda number, line: None,
    seen: Callable[[int], None] = lambda examples: None,
    keeper: Keeper = NOWHERE,
) -> list[Trained]:
    """Train all on the batches of `fit`; of each keep the epoch that scores best on `choose`, by its task's first metric.

    A head learns as it would alone, from the same batches. One that stops, or whose loss was no number in an epoch, costs nothing
    in those after it. seed: of the order of batches. told: called with each line of a learner's curve as it comes. seen: with how
    many examples were gone through. keeper: where the standing between epochs is kept, and gone on from. Repeats exactly on a CPU
    with the same seeds and threads, however often it was killed.
    """
    outcomes = [Trained(0, {}, []) for _ in learners]
    best = [-math.inf] * len(learners)
    arrays, columns = _distinct([learner.labels for learner in learners])
    tables = [torch.from_numpy(array) for array in arrays]  # (N,) each
    made = stacks([each.head for each in learners], [each.shape for each in learners], [each.schedule.seed for each in learners])
    groups = [_Group(which, stack, learners, columns) for which, stack in made]
    begun, epoch = time.perf_counter(), 0
    if standing := keeper.load():
        groups, epoch, seconds = _restore(standing, groups, outcomes, best)
        begun -= seconds
        for number, outcome in enumerate(outcomes):
            for line in outcome.curve:
                told(number, line)
        seen(epoch * len(fit))
    while groups:
        epoch, done = epoch + 1, 0
        for group in groups:
            group.loss = torch.zeros(len(group.which), device=fit.device)
        for batch in fit.epoch(seed, epoch):
            done += len(batch.labels)
            labels = [table[batch.place].to(fit.device, non_blocking=True) for table in tables]
            for group in groups:
                group.step(batch, labels, epoch - 1 + done / len(fit))
            seen(len(batch.labels))
        said = say_all([group.stack for group in groups], choose)
        for group, words in zip(groups, said, strict=True):
            left, losses = [], (group.loss / done).tolist()
            finite = group.stack.rows.isfinite().all(1).tolist()
            for m, number in enumerate(group.which):
                learner, schedule, outcome = learners[number], group.schedules[m], outcomes[number]
                if not (math.isfinite(losses[m]) and finite[m]):
                    outcomes[number] = outcome._replace(lost=epoch)
                    continue
                found = score(learner.task, words[m], learner.labels)
                seconds = time.perf_counter() - begun
                line = {"epoch": epoch, "loss": losses[m], "choose": found, "lr": schedule.rate(epoch / schedule.epochs),
                        "seconds": seconds}  # fmt: skip
                outcome.curve.append(line)
                if found[learner.task.metrics[0]] > best[number]:
                    best[number] = found[learner.task.metrics[0]]
                    outcomes[number] = outcome._replace(epoch=epoch, weights=group.stack.weights(m))
                told(number, line)
                if epoch < schedule.epochs and epoch - outcomes[number].epoch < schedule.patience:
                    left.append(m)
            if len(left) < len(group.which):
                group.keep(left)
        groups = [group for group in groups if group.which]
        if groups and keeper.due():
            keeper.save(_standing(groups, outcomes, best, epoch, time.perf_counter() - begun))
    return outcomes


def _standing(groups: list[_Group], outcomes: list[Trained], best: list[float], epoch: int, seconds: float) -> Standing:
    numbers = {
        "epoch": epoch, "seconds": seconds, "groups": [group.which for group in groups],
        "outcomes": [{"epoch": o.epoch, "curve": o.curve, "lost": o.lost, "best": score if o.epoch else None}
                     for o, score in zip(outcomes, best, strict=True)],
    }  # fmt: skip
    tensors = {f"best.{n}.{name}": value for n, outcome in enumerate(outcomes) for name, value in outcome.weights.items()}
    for number, group in enumerate(groups):
        tensors |= of_stack(group.stack, group.optimiser, f"group.{number}")
    return Standing(numbers, tensors)


def _restore(
    standing: Standing, groups: list[_Group], outcomes: list[Trained], best: list[float]
) -> tuple[list[_Group], int, float]:
    """Bring fresh groups, outcomes and best scores to where they stood; the groups that still learn, epochs and seconds gone."""
    numbers, left = standing.numbers, []
    for n, kept in enumerate(numbers["outcomes"]):
        prefix = f"best.{n}."
        weights = {name.removeprefix(prefix): value for name, value in standing.tensors.items() if name.startswith(prefix)}
        outcomes[n] = Trained(kept["epoch"], weights, list(kept["curve"]), kept["lost"])
        best[n] = -math.inf if kept["best"] is None else kept["best"]
    for number, which in enumerate(numbers["groups"]):
        group = next(group for group in groups if set(which) <= set(group.which))
        group.keep([group.which.index(n) for n in which])
        to_stack(group.stack, group.optimiser, f"group.{number}", standing.tensors)
        left.append(group)
    return left, numbers["epoch"], numbers["seconds"]


def _distinct(labels: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """The label arrays that there are, and of each learner which is its own."""
    arrays: list[np.ndarray] = []
    columns = []
    for mine in labels:
        same = (n for n, other in enumerate(arrays) if other is mine or (other.dtype == mine.dtype and (other == mine).all()))
        columns.append(next(same, len(arrays)))
        if columns[-1] == len(arrays):
            arrays.append(mine)
    return arrays, columns
