"""What the runs of a store say: as data, as Markdown, and as one HTML page that needs nothing else."""

import json
import statistics
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline import runs
from pipeline.board import flat
from pipeline.show import size
from store.errors import Damaged

COSTS = {"trainable_parameters": "trainable parameters", "seconds": "seconds", "cache_bytes": "cache bytes"}
"""what quality is held against"""

LISTED = 100
"""runs a task in the Markdown file"""

OF_PLACE = {
    "store",
    "reuse",
    "no_wait",
    "device",
    "dask",
    "task",
    "data",
    "backbone",
    "track",
    "seeds",
    "no_extract",
    "cache",
    "label",
}
"""options that make no other run of the same task"""

TOLD = ("cell", "hidden", "pool", "head", "lr", "batch", "epochs", "seed", "tokens", "codec", "layers")
"""options that every row shows; others where runs differ in them"""


def gather(root: Path) -> dict[str, Any]:
    """The runs under a root as plain data, task by task, the best by its choosing part first."""
    rows, damaged = [], []
    for found in runs.listing(root):
        if isinstance(found, Damaged):
            damaged.append(str(found))
            continue
        try:
            rows.append(_row(found))
        except Damaged as error:
            damaged.append(str(error))
        except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
            lacks = f"{type(error).__name__}: {error}"
            damaged.append(f"run {found.path}: run.json or curve.jsonl lack something ({lacks}); train again")
    # a task's name may stand for several label columns, or be measured by several metrics: they are no one ranking
    kinds = {
        name: {(row["label"], row["metric"]) for row in rows if row["task"] == name} for name in {row["task"] for row in rows}
    }
    for row in rows:
        if len(kinds[row["task"]]) > 1:
            row["task"] = f"{row['task']} ({row['label']}, {row['metric']})"
    tasks = {}
    for task in sorted({row["task"] for row in rows}):
        mine = sorted((row for row in rows if row["task"] == task), key=lambda row: -row["choose"])
        for cost in COSTS:
            ahead = front([(row[cost], row["score"]) for row in mine])
            for number, row in enumerate(mine):
                row["fronts"] = [*row.get("fronts", []), *([cost] if number in ahead else [])]
        tasks[task] = {"metric": mine[0]["metric"], "split": mine[0]["split"], "options": _options(mine), "runs": mine}
    return {"store": root.name, "made": time.strftime("%Y-%m-%d %H:%M"), "tasks": tasks, "damaged": damaged, "costs": COSTS}


def _row(found: runs.Run) -> dict[str, Any]:
    told = found.told
    split, values = next(iter(told["metrics"].items()))
    metric, score = next(iter(values.items()))
    config, recipe = flat(told["config"]), told["recipe"]
    # what was left out of the configuration stands in the recipe
    config |= {name: recipe[name] for name in ("tokens", "codec", "layers") if name in recipe}
    heads = told.get("heads", 1)
    return {
        "run": found.path.name, "task": told["task"], "split": split, "metric": metric, "score": score,
        "scores": {f"{name}, {where}": value for where, each in told["metrics"].items() for name, value in each.items()},
        "label": told["task_definition"]["label"], "choose": told["choose"][metric], "majority": told["majority"][split][metric],
        "linear_probe": told["linear_probe"][split][metric], "best_epoch": told["best_epoch"],
        "trainable_parameters": told["trainable_parameters"], "seconds": told["seconds"]["train"] / heads, "heads": heads,
        "cache_bytes": told["cache_bytes"], "config": config, "layers": told.get("layers"),
        "backbone": Path(told["backbone"]).name,
        "curve": [[line["epoch"], line["loss"], line["choose"][metric]] for line in runs.curve(found)],
    }  # fmt: skip


def _options(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What tells the runs of a task apart, and what every reader looks for."""
    names = [name for name in rows[0]["config"] if name not in OF_PLACE]
    differ = [name for name in names if len({json.dumps(row["config"].get(name)) for row in rows}) > 1]
    return [name for name in names if name in TOLD or name in differ]


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which of (cost, quality) are on the Pareto front: nothing costs no more and is no worse, and better in one of the two."""
    order = sorted(range(len(points)), key=lambda number: (points[number][0], -points[number][1]))
    found: set[int] = set()
    best = float("-inf")
    for number in order:
        cost, quality = points[number]
        if quality > best:
            best = quality
            found.add(number)
        elif any(points[other] == (cost, quality) for other in found):
            found.add(number)
    return found


def html(data: dict[str, Any]) -> str:
    """One page that holds its data, style and script."""
    page = resources.files("pipeline").joinpath("report.html").read_text("utf-8")
    held = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # text in it cannot end the script that holds it
    return page.replace('"{data}"', held)


def markdown(data: dict[str, Any]) -> str:
    """The same tables without the pictures."""
    lines = [
        f"# Runs under {data['store']}",
        "",
        f"{data['made']}. The best run of a task is the best on the part that chose its epoch.",
        "",
    ]
    best = [(name, task["runs"][0]) for name, task in data["tasks"].items()]
    lines += _table(
        ["task", "metric", "majority", "linear probe", "READ", "best run", "parameters", "seconds", "cache"],
        (
            [name, f"{row['metric']}, {row['split']}", *(f"{row[what]:.4f}" for what in ("majority", "linear_probe", "score")),
             row["run"], f"{row['trainable_parameters']:,}", f"{row['seconds']:.1f}", size(row["cache_bytes"])]
            for name, row in best
        ),
    )  # fmt: skip
    for name, task in data["tasks"].items():
        scores = [row["score"] for row in task["runs"]]
        spread = f", {statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        lines += [
            "",
            f"## {name}",
            "",
            f"{len(scores)} run{'s' if len(scores) > 1 else ''}{spread} ({task['metric']}, {task['split']})",
            "",
        ]
        if layers := task["runs"][0]["layers"]:
            heard = ", ".join(f"{block} {value:.3f}" for block, value in layers.items())
            lines += [f"Its best READ's contribution of each layer, ÷ the norm of the final state: {heard}", ""]
        lines += _table(
            ["run", "choosing part", task["split"], "parameters", "seconds", "cache", "Pareto", *task["options"]],
            (
                [row["run"], f"{row['choose']:.4f}", f"{row['score']:.4f}", f"{row['trainable_parameters']:,}",
                 f"{row['seconds']:.1f}", size(row["cache_bytes"]), ", ".join(COSTS[cost] for cost in row["fronts"]),
                 *(str(row["config"].get(option)) for option in task["options"])]
                for row in task["runs"][:LISTED]
            ),
        )  # fmt: skip
        if len(scores) > LISTED:
            lines += ["", f"and {len(scores) - LISTED:,} more, on the page"]
    lines += ["", *(f"- {text}" for text in data["damaged"])]
    return "\n".join(lines).rstrip() + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body]
