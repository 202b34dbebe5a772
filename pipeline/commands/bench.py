"""Tables that the README shows, measured here and now."""

import importlib
from typing import Any

import numpy as np

from pipeline import fitting
from pipeline.config import Bench, Extract, ReadOptions, ScheduleOptions, Train
from pipeline.opening import check, label_words, open_caches, shape_of
from pipeline.show import Show, duration, size
from stages import tasks
from stages.device import pick
from store.errors import Refused

BENCH_ONLY = {"what", "only", "seeds"}


def run(config: Bench, show: Show) -> dict[str, Any]:
    """The command `bench`."""
    if config.what not in BENCHES:
        raise Refused(f"unknown bench {config.what!r}; known: {', '.join(BENCHES)}")
    return BENCHES[config.what](config, show)


def glue(config: Bench, show: Show) -> dict[str, Any]:
    """Each task on one backbone: scores beside the baselines, seconds of each stage, bytes for each token rule."""
    plan, extract, train = (importlib.import_module(f"pipeline.commands.{verb}") for verb in ("plan", "extract", "train"))
    rows = []
    for name in config.task.split(","):
        task = tasks.find(name)
        own = Train(**config.model_dump(exclude=BENCH_ONLY | {"task"}), task=name)
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


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lr 0.0003": {"lr": 3e-4},
    "lr 0.003": {"lr": 3e-3},
    "20 epochs": {"epochs": 20},
    "batch 64 and lr 0.002": {"batch": 64, "lr": 2e-3},
    "batch 16": {"batch": 16},
    "hidden 64": {"hidden": 64},
    "hidden 512": {"hidden": 512},
    "dropout 0.3": {"read": ReadOptions(dropout=0.3)},
    "scale_out 4": {"read": ReadOptions(scale_out=4)},
    "aggregate last": {"read": ReadOptions(aggregate="last")},
    "initial embedding": {"read": ReadOptions(initial="embedding")},
    "bidirectional": {"read": ReadOptions(bidirectional=True)},
    "weight decay 0.1": {"schedule": ScheduleOptions(weight_decay=0.1)},
    "lstm": {"cell": "lstm"},
    "mingru": {"cell": "mingru"},
    "rnn": {"cell": "rnn"},
    "all tokens": {"tokens": "all"},
    "first token": {"tokens": "first"},
}
"""what may be better than the defaults, one change at a time"""

HELD_OUT = 0.2
"""share of the train split that the variants are compared on"""


def recipes(config: Bench, show: Show) -> dict[str, Any]:
    """Variants of the defaults compared on a held-out part of train splits alone: what chose the defaults."""
    device, rows = pick(config.device), []
    for name, changes in VARIANTS.items():
        if config.only and name not in config.only.split(","):
            continue
        scores: dict[str, list[float]] = {}
        for task in config.task.split(","):
            own = Train(**config.model_dump(exclude=BENCH_ONLY | {"task"}) | changes, task=task)
            opened = open_caches(own, check(own), Show(to_stderr=True))
            shape = shape_of(own, opened.task, opened.recipe, opened.caches[opened.task.train].manifest.counts["width"])
            own = own.model_copy(update={"schedule": own.schedule.model_copy(update={"hold_out": HELD_OUT})})
            for seed in range(config.seeds):
                loaded = fitting.loaders(own, opened, seed, list(shape.states), device)
                head = fitting.fresh(opened, shape, label_words(own, opened, shape), loaded.fit, seed)
                outcome = fitting.fit(head, opened, loaded._replace(scored={}), fitting.schedule(own, seed)).outcome
                scores.setdefault(task, []).append(outcome.curve[outcome.epoch - 1]["choose"][opened.task.metrics[0]])
        means = {task: float(np.mean(values)) for task, values in scores.items()}
        rows.append({"variant": name, "scores": scores, "mean": float(np.mean(list(means.values())))})
        show.line(
            f"{name:20} " + "  ".join(f"{task} {value:.4f}" for task, value in means.items()) + f"  mean {rows[-1]['mean']:.4f}"
        )
    return {"rows": rows}


BENCHES = {"glue": glue, "recipes": recipes}
