"""Train one head: AdamW, warm-up then linear decay, gradient clipping, best epoch kept, early stopping."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stages.evaluate import say, score
from stages.heads import Head
from stages.loader import Loader
from stages.tasks import Task, labelled
from store.errors import Refused
from store.order import shuffled


@dataclass(frozen=True)
class Schedule:
    """How to train."""

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

    def rate(self, done: float) -> float:
        """Learning rate after the share `done` of all examples of all epochs."""
        return self.lr * min(1.0, done / self.warmup if self.warmup else 1.0, (1 - done) / (1 - self.warmup))


class Trained(NamedTuple):
    """The outcome of training."""

    epoch: int
    """the best, counted from 1"""
    weights: dict[str, Tensor]
    """of the best epoch, on the CPU"""
    curve: list[dict[str, Any]]
    """a line an epoch: loss, score on the choosing part, learning rate, seconds"""


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
    head: Head, task: Task, fit: Loader, choose: Loader, schedule: Schedule, told: Callable[[dict[str, Any]], None]
) -> Trained:
    """Train on `fit`, keep the epoch that scores best on `choose`, by the task's first metric.

    told: called with each line of the curve as it comes. Repeats exactly on a CPU with the same seed and threads.
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": schedule.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in head.parameters():
        groups[parameter.ndim < 2]["params"].append(parameter)  # norms and biases are not decayed
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, fused=True)
    metric = task.metrics[0]
    best: tuple[float, int, dict[str, Tensor]] = (-math.inf, 0, {})
    curve: list[dict[str, Any]] = []
    for epoch in range(1, schedule.epochs + 1):
        begun, loss, seen = time.perf_counter(), torch.zeros((), device=fit.device), 0
        head.train()
        for batch in fit.epoch(schedule.seed, epoch):
            rate = schedule.rate((epoch - 1 + (seen + len(batch.labels)) / len(fit)) / schedule.epochs)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch_loss = head.loss(batch)
            torch.autograd.backward(batch_loss)
            nn.utils.clip_grad_norm_(head.parameters(), schedule.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            loss += batch_loss.detach() * len(batch.labels)
            seen += len(batch.labels)
        mean = float(loss) / seen
        if not math.isfinite(mean) or not all(torch.isfinite(parameter).all() for parameter in head.parameters()):
            raise Refused(f"the loss is {mean} in epoch {epoch}: the learning rate {schedule.lr} is too high; lower LR")
        found = score(task, say(head, choose))
        line = {"epoch": epoch, "loss": mean, "choose": found, "lr": rate, "seconds": time.perf_counter() - begun}
        curve.append(line)
        told(line)
        if found[metric] > best[0]:
            best = (found[metric], epoch, {k: v.detach().cpu().clone() for k, v in head.state_dict().items()})
        elif epoch - best[1] >= schedule.patience:
            break
    return Trained(best[1], best[2], curve)
