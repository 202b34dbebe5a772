"""Scores: every GLUE task beside its baselines; variants of the defaults."""

import importlib
from typing import Any

import numpy as np
import torch

from pipeline import fitting
from pipeline.config import Bench, Extract, Train
from pipeline.opening import Opened, check, label_words, open_caches, shape_of
from pipeline.show import Show, duration, size
from stages import baselines, tasks
from stages.device import pick
from stages.loader import Loader
from store.errors import Refused


def glue(config: Bench, show: Show) -> dict[str, Any]:
    """Each task on one backbone: scores beside the baselines, seconds of each stage, bytes for each token rule."""
    plan, extract, train = (importlib.import_module(f"pipeline.commands.{verb}") for verb in ("plan", "extract", "train"))
    rows = []
    for name in config.tasks(*(name for name, task in tasks.TASKS.items() if task.hub)):
        task = tasks.find(name)
        own = config.training(name)
        stage_one = Extract.part_of(own, ",".join((task.train, *task.evaluation)))
        sizes = {}
        for rule in dict.fromkeys(("all", config.tokens)):
            parts = plan.prepare(stage_one.model_copy(update={"tokens": rule})).parts.values()
            sizes[rule or "default"] = sum(part.found.bytes for part in parts)
        made = extract.run(stage_one, show)["splits"]
        told = train.run(own, show)
        split, scores = next(iter(told["metrics"].items()))
        metric = next(iter(scores))
        rows.append(
            {
                "task": name,
                "metric": metric,
                "examples": told["examples"][split],
                **{what: told[what][split][metric] for what in ("majority", "linear_probe")},
                "read": scores[metric],
                "extract_seconds": None if all(p["hit"] for p in made.values()) else sum(p["seconds"] for p in made.values()),
                "train_seconds": told["seconds"]["train"],
                "bytes": sizes,
                "run": told["run"],
            }
        )
    rules = " | ".join(f"cache: {rule}" for rule in rows[0]["bytes"])
    show.line(f"| task | metric | majority | linear probe | READ | stage one | stage two | {rules} |")
    show.line("|---" * (7 + len(rows[0]["bytes"])) + "|")
    for row in rows:
        cells = [row["task"], row["metric"], *(f"{row[name]:.3f}" for name in ("majority", "linear_probe", "read"))]
        cells += ["hit" if row["extract_seconds"] is None else duration(row["extract_seconds"]), duration(row["train_seconds"])]
        show.line(f"| {' | '.join([*cells, *(size(count) for count in row['bytes'].values())])} |")
    return {"rows": rows}


PROBE = "linear probe"
"""what all variants must beat"""

VARIANTS: dict[str, dict[str, Any]] = {
    PROBE: {},
    "default": {},
    "standardised": {"read": {"standardise": True}},
    "not standardised": {"read": {"standardise": False}},
    "lr 0.0003": {"lr": 3e-4},
    "lr 0.003": {"lr": 3e-3},
    "20 epochs": {"epochs": 20},
    "batch 64 and lr 0.002": {"batch": 64, "lr": 2e-3},
    "batch 16": {"batch": 16},
    "hidden 64": {"hidden": 64},
    "hidden 512": {"hidden": 512},
    "dropout 0.3": {"read": {"dropout": 0.3}},
    "scale_out 4": {"read": {"scale_out": 4}},
    "aggregate last": {"read": {"aggregate": "last"}},
    "initial embedding": {"read": {"initial": "embedding"}},
    "blocks 4-6": {"read": {"layers": "4-6"}},
    "bidirectional": {"read": {"bidirectional": True}},
    "weight decay 0.1": {"schedule": {"weight_decay": 0.1}},
    "lstm": {"cell": "lstm"},
    "mingru": {"cell": "mingru"},
    "rnn": {"cell": "rnn"},
    "all tokens": {"tokens": "all"},
    "all tokens, their mean": {"tokens": "all", "pool": "mean"},
    "verbalizer": {"head": "verbalizer"},
    "first token": {"tokens": "first"},
}
"""what may be better than the defaults, one change at a time"""

HELD_OUT = 0.3
"""share of the train split that is not trained on: a third of it chooses the epoch, two thirds compare the variants"""


def recipes(config: Bench, show: Show) -> dict[str, Any]:
    """Variants of the defaults compared on a held-out part of train splits alone: what chose the defaults."""
    asked = config.only.split(",") if config.only else list(VARIANTS)
    for name in asked:
        if name not in VARIANTS:
            raise Refused(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    device, rows, left_out = pick(config.device), [], {}
    for name in asked:
        scores: dict[str, list[float]] = {}
        try:
            for task in config.tasks(*(name for name, task in tasks.TASKS.items() if task.hub)):
                own = _changed(config, task, VARIANTS[name])
                opened = open_caches(own, check(own), Show(to_stderr=True))
                scores[task] = [_held_out(own, opened, seed, device, name == PROBE) for seed in range(config.seeds)]
        except Refused as error:  # a token rule or a block that this backbone does not have
            left_out[name] = str(error)
            show.line(f"{name:20} left out: {error}")
            continue
        means = {task: float(np.mean(values)) for task, values in scores.items()}
        rows.append({"variant": name, "scores": scores, "mean": float(np.mean(list(means.values())))})
        show.line(
            f"{name:20} " + "  ".join(f"{task} {value:.4f}" for task, value in means.items()) + f"  mean {rows[-1]['mean']:.4f}"
        )
    if not rows:  # it is no variant that is wrong
        raise Refused(next(iter(left_out.values())))
    return {"rows": rows, "left_out": left_out}


def _changed(config: Bench, task: str, changes: dict[str, Any]) -> Train:
    """The training of a task with a variant's changes, within its groups too."""
    said = config.training(task).model_dump()
    said["schedule"] |= {"hold_out": HELD_OUT}
    for name, change in changes.items():
        said[name] = said[name] | change if isinstance(change, dict) else change
    return Train(**said)


def _held_out(config: Train, opened: Opened, seed: int, device: torch.device, probe: bool) -> float:
    """The score of READ, or of the probe, on a part of the train split that neither trained nor chose."""
    shape = shape_of(config, opened.task, opened.recipe, opened.caches[opened.task.train].width)
    loaded = fitting.loaders(config, opened, seed, list(shape.states), device)
    kept = loaded.choose
    choose, held = (
        Loader(kept.cache, part, kept.labels, kept.batch, device, kept.streams, kept.access)
        for part in (kept.examples[::3], np.delete(kept.examples, np.s_[::3]))
    )
    loaded = loaded._replace(choose=choose, scored={"held": held})
    if probe:
        scores = baselines.beside(opened.task, *loaded, shape.pool, shape.depths)["linear_probe"]
    else:
        learner = fitting.learner(config, opened, shape, label_words(config, opened, shape), loaded.fit, seed)
        scores = fitting.fit_one(learner, opened, loaded, seed).metrics
    return float(scores["held"][opened.task.metrics[0]])
