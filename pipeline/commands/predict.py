"""Labels for new text with a saved run: tokenise -> backbone -> select -> codec -> READ -> head; or for a cached split."""

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
from stages import sources
from stages.device import pick
from stages.evaluate import outputs, say
from stages.heads import Batch, Head
from stages.loader import Loader
from stages.packing import unpack
from stages.selection import kept
from stages.tasks import Task
from store.errors import Refused

EXAMPLES = 512
"""put through the backbone at a time"""


def run(config: Predict, show: Show) -> dict[str, Any]:
    """The command `predict`."""
    device = pick(config.device)
    found = runs.find(config.store, config.run, config.task)
    task = found.task
    if sum(given is not None for given in (config.text, config.file, config.split)) != 1:
        raise Refused("give one of TEXT (and TEXT_PAIR for a pair), FILE=in.jsonl, or SPLIT of the cache")
    head = runs.load_head(found).to(device)
    if config.split:
        said = _split(config, found, head, device)
    else:
        texts = _texts(config, task)
        said = _told(task, _new(config, show, found, texts, head, device))
        said = [{"text": list(pair)} | answer for pair, answer in zip(zip(*texts, strict=True), said, strict=True)]
    for answer in said:
        what = " | ".join(answer["text"]) if "text" in answer else f"row {answer['row']}"
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
    said = say(head, Loader(cache, everything, np.full(len(everything), -1), EXAMPLES, device))
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


def _new(config: Predict, show: Show, found: Run, texts: list[list[str]], head: Head, device: torch.device) -> np.ndarray:
    """Outputs (n, K) for new texts."""
    recipe = found.told["recipe"]
    name = config.backbone or found.told["backbone"]
    checkpoint = sources.checkpoint(name, local=False)
    assert checkpoint is not None
    for what, now, then in (
        ("weights", checkpoint.weights, recipe["backbone"]["weights"]),
        ("config", checkpoint.config, recipe["backbone"]["config"]),
        ("tokenizer", checkpoint.tokenizer, recipe["tokenizer"]["files"]),
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
    inputs, extract = importlib.import_module("stages.inputs"), importlib.import_module("stages.extract")
    backbones = importlib.import_module("stages.backbone")
    backbone = backbones.Backbone(checkpoint.path, backbones.describe(checkpoint.path, name), device)
    dataset = inputs.of_texts(dict(zip(found.task.text, texts, strict=True)))
    tokens = inputs.tokenize(
        inputs.tokenizer(checkpoint), dataset, found.task.text, np.arange(len(dataset)), recipe["max_length"]
    )
    results = []
    for begin in range(0, len(dataset), EXAMPLES):
        examples = range(begin, min(begin + EXAMPLES, len(dataset)))
        data = extract.chunk(backbone, tokens, examples, recipe["states"], recipe["tokens"], recipe["codec"])
        packed = {path.split("/")[1]: torch.from_numpy(block).to(device) for path, block in data.items()}
        lengths = torch.from_numpy(kept(tokens.lengths[examples.start : examples.stop], recipe["tokens"])).to(device)
        number = torch.arange(len(examples), device=device)
        batch = Batch(
            unpack(packed, recipe["codec"]),
            number.repeat_interleave(lengths),
            lengths.cumsum(0) - lengths,
            number * 0 - 1,
            number,
        )
        with torch.inference_mode():
            results.append(outputs(head, head(batch)).cpu().numpy())
    return np.concatenate(results)
