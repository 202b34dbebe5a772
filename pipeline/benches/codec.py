"""What a codec costs: bytes of a cache with all tokens, and the scores of heads trained from it, against fp32."""

from typing import Any

import numpy as np

from pipeline import fitting
from pipeline.commands import plan
from pipeline.config import Bench, Plan
from pipeline.opening import check, label_words, open_caches, shape_of
from pipeline.show import Show, size
from stages.device import pick
from store.codecs import CODECS

TASKS = ("sst2", "mrpc", "rte", "cola", "stsb")


def codec(config: Bench, show: Show) -> dict[str, Any]:
    """Each codec: exact bytes of `TOKENS=all`, and the mean over tasks and seeds of each task's first metric."""
    tasks = config.tasks(*TASKS)
    bytes_of = {name: _bytes(config, tasks[0], name) for name in CODECS}
    rows: list[dict[str, Any]] = []
    for name in CODECS:
        scores = {task: _scores(config, task, name, show) for task in tasks}
        every = [value for values in scores.values() for value in values]
        rows.append(
            {
                "bench": "codec",
                "codec": name,
                "bytes": bytes_of[name],
                "bytes_tokens": "all",
                "scores_tokens": config.tokens or "default",
                "scores": scores,
                "mean": float(np.mean(every)),
            }
        )
    lossless = np.array(list(rows[0]["scores"].values()))  # (tasks, seeds)
    for row in rows:
        lost = 100 * (lossless - np.array(list(row["scores"].values())))
        row["loss_points"] = float(lost.mean())
        row["standard_error"] = float(lost.std(ddof=1) / np.sqrt(lost.size)) if lost.size > 1 else None
    show.table(
        ["codec", f"{tasks[0]}, all tokens", "÷ bf16", *tasks, "mean", "points lost", "standard error"],
        [
            [r["codec"], size(r["bytes"]), r["bytes"] / bytes_of["bf16"], *(float(np.mean(v)) for v in r["scores"].values()),
             r["mean"], r["loss_points"], r["standard_error"]]
            for r in rows
        ],
    )  # fmt: skip
    ratios = {f"{name}_over_bf16_bytes": bytes_of[name] / bytes_of["bf16"] for name in ("int8", "int4")}
    return {"rows": rows, "ratios": ratios | {f"loss_points_{r['codec']}": r["loss_points"] for r in rows[1:]}}


def _bytes(config: Bench, task: str, name: str) -> int:
    said = {field: getattr(config, field) for field in Plan.model_fields if hasattr(config, field)}
    asked = Plan(**said | {"task": task, "codec": name, "tokens": "all", "splits": "train"})
    return plan.prepare(asked).parts["train"].found.bytes


def _scores(config: Bench, task: str, name: str, show: Show) -> list[float]:
    """The first metric on the first evaluation split, a value a seed."""
    own = config.training(task, codec=name)
    opened = open_caches(own, check(own), Show(to_stderr=True))
    shape = shape_of(own, opened.task, opened.recipe, opened.caches[opened.task.train].width)
    found, device = [], pick(config.device)
    for seed in range(config.seed, config.seed + config.seeds):
        loaded = fitting.loaders(own, opened, seed, list(shape.states), device)
        learner = fitting.learner(own, opened, shape, label_words(own, opened, shape), loaded.fit, seed)
        metrics = fitting.fit_one(learner, opened, loaded, seed).metrics
        found.append(metrics[opened.task.evaluation[0]][opened.task.metrics[0]])
    show.line(f"{name}, {task}: {'  '.join(f'{value:.4f}' for value in found)}")
    return found
