"""Stage two: train a READ from the cache, score it beside the majority class and a linear probe, save the run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import fitting, runs
from pipeline.config import Train
from pipeline.opening import check, label_words, open_caches, shape_of
from pipeline.show import Show, duration, size
from stages import baselines
from stages.device import pick
from stages.shape import count
from store import writer

MANNER = {
    "memory": "once, and kept in memory",
    "random": "row by row in random order",
    "windows": "by windows of chunks, shuffled within",
}
"""how caches are read, in words"""


def run(config: Train, show: Show) -> dict[str, Any]:
    """The command `train`."""
    task, device = check(config), pick(config.device)
    writer.check_writable(config.store / "runs" / task.name)
    seconds: dict[str, float] = {}
    with _clock(seconds, "extract"):
        opened = open_caches(config, task, show)
    task, recipe = opened.task, opened.recipe
    shape = shape_of(config, task, recipe, width=opened.caches[task.train].width)
    answers = label_words(config, opened, shape)
    access, why = fitting.reading(config, opened, list(shape.states), device)
    show.line(f"caches are read {MANNER[access.how]} ({why})")
    loaded = fitting.loaders(config, opened, config.seed, list(shape.states), device, access)
    with _clock(seconds, "train"):
        head = fitting.fresh(opened, shape, answers, loaded.fit, config.seed)
    parameters = {"read": count(head.read), "head": count(head) - count(head.read)}
    show.line(
        f"{task.name}: {len(loaded.fit):,} examples train, {len(loaded.choose):,} ({config.schedule.hold_out:.0%} of train, "
        f"seeded) choose the epoch; READ({shape.width}, {shape.hidden}, {shape.cell}) {parameters['read']:,} parameters, "
        f"head {parameters['head']:,}"
    )
    # before training: what can go wrong here should cost nothing
    with _clock(seconds, "baselines"):
        plain = baselines.beside(task, loaded.fit, loaded.choose, loaded.scored, shape.pool, shape.depths)
    with _clock(seconds, "train"):
        plan = fitting.schedule(config, config.seed)
        fitted = fitting.fit(head, opened, loaded, plan, lambda line: show.line(_epoch(line)))

    chosen = fitted.outcome.curve[fitted.outcome.epoch - 1]["choose"]
    document = {
        "task": task.name,
        "fingerprints": {split: cache.fingerprint for split, cache in opened.caches.items()},
        "metrics": fitted.metrics,
        **plain,
        "best_epoch": fitted.outcome.epoch,
        "choose": chosen,
        "trainable_parameters": parameters["read"] + parameters["head"],
        "parameters": parameters,
        "examples": {"train": len(loaded.fit), "choose": len(loaded.choose)} | {s: len(x) for s, x in loaded.scored.items()},
        "seconds": {phase: round(spent, 3) for phase, spent in seconds.items()},
        "unlabelled": opened.unlabelled,
        "unchecked": opened.unchecked,
        "access": access.how,
        "cache_bytes": sum(cache.manifest.bytes for cache in opened.caches.values()),
    }
    told = document | {
        "config": config.model_dump(mode="json"),
        "backbone": str(Path(config.backbone).resolve()) if Path(config.backbone).is_dir() else config.backbone,
        "recipe": recipe,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "scikit-learn", "safetensors")},
    }
    name = runs.new_name(shape, recipe["tokens"], config.seed)
    path = runs.save(config.store, task, name, shape, fitted.head.cpu(), told, fitted.outcome.curve)
    _report(show, document, path)
    return {"run": path.name, "path": str(path)} | document


def _epoch(line: dict[str, Any]) -> str:
    chosen = "  ".join(f"{name} {value:.4f}" for name, value in line["choose"].items())
    return f"epoch {line['epoch']:>2}  loss {line['loss']:.4f}  choosing part: {chosen}  {line['seconds']:.1f} s"


def _report(show: Show, document: dict[str, Any], path: Path) -> None:
    rows = [
        [split, metric, document["majority"][split][metric], document["linear_probe"][split][metric], value]
        for split, values in document["metrics"].items()
        for metric, value in values.items()
    ]
    show.table(["split", "metric", "majority", "linear probe", "READ"], rows)
    spent = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in document["seconds"].items())
    show.line(f"cache {size(document['cache_bytes'])}; {spent}; best epoch {document['best_epoch']}")
    show.line(f"run {path.name} saved at {path}")


@contextmanager
def _clock(into: dict[str, float], phase: str) -> Iterator[None]:
    """Seconds of one phase."""
    begun = time.perf_counter()
    yield
    into[phase] = into.get(phase, 0.0) + time.perf_counter() - begun
