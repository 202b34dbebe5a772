"""One READ for several tasks, each with a head of its own: trained side by side, each saved as a run."""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline import fitting
from pipeline.board import Board
from pipeline.show import Show
from pipeline.together import Asked, clock, saved
from stages.device import pick
from stages.evaluate import say, score
from stages.heads import Head
from stages.read import Correction
from stages.shape import count
from stages.shared import train_shared


def train(asked: Sequence[Asked], show: Show, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Train the tasks of each seed together; a document each, in their order."""
    assert len({(each.shape.width, *each.shape.states) for each in asked}) == 1  # one configuration but for the task
    documents: dict[int, dict[str, Any]] = {}
    for seed in dict.fromkeys(each.config.seed for each in asked):
        which = [number for number, each in enumerate(asked) if each.config.seed == seed]
        documents |= zip(which, _seed([asked[number] for number in which], show, seconds), strict=True)
    return [documents[number] for number in range(len(asked))]


def _seed(asked: list[Asked], show: Show, seconds: dict[str, float]) -> list[dict[str, Any]]:
    first, device, own = asked[0], pick(asked[0].config.device), {"extract": seconds.get("extract", 0.0)}
    streams = list(first.shape.states)
    loaded = [
        fitting.loaders(
            each.config,
            each.opened,
            each.seed,
            streams,
            device,
            fitting.reading(each.config, each.opened, streams, device).access,
        )
        for each in asked
    ]
    with clock(own, "train"):
        learners = [
            fitting.learner(each.config, each.opened, each.shape, each.words, here.fit, each.config.seed)
            for each, here in zip(asked, loaded, strict=True)
        ]
        share([learner.head for learner in learners])
    names = ", ".join(each.opened.task.name for each in asked)
    heads = sum(count(learner.head) - count(learner.head.read) for learner in learners)
    show.line(f"{names}: one READ of {count(learners[0].head.read):,} parameters, {len(asked)} heads of {heads:,} together")
    with clock(own, "baselines"):
        plain = [fitting.plain(each.opened, here, each.shape) for each, here in zip(asked, loaded, strict=True)]
    fits = [here.fit for here in loaded]
    board = Board(show, [each.config for each in asked], [each.opened.task for each in asked], sum(map(len, fits)))
    with clock(own, "train"), board:
        plan = fitting.schedule(first.config, first.config.seed)
        outcomes = train_shared(learners, fits, [here.choose for here in loaded], plan, first.seed, board.told, board.seen)
        fitted = []
        for each, learner, outcome, here in zip(asked, learners, outcomes, loaded, strict=True):
            learner.head.load_state_dict(outcome.weights)
            metrics = {split: score(each.opened.task, say(learner.head, loader)) for split, loader in here.scored.items()}
            fitted.append(fitting.Fitted(learner.head, outcome, metrics))
    for phase in ("train", "baselines"):
        seconds[phase] = seconds.get(phase, 0.0) + own[phase]
    return [
        saved(each, one, beside, here, own, here.fit.access.how, len(asked), shared=[other.opened.task.name for other in asked])
        for each, one, beside, here in zip(asked, fitted, plain, loaded, strict=True)
    ]


def share(heads: Sequence[Head]) -> None:
    """Give all heads the READ of the first. Where they read states in units of their spread, its unit is the mean of theirs."""
    spread = torch.stack([head.spread for head in heads]).mean(0)
    for head in heads[1:]:
        head.read = heads[0].read
    for module in heads[0].read.modules():
        if isinstance(module, Correction):
            module.unit.copy_(spread)
