"""One READ for several tasks, each with a head of its own: their batches take turns."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from stages.evaluate import say, score
from stages.heads import Batch
from stages.loader import Loader
from stages.train import Learner, Schedule, Trained
from store.errors import Refused


def train_shared(
    learners: Sequence[Learner],
    fits: Sequence[Loader],
    chooses: Sequence[Loader],
    schedule: Schedule,
    seed: int,
    told: Callable[[int, dict[str, Any]], None] = lambda number, line: None,
    seen: Callable[[int], None] = lambda examples: None,
) -> list[Trained]:
    """Train heads whose `read` is one module; keep the epoch whose scores, each task's first metric, are best on average.

    An epoch gives every task's examples once; a step is of one task's batch, of the one that is behind the others, so that tasks
    go through their epochs side by side however large they are. seed: of the order of batches. told, seen: as `train` has them.

    Raises Refused where the loss is no number.
    """
    heads = [learner.head for learner in learners]
    parameters = list({id(p): p for head in heads for p in head.parameters()}.values())
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": schedule.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in parameters:
        groups[parameter.ndim < 2]["params"].append(parameter)  # norms and biases are not decayed
    optimiser = torch.optim.AdamW(groups, lr=schedule.lr, fused=True)
    torch.manual_seed(schedule.seed)  # of dropout
    best, outcomes, begun = -math.inf, [Trained(0, {}, []) for _ in learners], time.perf_counter()
    every = sum(map(len, fits))
    for epoch in range(1, schedule.epochs + 1):
        losses, done = [0.0] * len(heads), 0
        for head in heads:
            head.train()
        for task, batch in in_turn([fit.epoch(seed, epoch) for fit in fits], [len(fit) for fit in fits]):
            done += len(batch.labels)
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate((epoch - 1 + done / every) / schedule.epochs)
            loss = heads[task].loss(batch)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], schedule.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses[task] += float(loss.detach()) * len(batch.labels)
            seen(len(batch.labels))
        if not all(map(math.isfinite, losses)) or not all(parameter.isfinite().all() for parameter in parameters):
            raise Refused(f"the loss is no number in epoch {epoch}: the learning rate {schedule.lr:g} is too high; lower LR")
        found = [score(each.task, say(each.head, loader)) for each, loader in zip(learners, chooses, strict=True)]
        for number, (fit, scores) in enumerate(zip(fits, found, strict=True)):
            line = {"epoch": epoch, "loss": losses[number] / len(fit), "choose": scores, "lr": group["lr"],
                    "seconds": time.perf_counter() - begun}  # fmt: skip
            outcomes[number].curve.append(line)
            told(number, line)
        mean = sum(scores[each.task.metrics[0]] for each, scores in zip(learners, found, strict=True)) / len(found)
        if mean > best:
            best = mean
            weights = [{k: v.detach().cpu().clone() for k, v in head.state_dict().items()} for head in heads]
            outcomes = [outcome._replace(epoch=epoch, weights=w) for outcome, w in zip(outcomes, weights, strict=True)]
        elif epoch - outcomes[0].epoch >= schedule.patience:
            break
    return outcomes


def in_turn(streams: Sequence[Iterator[Batch]], lengths: Sequence[int]) -> Iterator[tuple[int, Batch]]:
    """Batches of several streams, always of the one of which the smallest share was given: (which, batch)."""
    given, left = [0] * len(streams), set(range(len(streams)))
    while left:
        which = min(left, key=lambda number: (given[number] / lengths[number], number))
        batch = next(streams[which], None)
        if batch is None:
            left.remove(which)
            continue
        given[which] += len(batch.labels)
        yield which, batch
