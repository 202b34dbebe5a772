"""What is seen while heads train: progress, the leading heads, a JSON line an epoch under STORE, a tracker where asked for."""

import json
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from pipeline import track
from pipeline.config import Train
from pipeline.show import Meter, Show
from stages.tasks import Task
from store import files

LEADERS = 5
"""heads of the small table"""


class Board:
    """Told of every epoch of every head."""

    def __init__(self, show: Show, configs: Sequence[Train], tasks: Sequence[Task], examples: int) -> None:
        """examples: that an epoch goes through."""
        self.show, self.configs, self.tasks = show, configs, tasks
        self.names = names(configs)
        self.total = examples * max(config.epochs for config in configs)
        self.lines: dict[int, dict[str, Any]] = {}
        self.best: dict[int, float] = {}
        self.stale = False
        self.file: TextIO | None = None
        self.meter: Meter | None = None

    def __enter__(self) -> "Board":
        first = self.configs[0]
        folder = first.store.home / "logs"
        files.make(folder)
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.tasks[0].name}"
        self.path = next(path for n in range(10**6) if not (path := folder / f"{stem}{f'-{n}' if n else ''}.jsonl").exists())
        self.file = self.path.open("x")
        self.tracker = track.TRACKERS[first.track](first.store.home)
        if len(self.configs) > 1:
            self._progress = self.show.progress("training", self.total, "examples")
            self.meter = self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.meter:
            if kind is None:
                self.meter.add(self.total - self.meter.done)  # what stopped early is done too
                self._leaders()
            self._progress.__exit__(kind, error, trace)
        assert self.file
        self.file.close()
        self.tracker.close()

    def seen(self, examples: int) -> None:
        """More examples were gone through."""
        if self.stale:
            self._leaders()
        if self.meter:
            self.meter.add(examples)

    def told(self, number: int, line: dict[str, Any]) -> None:
        """An epoch of a head has ended."""
        assert self.file
        config, task = self.configs[number], self.tasks[number]
        said = {"task": task.name, "head": number, "setting": self.names[number], "seed": config.seed} | line
        self.file.write(json.dumps(said) + "\n")
        self.file.flush()
        self.tracker.line(task.name, f"{self.path.stem}-{number}", self.names[number], line)
        score = line["choose"][task.metrics[0]]
        if score > self.best.get(number, float("-inf")):
            self.best[number] = score
            self.lines[number] = line
        if self.meter:
            self.stale = True
        else:
            self.show.line(epoch(line))

    def _leaders(self) -> None:
        self.stale = False
        ranked = sorted(self.best, key=lambda number: -self.best[number])
        tasks = dict.fromkeys(task.name for task in self.tasks)
        each = max(1, LEADERS // len(tasks))  # of each task: their scores say nothing of one another
        order = [n for name in tasks for n in [n for n in ranked if self.tasks[n].name == name][:each]]
        rows = [
            [
                self.tasks[n].name,
                self.names[n],
                self.tasks[n].metrics[0],
                self.best[n],
                self.lines[n]["epoch"],
                self.lines[n]["loss"],
            ]
            for n in order
        ]
        assert self.meter
        self.meter.beside(["task", "leading heads", "metric", "choosing part", "epoch", "loss"], rows)


def epoch(line: dict[str, Any]) -> str:
    """A line of a curve in words."""
    chosen = "  ".join(f"{name} {value:.4f}" for name, value in line["choose"].items())
    return f"epoch {line['epoch']:>2}  loss {line['loss']:.4f}  choosing part: {chosen}  {line['seconds']:.1f} s"


def names(configs: Sequence[Train]) -> list[str]:
    """What tells each from the others: the fields in which they differ, as one would write them."""
    every = [flat(config.model_dump(mode="json")) for config in configs]
    differ = [name for name in every[0] if len({repr(each.get(name)) for each in every}) > 1]
    return [in_words({name: each[name] for name in differ}) or "one" for each in every]


def in_words(setting: Mapping[str, Any]) -> str:
    """A setting as one would write it, its numbers short."""
    return " ".join(f"{name}={f'{value:.4g}' if isinstance(value, float) else value}" for name, value in setting.items())


def flat(said: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A configuration with its groups' names before a dot."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found
