"""Tables that the README shows, measured here and now."""

import importlib
from typing import Any

from pipeline.config import Bench, Extract, Train
from pipeline.show import Show, duration, size
from stages import tasks
from store.errors import Refused


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
        own = Train(**config.model_dump(exclude={"what", "task"}), task=name)
        stage_one = Extract.part_of(own, ",".join((task.train, *task.evaluation)))
        sizes = {}
        for rule in ("all", "mean", "first"):
            parts = plan.prepare(stage_one.model_copy(update={"tokens": rule})).parts.values()
            sizes[rule] = sum(part.found.bytes for part in parts)
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
    show.line("| task | metric | majority | linear probe | READ | stage one | stage two | cache: all | mean | first |")
    show.line("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["task"], row["metric"], *(f"{row[name]:.3f}" for name in ("majority", "linear_probe", "read"))]
        cells += ["hit" if row["extract_seconds"] is None else duration(row["extract_seconds"]), duration(row["train_seconds"])]
        show.line(f"| {' | '.join([*cells, *(size(count) for count in row['bytes'].values())])} |")
    return {"rows": rows}


BENCHES = {"glue": glue}
