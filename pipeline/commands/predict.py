"""Labels for new text or images with a saved run, its head attached to the live backbone; or for a cached split."""

import importlib
import json
from typing import Any

import numpy as np
import torch

from pipeline import recipe as recipe_module
from pipeline import runs
from pipeline.commands.evaluate import cache_of
from pipeline.config import Predict
from pipeline.runs import Run
from pipeline.show import Show
from stages import batching, sources
from stages.access import ONCE
from stages.device import pick
from stages.evaluate import outputs, say
from stages.heads import Head
from stages.loader import Loader
from stages.sources import IMAGES
from stages.tasks import Task
from store.errors import Refused

EXAMPLES = 512
"""of a cached split at a time"""


def run(config: Predict, show: Show) -> dict[str, Any]:
    """The command `predict`."""
    device = pick(config.device)
    found = runs.find(config.store.home, config.run, config.task)
    task = found.task
    if sum(given is not None for given in (config.text, config.file, config.split)) != 1:
        raise Refused("give one of TEXT (and TEXT_PAIR for a pair), FILE=in.jsonl, or SPLIT of the cache")
    head = runs.load_head(found).to(device)
    if config.split:
        said = _split(config, found, head, device)
    else:
        columns = _images(config) if task.image else _texts(config, task)
        said = _told(task, _new(config, show, found, columns, head, device))
        what = "image" if task.image else "text"
        said = [{what: list(pair)} | answer for pair, answer in zip(zip(*columns, strict=True), said, strict=True)]
    for answer in said:
        what = f"row {answer['row']}" if "row" in answer else " | ".join(answer.get("text") or answer["image"])
        spread = "  ".join(f"{name} {p:.3f}" for name, p in answer.get("probabilities", {}).items())
        show.line(f"{answer.get('label', answer.get('value'))}\t{spread}\t{what}")
    return {"run": found.path.name, "task": task.name, "predictions": said}


def _told(task: Task, values: np.ndarray) -> list[dict[str, Any]]:
    """Outputs (n, K) as labels by name with their probabilities, or as values."""
    if task.kind == "regression":
        return [{"value": float(value)} for value in values[:, 0]]
    assert task.classes
    return [
        {
            "label": task.classes[int(row.argmax())],
            "probabilities": {name: float(p) for name, p in zip(task.classes, row, strict=True)},
        }
        for row in values
    ]


def _split(config: Predict, found: Run, head: Head, device: torch.device) -> list[dict[str, Any]]:
    assert config.split
    cache = cache_of(config.store, found, config.split)
    everything = np.arange(cache.manifest.counts["examples"])
    streams = list(runs.load_shape(found).states)
    said = say(head, Loader(cache, everything, np.full(len(everything), -1), EXAMPLES, device, streams, ONCE))
    rows = cache.table("row")[said.place]
    order = np.argsort(rows)
    return [{"row": int(row)} | told for row, told in zip(rows[order], _told(found.task, said.outputs[order]), strict=True)]


def _texts(config: Predict, task: Task) -> list[list[str]]:
    """The inputs by column of the task, each a list of texts."""
    if config.file is None:
        given = [config.text, config.text_pair][: 1 if config.text_pair is None else 2]
        if len(given) != len(task.text):
            wanted = "TEXT and TEXT_PAIR" if len(task.text) == 2 else "TEXT alone"
            raise Refused(f"task {task.name} reads {', '.join(task.text)}: give {wanted}, not {len(given)} text(s)")
        return [[str(text)] for text in given]
    columns: list[list[str]] = [[] for _ in task.text]
    try:
        lines = config.file.read_text("utf-8").split("\n")  # and no other line break: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"FILE={config.file} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise Refused(f"{config.file}, line {number}: not JSON ({error})") from None
        for column, values in zip(task.text, columns, strict=True):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise Refused(f"{config.file}, line {number}: no text in {column!r}; it has {has}")
            values.append(row[column])
    if not columns[0]:
        raise Refused(f"{config.file} is empty; it needs a line an example, with {', '.join(task.text)}")
    return columns


def _images(config: Predict) -> list[list[str]]:
    """The paths of an image, or of a folder of them, as the one column."""
    if config.file is None or not config.file.exists():
        raise Refused(f"this run reads images: give FILE=<an image, or a folder of them>, not {config.file or 'TEXT'}")
    found = [config.file]
    if config.file.is_dir():
        found = sorted(path for path in config.file.glob("[!.]*") if path.suffix.lower() in IMAGES)
    if not found:
        raise Refused(f"FILE={config.file} holds no images; known are {', '.join(sorted(IMAGES))}")
    return [[str(path) for path in found]]


def _new(config: Predict, show: Show, found: Run, columns: list[list[str]], head: Head, device: torch.device) -> np.ndarray:
    """Outputs (n, K) for new texts or images."""
    recipe = found.told["recipe"]
    name = config.backbone or found.told["backbone"]
    checkpoint = sources.checkpoint(name, local=False)
    assert checkpoint is not None
    reads = "processor" if found.task.image else "tokenizer"
    for what, now, then in (
        ("weights", checkpoint.weights, recipe["backbone"]["weights"]),
        ("config", checkpoint.config, recipe["backbone"]["config"]),
        (reads, getattr(checkpoint, reads), recipe[reads]["files"]),
    ):
        if now != then:
            raise Refused(
                f"backbone {name}: its {what} digest is {now[:12]}…, run {found.path.name} was trained on {then[:12]}…; "
                f"give BACKBONE=<the folder it was trained on>, or train again"
            )
    version = recipe_module.transformers_version()
    if version != recipe["transformers"]:
        show.line(f"the run's states are of transformers {recipe['transformers']}, here is {version}: they may differ a little")
    # here and not above: predicting for a cached split needs no transformers
    anatomies, attach = importlib.import_module("stages.anatomy"), importlib.import_module("stages.attach")
    backbones, build = importlib.import_module("stages.backbone"), importlib.import_module("pipeline.build")
    images = importlib.import_module("stages.images")
    processor, pixels = images.processor(checkpoint) if found.task.image else (None, None)
    backbone = backbones.Backbone(checkpoint.path, anatomies.describe(checkpoint.path, name, pixels), device)
    examples = build.at_hand(found.task, recipe, checkpoint, processor, columns, backbone.anatomy)
    attached = attach.attach(backbone, head, runs.load_shape(found).states, recipe["tokens"], recipe["codec"])
    results = np.empty((len(examples.source), found.task.outputs), np.float32)
    for batch in batching.by_length(examples.lengths):
        with torch.inference_mode():
            results[batch] = outputs(head, attached(examples.collate(batch))).cpu().numpy()
    return results
