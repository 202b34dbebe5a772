"""READ beside its controls on one task: the same head on other readings of the same states, over several seeds."""

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline import fitting
from pipeline.config import Ablate
from pipeline.opening import Opened, check, label_words, open_caches, shape_of, using
from pipeline.show import Show
from stages import baselines, sources
from stages.controls import CONTROLS
from stages.device import pick
from stages.metrics import paired
from stages.shape import Shape, count
from store.errors import Refused

SURE = 0.05
"""p below which a difference is called one"""
JOINED = "READ, joined with the encoder's"
UNTRAINED = "READ on an untrained backbone"


class Row(NamedTuple):
    """One reading of the states."""

    name: str
    parameters: int
    """trainable, the head's included"""
    scores: list[float]
    """one a seed, of the task's first metric on its first evaluation split"""


class _Asked(NamedTuple):
    """A reading of the states that is to be trained."""

    name: str
    config: Ablate
    opened: Opened
    shape: Shape


def run(config: Ablate, show: Show) -> dict[str, Any]:
    """The command `ablate`."""
    if config.read.shared:
        raise Refused("an ablation is of one task; leave read.shared out")
    task, device = check(config), pick(config.device)
    opened = open_caches(config, task, show)
    label_words(config, opened, _shape(config, opened, "read"))  # refused now, not after other work
    # first, since it is what may have to be extracted
    untrained = "--no-extract" if config.no_extract else _untrained(config, opened, show)
    seeds = range(config.seed, config.seed + config.seeds)
    # a control reads the decoder's row alone: so does the READ that it is compared with
    apart = config.model_copy(update={"read": config.read.model_copy(update={"joiner": "none"})})
    asked = []
    if (joined := _shape(config, opened, "read")).joined:
        asked.append(_Asked(JOINED, config, opened, joined))
    asked += [_Asked(name, apart, opened, _shape(apart, opened, control)) for control, name in CONTROLS.items()]
    if not isinstance(untrained, str):
        own, twin = untrained
        asked.append(_Asked(UNTRAINED, own, twin, _shape(own, twin, "read")))
    with using(opened, *(each.opened for each in asked)):
        rows = [_probe(config, opened, seeds, device), *_rows(asked, seeds, device, show)]
    metric, split = opened.task.metrics[0], opened.task.evaluation[0]
    show.table(
        ["", "parameters", f"{metric}, {split}", "standard deviation"],
        [[row.name, row.parameters, float(np.mean(row.scores)), float(np.std(row.scores, ddof=1))] for row in rows],
    )
    sentence = verdict(rows, metric)
    show.line(sentence)
    return {
        "task": opened.task.name,
        "metric": metric,
        "split": split,
        "seeds": list(seeds),
        "sentence": sentence,
        "left_out": {UNTRAINED: untrained} if isinstance(untrained, str) else {},
        "rows": [
            {
                "name": row.name,
                "parameters": row.parameters,
                "scores": row.scores,
                "mean": float(np.mean(row.scores)),
                "standard_deviation": float(np.std(row.scores, ddof=1)),
            }
            for row in rows
        ],
    }


def _shape(config: Ablate, opened: Opened, control: str) -> Shape:
    return shape_of(config, opened.task, opened.recipe, opened.caches[opened.task.train].width, control=control)


def _probe(config: Ablate, opened: Opened, seeds: range, device: torch.device) -> Row:
    """The linear probe; a seed fixes which part chooses its regularisation."""
    shape = _shape(config, opened, "final")
    scores = []
    for seed in seeds:
        loaded = fitting.loaders(config, opened, seed, list(shape.states), device)
        found = baselines.beside(opened.task, loaded.fit, loaded.choose, loaded.scored, shape.pool, shape.depths)
        scores.append(_score(opened, found["linear_probe"]))
    outputs = 1 if shape.outputs == 2 else shape.outputs  # logistic regression has one set of weights for two classes
    return Row("linear probe on the final state", (shape.width + 1) * outputs, scores)


def _rows(asked: list[_Asked], seeds: range, device: torch.device, show: Show) -> list[Row]:
    """Train all of them, seed by seed: those that read the same streams of the same caches in one pass."""
    scores: list[list[float]] = [[] for _ in asked]
    parameters = [0] * len(asked)
    words = [label_words(each.config, each.opened, each.shape) for each in asked]
    passes: list[list[int]] = []
    for n, each in enumerate(asked):
        same = [p for p in passes if asked[p[0]].opened is each.opened and asked[p[0]].shape.states == each.shape.states]
        if same:
            same[0].append(n)
        else:
            passes.append([n])
    for seed in seeds:
        for which in passes:
            first = asked[which[0]]
            loaded = fitting.loaders(first.config, first.opened, seed, list(first.shape.states), device)
            learners = [
                fitting.learner(asked[n].config, asked[n].opened, asked[n].shape, words[n], loaded.fit, seed) for n in which
            ]
            for n, fitted in zip(which, fitting.fit(learners, [asked[n].opened for n in which], loaded, seed), strict=True):
                if not fitted.metrics:
                    raise Refused(f"{asked[n].name}: the loss is no number with LR={first.config.lr:g}; lower it")
                parameters[n] = count(fitted.head)
                scores[n].append(_score(asked[n].opened, fitted.metrics))
                show.line(f"{asked[n].name}, seed {seed}: {scores[n][-1]:.4f}, best epoch {fitted.outcome.epoch}")
    return [Row(each.name, parameters[n], scores[n]) for n, each in enumerate(asked)]


def _untrained(config: Ablate, opened: Opened, show: Show) -> tuple[Ablate, Opened] | str:
    """The caches of a backbone of the same shape with random weights, of the same recipe otherwise; or why there are none."""
    made = opened.recipe
    same: dict[str, Any] = {n: made[n] for n in ("tokens", "layers", "codec", "limit", "order_seed", "max_length") if n in made}
    asked = made["data"]["template"]
    # its output embedding says nothing: it is asked through a classifier, whatever the head
    same |= {"cache": None, "words": None, "head": "classifier", "prompt": asked if isinstance(asked, str) else None}
    same["read"] = config.read.model_copy(update={"joiner": "none"})
    if made["backbone"]["kind"] == "encoder-decoder":
        same["tokens"] = "last"  # the decoder's row is all that is read
    try:
        # what trains needs no transformers; what makes a backbone does
        untrained = importlib.import_module("stages.untrained")
        checkpoint = sources.checkpoint(config.backbone, local=False)
        own = config.model_copy(update=same | {"backbone": str(untrained.save(checkpoint, config.store.home / "untrained"))})
        return own, open_caches(own, check(own), show)
    except (Refused, ImportError) as error:
        show.line(f"without the row of {UNTRAINED}: {error}")
        return str(error)


def _score(opened: Opened, metrics: dict[str, dict[str, float]]) -> float:
    return metrics[opened.task.evaluation[0]][opened.task.metrics[0]]


def verdict(rows: list[Row], metric: str) -> str:
    """Whether recurrence helps: READ against the same parameters without it, seed by seed (paired t-test)."""
    by_name = {row.name: row for row in rows}
    read, reset = by_name[CONTROLS["read"]], by_name[CONTROLS["reset"]]
    difference, error, p = paired(np.array(read.scores), np.array(reset.scores))
    what = "makes no difference that these seeds show" if p >= SURE else "helps" if difference > 0 else "harms"
    best = max((row for row in rows if row is not read), key=lambda row: float(np.mean(row.scores)))
    one, two = float(np.mean(read.scores)), float(np.mean(reset.scores))
    return (
        f"Recurrence {what} here: {metric} {one:.4f} with READ, {two:.4f} with its state reset at every layer, "
        f"{difference:+.4f} ± {error:.4f} ({len(read.scores)} seeds, standard error, p = {p:.3f}); the best of the others is "
        f"{best.name} with {np.mean(best.scores):.4f}."
    )
