"""Many heads that differ in what a grid says: trained in passes, ranked by the part that chooses, scored once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import grid, propose, runs, together
from pipeline.board import in_words
from pipeline.config import Sweep, Train
from pipeline.opening import using
from pipeline.show import Show, duration
from store import writer
from store.errors import Damaged, Refused
from store.fingerprint import fingerprint

SHOWN = 20
"""settings of the table"""


def run(config: Sweep, show: Show) -> dict[str, Any]:
    """The command `sweep`."""
    if config.grid is None:
        raise Refused("give GRID=grid.yaml, which says what is swept: for example `lr: [0.0003, 0.001, 0.003]`")
    if config.read.shared:
        raise Refused("a sweep trains heads each with a READ of its own; leave read.shared out")
    grids = grid.read(config.grid)
    grid.check(config, grids)
    writer.check_writable(config.store.home / "sweeps")
    seconds: dict[str, float] = {}
    known = _known(config)
    if config.trials is None:
        settings = grid.settings(grids)
        rows = _train(config, settings, known, show, seconds)
    else:
        propose.check(grids)
        rows = []

        def score(settings: list[dict[str, Any]]) -> list[float | None]:
            made = _train(config, settings, known, show, seconds)
            rows.extend(made)
            return [row["choose"] for row in made]

        name = _name(config, grids)
        path = config.store.home / "sweeps" / f"{name}.sqlite"
        found = propose.propose(
            path, name, grids[0], config.trials, config.width, config.seed, score,
            lambda done, trials: show.line(f"study {name} in {path}: {done} of {trials} trials are there"),
        )  # fmt: skip
        settings = [setting for setting in found if setting not in [row["setting"] for row in rows]]
        rows += _train(config, settings, known, show, seconds)  # of before: their runs are there
    return _told(config, rows, show, seconds)


def _known(config: Sweep) -> dict[str, dict[str, Any]]:
    """The runs that are there, by what fixes them."""
    needed = {"key", "choose", "metrics", "linear_probe", "trainable_parameters"}
    every = (found for found in runs.listing(config.store.home) if not isinstance(found, Damaged))
    return {found.told["key"]: found.told | {"path": str(found.path)} for found in every if needed <= set(found.told)}


def _name(config: Sweep, grids: list[grid.Grid]) -> str:
    """Of a study: another for another grid or other settings, but not for more trials."""
    own = config.model_dump(mode="json", exclude=grid.FIXED - {"task", "seeds"})
    return f"{Path(config.task).stem}-{fingerprint({'sweep': repr(own), 'grid': repr(grids)})[:12]}"


def _train(
    config: Sweep, settings: Sequence[dict[str, Any]], known: dict[str, dict[str, Any]], show: Show, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """A row a setting, over its seeds. What is trained already, here or before, is not trained again."""
    configs = [each for setting in settings for each in together.seeded(_streamed(config, setting))]
    asked = together.open_all(configs, show, seconds)
    missing = list({each.key: each for each in asked if not _there(each, known, show)}.values())
    if len(missing) < len(asked):
        show.line(f"{len(asked) - len(missing):,} of {len(asked):,} heads are trained already")
    missing.sort(key=lambda each: each.stream)  # a pass is of one stream, as far as can be
    with using(*(each.opened for each in missing)):
        for begin in range(0, len(missing), config.width):
            part = missing[begin : begin + config.width]
            for each, document in zip(part, together.train(part, show, seconds), strict=True):
                known[each.key] = document
    documents = iter([known[each.key] for each in asked])
    return [_row(setting, [next(documents) for _ in range(config.seeds)]) for setting in settings]


def _there(each: together.Asked, known: dict[str, dict[str, Any]], show: Show) -> bool:
    """Whether a head is trained already, and its weights are there too."""
    if each.key not in known:
        return False
    if "path" in known[each.key]:
        try:
            runs.load_head(runs.open_run(Path(known[each.key]["path"])))
        except Damaged as error:
            show.line(f"trained again: {error}")
            return False
    return True


def _streamed(config: Sweep, setting: dict[str, Any]) -> Train:
    """The training of a setting, on the stream that all of them share."""
    made = grid.training(config, setting)
    if made.schedule.stream_seed is None:
        made = made.model_copy(update={"schedule": made.schedule.model_copy(update={"stream_seed": config.seed})})
    return made


def _row(setting: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": setting, "trainable_parameters": documents[0]["trainable_parameters"]}
    if any(document.get("diverged") for document in documents):
        return row | {"choose": None, "metrics": {}, "runs": []}
    chosen = [next(iter(document["choose"].values())) for document in documents]
    row |= {"task": documents[0]["task"], "choose": float(np.mean(chosen)), "choose_deviation": _deviation(chosen), "metrics": {}}
    for split, values in documents[0]["metrics"].items():
        for metric in values:
            scores = [document["metrics"][split][metric] for document in documents]
            told = {"mean": float(np.mean(scores)), "standard_deviation": _deviation(scores)}
            row["metrics"].setdefault(split, {})[metric] = told
    return row | {"linear_probe": documents[0]["linear_probe"], "runs": [document["run"] for document in documents]}


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _told(config: Sweep, rows: list[dict[str, Any]], show: Show, seconds: dict[str, float]) -> dict[str, Any]:
    """Ranked by what chose, and scored on the first evaluation split beside it."""
    rows = sorted(rows, key=lambda row: -np.inf if row["choose"] is None else row["choose"], reverse=True)
    labels = [row["setting"].get("label") for row in rows]
    rows = sorted(rows, key=lambda row: labels.index(row["setting"].get("label")))  # other labels are another task
    if all(row["choose"] is None for row in rows):
        raise Refused("no setting found a number for its loss; lower the learning rates of the grid")
    best = next(row for row in rows if row["choose"] is not None)
    split, values = next(iter(best["metrics"].items()))
    metric = next(iter(values))
    spread = ["±"] if config.seeds > 1 else []
    body = []
    for row in rows[:SHOWN]:
        scored = row["metrics"].get(split, {}).get(metric, {"mean": None, "standard_deviation": None})
        told = [row["choose"], row.get("choose_deviation"), scored["mean"], scored["standard_deviation"]]
        body.append([in_words(row["setting"]), row["trainable_parameters"], *(told if spread else told[::2])])
    show.table(["setting", "parameters", f"{metric}, choosing part", *spread, f"{metric}, {split}", *spread], body)
    if len(rows) > SHOWN:
        show.line(f"and {len(rows) - SHOWN:,} more")
    diverged = sum(row["choose"] is None for row in rows)
    if diverged:
        show.line(f"{diverged} found no number for their loss")
    for label in dict.fromkeys(labels):
        first = next(row for row in rows if row["setting"].get("label") == label)
        if first["choose"] is not None:
            score, probe = first["metrics"][split][metric]["mean"], first["linear_probe"][split][metric]
            show.line(f"best by the choosing part: {in_words(first['setting'])}; runs {', '.join(first['runs'])}")
            show.line(f"its {metric} on {split}: {score:.4f}; linear probe {probe:.4f}")
    spent = ", ".join(f"{phase} {duration(value)}" for phase, value in seconds.items())
    show.line(f"{spent}; `make report` shows all runs")
    return {"task": best["task"], "metric": metric, "split": split, "seeds": config.seeds, "seconds": seconds, "rows": rows}
