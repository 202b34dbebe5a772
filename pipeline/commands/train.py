"""Stage two: train READs from the cache, score them beside the majority class and a linear probe, save the runs."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline import shared, together
from pipeline.config import Train
from pipeline.opening import using
from pipeline.show import Show, duration, size
from store.errors import Refused


def run(config: Train, show: Show) -> dict[str, Any]:
    """The command `train`: every task that is named, with every seed."""
    tasks = config.task.split(",")
    if config.read.shared and len(tasks) < 2:
        raise Refused("read.shared=true is one READ for several tasks; give TASK=a,b, or leave it out")
    if len(set(tasks)) < len(tasks):
        raise Refused(f"TASK={config.task} names a task twice; name each once")
    configs = [each for task in tasks for each in together.seeded(config.model_copy(update={"task": task}))]
    seconds: dict[str, float] = {}
    asked = together.open_all(configs, show, seconds)
    with using(*(each.opened for each in asked)):
        documents = (shared.train if config.read.shared else together.train)(asked, show, seconds)
    trained = [document for document in documents if "run" in document]
    lost = [document for document in documents if "run" not in document]
    for document in lost if trained else []:
        show.line(f"{document['task']}, seed {document['seed']}: {_diverged(document)}; it is not saved")
    if not trained:
        raise Refused(_diverged(lost[0]))
    if len(documents) == 1:
        report(show, documents[0])
        return documents[0]
    return {"runs": documents, "summary": summary(show, trained, config.seeds)}


def _diverged(document: dict[str, Any]) -> str:
    return f"the loss was no number in the first epoch: the learning rate {document['lr']:g} is too high; lower LR"


def report(show: Show, document: dict[str, Any]) -> None:
    """One run in a table."""
    rows = [
        [split, metric, document["majority"][split][metric], document["linear_probe"][split][metric], value]
        for split, values in document["metrics"].items()
        for metric, value in values.items()
    ]
    show.table(["split", "metric", "majority", "linear probe", "READ"], rows)
    spent = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in document["seconds"].items())
    show.line(f"cache {size(document['cache_bytes'])}; {spent}; best epoch {document['best_epoch']}")
    show.line(f"run {document['run']} saved at {document['path']}")


def summary(show: Show, documents: list[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Several runs in one table: a line a task, split and metric, over its seeds."""
    found: list[dict[str, Any]] = []
    for task in dict.fromkeys(document["task"] for document in documents):
        mine = [document for document in documents if document["task"] == task]
        for split, values in mine[0]["metrics"].items():
            for metric in values:
                scores = [document["metrics"][split][metric] for document in mine]
                found.append(
                    {
                        "task": task,
                        "split": split,
                        "metric": metric,
                        "majority": mine[0]["majority"][split][metric],
                        "linear_probe": mine[0]["linear_probe"][split][metric],
                        "mean": float(np.mean(scores)),
                        "standard_deviation": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
                        "runs": [document["run"] for document in mine],
                    }
                )
    rows = [[r["task"], r["split"], r["metric"], r["majority"], r["linear_probe"], r["mean"]] for r in found]
    columns = ["task", "split", "metric", "majority", "linear probe", "READ"]
    if seeds > 1:
        columns.append(f"standard deviation, {seeds} seeds")
        rows = [[*row, line["standard_deviation"]] for row, line in zip(rows, found, strict=True)]
    show.table(columns, rows)
    folders = dict.fromkeys(str(Path(document["path"]).parent) for document in documents)
    show.line(f"{len(documents)} runs saved under {', '.join(folders)}; `make report` shows them all")
    return found
