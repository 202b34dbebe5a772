"""Heads trained from as few passes as can be: configurations → caches → streams of batches → saved runs."""

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import fitting, runs, track
from pipeline.board import Board
from pipeline.config import Train
from pipeline.opening import Opened, check, label_words, open_caches, shape_of
from pipeline.resume import Resume
from pipeline.show import Show
from stages.device import pick
from stages.listening import listening
from stages.shape import Shape, count
from stages.tasks import labelled
from store import pins, writer
from store.errors import Refused
from store.fingerprint import fingerprint
from store.stores import root_of

OF_HEADS = ("cell", "hidden", "pool", "epochs", "lr", "seed", "seeds", "read", "schedule", "batch", "reading", "track")
"""fields that say nothing of which caches are read"""

TRAINING = 1
"""raised where the same configuration ends in other weights, so that a sweep does not take runs of before for its own"""

MANNER = {
    "memory": "once, and kept in memory",
    "random": "row by row in random order",
    "windows": "by windows of chunks, shuffled within",
}
"""how caches are read, in words"""


class Asked(NamedTuple):
    """A head that is to be trained."""

    config: Train
    opened: Opened
    shape: Shape
    words: torch.Tensor | None
    """(K, D) label words of a verbalizer"""

    @property
    def seed(self) -> int:
        """Of the stream: its order and its held-out part."""
        own = self.config.schedule.stream_seed
        return self.config.seed if own is None else own

    @property
    def stream(self) -> str:
        """What heads have in common that learn from one stream."""
        caches = {split: cache.fingerprint for split, cache in self.opened.caches.items()}
        # a column that has labels for other examples trains on others, holds out others and is scored on others
        known = {split: zlib.crc32(labelled(values).tobytes()) for split, values in self.opened.labels.items()}
        said = self.config
        return _text(
            {"caches": caches, "labelled": known, "streams": list(self.shape.states), "seed": self.seed, "batch": said.batch,
             "hold_out": said.schedule.hold_out, "reading": said.reading.model_dump(mode="json")}
        )  # fmt: skip

    @property
    def key(self) -> str:
        """What fixes the trained head: what is said of it, its task, and the caches by their fingerprints."""
        said = self.config.model_dump(mode="json", include={*OF_HEADS, "head", "words"} - {"seeds", "track", "reading"})
        said["schedule"]["stream_seed"] = self.seed
        task = self.opened.task
        about = {name: getattr(task, name) for name in ("name", "kind", "label", "classes", "metrics", "words")}
        caches = {split: cache.fingerprint for split, cache in self.opened.caches.items()}
        access = fitting.reading(self.config, self.opened, list(self.shape.states), pick(self.config.device)).access
        window = access.window_bytes if access.how == "windows" else None  # the order of batches depends on it
        order = {"training": TRAINING, "window": window}
        return fingerprint(order | {"head": _text(said), "task": _text(about), "caches": caches})


def seeded(config: Train) -> list[Train]:
    """A configuration once a seed; all of them learn from one stream."""
    if config.seeds == 1:
        return [config]
    own = config.schedule.stream_seed
    schedule = config.schedule.model_copy(update={"stream_seed": config.seed if own is None else own})
    seeds = range(config.seed, config.seed + config.seeds)
    return [config.model_copy(update={"seed": seed, "seeds": 1, "schedule": schedule}) for seed in seeds]


def open_all(configs: Sequence[Train], show: Show, seconds: dict[str, float]) -> list[Asked]:
    """Find or extract the caches of all, each once. Raises Refused where caches and heads do not go together, before training."""
    tasks = [check(config) for config in configs]  # all names are looked at before anything is spent
    for config, task in zip(configs, tasks, strict=True):
        track.check(config.track)
        for folder in ("runs/" + task.name, "logs"):
            writer.check_writable(config.store.home / folder)
    called = {config.task: task.name for config, task in zip(configs, tasks, strict=True)}
    if len(set(called.values())) < len(called):
        raise Refused(f"several tasks are called {max(called.values(), key=list(called.values()).count)!r}: give each a `name:`")
    opened: dict[str, Opened] = {}
    asked = []
    for config, task in zip(configs, tasks, strict=True):
        key = _text(config.model_dump(mode="json", exclude=set(OF_HEADS)))
        if key not in opened:
            with clock(seconds, "extract"):
                opened[key] = open_caches(config, task, show)
        mine = opened[key]
        shape = shape_of(config, mine.task, mine.recipe, width=mine.caches[mine.task.train].width)
        asked.append(Asked(config, mine, shape, label_words(config, mine, shape)))
    return asked


def train(asked: Sequence[Asked], show: Show, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Train all of them, those of one stream in one pass; a document each, in their order, with its run's folder.

    Of a head whose loss was no number the document is {"diverged": True, …}, and it is not saved.
    """
    documents: list[dict[str, Any]] = [{} for _ in asked]
    streams: dict[str, list[int]] = {}
    for number, each in enumerate(asked):
        streams.setdefault(each.stream, []).append(number)
    for which in streams.values():
        own = {"extract": seconds.get("extract", 0.0)}
        for number, document in zip(which, _pass([asked[n] for n in which], show, own), strict=True):
            documents[number] = document
        for phase in ("train", "baselines"):
            seconds[phase] = seconds.get(phase, 0.0) + own[phase]
    return documents


def _pass(asked: list[Asked], show: Show, seconds: dict[str, float]) -> list[dict[str, Any]]:
    first = asked[0]
    device, streams, opened = pick(first.config.device), list(first.shape.states), [each.opened for each in asked]
    access, why = fitting.reading(first.config, first.opened, streams, device)
    show.line(f"caches are read {MANNER[access.how]} ({why})")
    loaded = fitting.loaders(first.config, first.opened, first.seed, streams, device, access)
    with clock(seconds, "train"):
        learners = [
            fitting.learner(each.config, each.opened, each.shape, each.words, loaded.fit, each.config.seed) for each in asked
        ]
    _introduce(asked, loaded, [each.head for each in learners], show)
    # before training: what can go wrong here should cost nothing
    plain: dict[str, Any] = {}
    for each in asked:
        with clock(seconds, "baselines"):
            if (same := _labels(each)) not in plain:
                plain[same] = fitting.plain(each.opened, loaded, each.shape)
    board = Board(show, [each.config for each in asked], [each.opened.task for each in asked], len(loaded.fit))
    key = fingerprint({"heads": [each.key for each in asked], "seed": first.seed})
    keeper = Resume(first.config.store.home, key, show.line)
    with clock(seconds, "train"), board:
        if standing := keeper.load():
            show.line(f"going on after epoch {standing.numbers['epoch']}, where this training was interrupted")
        fitted = fitting.fit(learners, opened, loaded, first.seed, board.told, board.seen, keeper)
    for name, one in zip(board.names, fitted, strict=True):
        if one.outcome.lost and one.metrics:
            show.line(f"{name}: the loss was no number in epoch {one.outcome.lost}; epoch {one.outcome.epoch} is kept; lower LR")
    documents = [
        saved(each, one, plain[_labels(each)], loaded, seconds, access.how, len(asked))
        for each, one in zip(asked, fitted, strict=True)
    ]
    keeper.done()
    return documents


def _pin(home: Path, opened: Opened, run: str) -> None:
    """Hold the caches that lie in other stores, whose `gc` does not see our runs; where that cannot be, it is not."""
    for cache in opened.caches.values():
        root = root_of(cache.where)
        if root != home:
            with suppress(OSError, Refused):
                pins.pin(root, cache.fingerprint, f"run-{run}", str(home.resolve()))


def _labels(each: Asked) -> str:
    return _text([each.opened.task.name, each.opened.task.label, each.opened.task.metrics, each.shape.pool])


def _introduce(asked: list[Asked], loaded: fitting.Loaders, heads: list[Any], show: Show) -> None:
    first, said = asked[0], asked[0].config
    names = ", ".join(dict.fromkeys(each.opened.task.name for each in asked))
    read = count(heads[0].read)
    what = f"READ({first.shape.width}, {said.hidden}, {said.cell}) {read:,} parameters, head {count(heads[0]) - read:,}"
    if len(asked) > 1:
        shapes = len({repr(each.shape) for each in asked})
        what = f"{len(asked)} heads in one pass, {shapes} shape{'s' if shapes > 1 else ''}, {sum(map(count, heads)):,} parameters"
    show.line(
        f"{names}: {len(loaded.fit):,} examples train, {len(loaded.choose):,} ({said.schedule.hold_out:.0%} of train, "
        f"seeded) choose the epoch; {what}"
    )


def saved(
    each: Asked, fitted: fitting.Fitted, plain: dict[str, Any], loaded: fitting.Loaders, seconds: dict[str, float], how: str,
    heads: int, shared: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Save a trained head as a run; its document.

    seconds, heads: of the pass, and how many trained in it. shared: the tasks that its READ serves, where they are several.
    """
    config, opened, shape = each.config, each.opened, each.shape
    task, recipe = opened.task, opened.recipe
    parameters = {"read": count(fitted.head.read), "head": count(fitted.head) - count(fitted.head.read)}
    if not fitted.metrics:
        return {"task": task.name, "diverged": True, "lr": config.lr, "seed": config.seed,
                "trainable_parameters": sum(parameters.values())}  # fmt: skip
    curve = fitted.outcome.curve
    document = {
        "task": task.name,
        "fingerprints": {split: cache.fingerprint for split, cache in opened.caches.items()},
        "metrics": fitted.metrics,
        **plain,
        "best_epoch": fitted.outcome.epoch,
        "lost_epoch": fitted.outcome.lost or None,
        "choose": curve[fitted.outcome.epoch - 1]["choose"],
        "trainable_parameters": sum(parameters.values()),
        "parameters": parameters,
        "examples": {"train": len(loaded.fit), "choose": len(loaded.choose)} | {s: len(x) for s, x in loaded.scored.items()},
        "seconds": {phase: round(spent, 3) for phase, spent in seconds.items()},
        "heads": heads,
        **({"shared": shared} if shared else {}),
        "unlabelled": opened.unlabelled,
        "unchecked": opened.unchecked,
        "access": how,
        "cache_bytes": sum(cache.manifest.bytes for cache in opened.caches.values()),
    }
    told = document | {
        "config": config.model_dump(mode="json"),
        "key": each.key,
        "layers": dict(zip(_blocks(shape), heard, strict=True)) if (heard := listening(fitted.head, loaded.choose)) else None,
        "backbone": str(Path(config.backbone).resolve()) if Path(config.backbone).is_dir() else config.backbone,
        "recipe": recipe,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "scikit-learn", "safetensors")},
    }
    name = runs.new_name(shape, recipe["tokens"], config.seed)
    path = runs.save(config.store.home, task, name, shape, fitted.head.cpu(), told, curve)
    _pin(config.store.home, opened, path.name)
    return {"run": path.name, "path": str(path)} | document


def _blocks(shape: Shape) -> list[str]:
    states = list(shape.states.values())[-1]
    return [states[block] for block in shape.depths.blocks]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@contextmanager
def clock(into: dict[str, float], phase: str) -> Iterator[None]:
    """Seconds of one phase, added to those before."""
    begun = time.perf_counter()
    yield
    into[phase] = into.get(phase, 0.0) + time.perf_counter() - begun
