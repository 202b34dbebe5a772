"""Stage two: train a READ from the cache, score it beside the majority class and a linear probe, save the run."""

import importlib
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import store
from pipeline import runs
from pipeline.config import Extract, Train
from pipeline.lookup import label_column, look
from pipeline.show import Show, duration, size
from stages import baselines, depths, tasks
from stages.device import pick
from stages.evaluate import say, score
from stages.heads import check_pool
from stages.loader import Loader
from stages.read import CELLS
from stages.selection import check as check_tokens
from stages.tasks import Task
from stages.train import Schedule, hold_out, train
from store import Cache, writer
from store.codecs import codec
from store.errors import Refused

EVALUATION_BATCH = 256


def run(config: Train, show: Show) -> dict[str, Any]:
    """The command `train`."""
    task, device = check(config), pick(config.device)
    seconds: dict[str, float] = {}
    with _Clock(seconds, "extract"):
        caches, unchecked = _caches(config, task, show)
    train_cache = caches[task.train]
    recipe = train_cache.manifest.recipe
    pool = check_pool(config.pool, recipe["tokens"])
    task, labels = _labels(task, caches)
    unlabelled = {split: int(len(known) - len(tasks.labelled(known))) for split, known in labels.items()}
    if any(unlabelled.values()):
        show.line(f"without a label, and left out: {', '.join(f'{count:,} of {s}' for s, count in unlabelled.items() if count)}")
    for split in task.evaluation:
        caches[split].check()  # these are read last: what is wrong with them is said first
    fit, choose = hold_out(labels[task.train], config.schedule.hold_out, config.seed)
    if task.kind == "classification" and len(np.unique(labels[task.train][fit])) < 2:
        only = task.classes[labels[task.train][fit][0]] if task.classes else ""
        raise Refused(f"every training label is {only!r}: there is nothing to tell apart; raise LIMIT, or mend the data")

    shape = _shape(config, task, pool, train_cache)
    torch.manual_seed(config.seed)
    head = runs.build(shape)
    if task.kind == "regression":
        head.standardise(labels[task.train][fit])
    head.to(device)
    parameters = {"read": _count(head.read), "head": _count(head) - _count(head.read)}
    show.line(
        f"{task.name}: {len(fit):,} examples train, {len(choose):,} ({config.schedule.hold_out:.0%} of train, seeded) "
        f"choose the epoch; READ({shape['width']}, {shape['hidden']}, {shape['cell']}) {parameters['read']:,} parameters, "
        f"head {parameters['head']:,}"
    )

    def load(cache: Cache, examples: np.ndarray, known: np.ndarray, batch: int = EVALUATION_BATCH) -> Loader:
        return Loader(cache, examples, known, batch, device)

    schedule = Schedule(
        config.epochs, config.lr, config.schedule.weight_decay, config.schedule.warmup, config.schedule.clip,
        config.schedule.patience, config.seed,
    )  # fmt: skip
    choosing = load(train_cache, choose, labels[task.train])
    with _Clock(seconds, "train"):
        fitting = load(train_cache, fit, labels[task.train], config.batch)
        outcome = train(head, task, fitting, choosing, schedule, lambda line: show.line(_epoch(line)))
        head.load_state_dict(outcome.weights)
    evaluation = {split: load(caches[split], tasks.labelled(labels[split]), labels[split]) for split in task.evaluation}
    with _Clock(seconds, "evaluate"):
        metrics = {split: score(task, say(head, loader)) for split, loader in evaluation.items()}
    with _Clock(seconds, "baselines"):
        plain = baselines.beside(task, fitting, choosing, evaluation, pool, depths.Depths.of(shape["states"]))

    document = {
        "task": task.name,
        "fingerprints": {split: cache.fingerprint for split, cache in caches.items()},
        "metrics": metrics,
        **plain,
        "best_epoch": outcome.epoch,
        "trainable_parameters": parameters["read"] + parameters["head"],
        "parameters": parameters,
        "examples": {"train": len(fit), "choose": len(choose)} | {s: len(loader) for s, loader in evaluation.items()},
        "seconds": {phase: round(spent, 3) for phase, spent in seconds.items()},
        "unlabelled": unlabelled,
        "unchecked": unchecked,
        "cache_bytes": sum(cache.manifest.bytes for cache in caches.values()),
    }
    told = document | {
        "config": config.model_dump(mode="json"),
        "backbone": str(Path(config.backbone).resolve()) if Path(config.backbone).is_dir() else config.backbone,
        "recipe": recipe,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "scikit-learn", "safetensors")},
    }  # fmt: skip
    name = runs.new_name(shape, recipe["tokens"], config.seed)
    path = runs.save(config.store, task, name, shape, head.cpu(), told, outcome.curve)
    _report(show, document, path)
    return {"run": path.name, "path": str(path)} | document


def check(config: Train) -> Task:
    """Refuse what can be refused by name alone; returns the task."""
    task = tasks.find(config.task)
    check_tokens(config.tokens)
    codec(config.codec)
    if config.cell not in CELLS:
        raise Refused(f"unknown cell {config.cell!r}; known: {', '.join(CELLS)}")
    if config.cache is None:
        check_pool(config.pool, config.tokens)
        kept = depths.parse(config.layers)
        if kept is not None and not any(kept):
            raise Refused(f"layers {config.layers} keeps no block, and READ runs over block outputs; add some of 1 … L")
        if config.read.initial == "embedding" and kept is not None and 0 not in kept:
            raise Refused(f"read.initial=embedding needs layer 0, and layers is {config.layers}; add 0 to it")
    writer.check_writable(config.store / "runs" / task.name)
    return task


def _caches(config: Train, task: Task, show: Show) -> tuple[dict[str, Cache], list[str]]:
    """The caches of train and the evaluation splits, found or extracted; and what they could not be compared with."""
    looked = look(config, task)
    paths = looked.caches
    if paths is None and config.no_extract:
        near = f"; near: {'; '.join(looked.near)}" if looked.near else ""
        raise Refused(f"no cache under {config.store} matches task {task.name}, and --no-extract forbids to make one{near}")
    if paths is None:
        for line in looked.near:
            show.line(f"not used: {line}")
        # only now is the backbone's side needed: where the cache is there, transformers need not be
        extract = importlib.import_module("pipeline.commands.extract")
        made = extract.run(Extract.part_of(config, ",".join((task.train, *task.evaluation))), show)["splits"]
        paths = {split: config.store / "caches" / said["fingerprint"] for split, said in made.items()}
        return _opened(paths, show), []
    if looked.unchecked:
        unchecked = "; ".join(looked.unchecked)
        show.line(f"not compared with the cache: {unchecked}; the cache was chosen by the names in its manifest")
    return _opened(paths, show), looked.unchecked


def _opened(paths: dict[str, Path], show: Show) -> dict[str, Cache]:
    caches = {split: store.open(path) for split, path in paths.items()}
    for split, cache in caches.items():
        show.line(f"{split}: cache {cache.fingerprint[:12]}, {len(cache.length):,} examples, {size(cache.manifest.bytes)}")
    return caches


def _labels(task: Task, caches: dict[str, Cache]) -> tuple[Task, dict[str, np.ndarray]]:
    """The task with its classes named, and the labels of every split from its cache."""
    columns, where = {}, {}
    for split, cache in caches.items():
        columns[split], where[split] = label_column(task, cache, split)
    task, found = tasks.settle(task, columns, where)
    for split in task.evaluation:
        if not len(tasks.labelled(found[split])):
            raise Refused(f"split {split} of {task.name} has no labels: it cannot be scored")
    return task, found


def _shape(config: Train, task: Task, pool: str, cache: Cache) -> runs.Shape:
    read = config.read
    return {
        "width": cache.manifest.counts["width"], "hidden": config.hidden, "cell": config.cell, "aggregate": read.aggregate,
        "initial": read.initial, "scale_in": read.scale_in, "scale_out": read.scale_out, "pool": pool,
        "outputs": task.outputs, "dropout": read.dropout, "states": cache.states,
    }  # fmt: skip


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


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


class _Clock:
    """Seconds of one phase."""

    def __init__(self, into: dict[str, float], phase: str) -> None:
        self.into, self.phase = into, phase

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.phase] = time.perf_counter() - self.begun
