"""Trackers that are told of each epoch: TensorBoard and trackio. Sole home of both."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store.errors import Refused


class Tracker:
    """Told nothing: JSON lines are written anyway."""

    def line(self, task: str, run: str, setting: str, line: dict[str, Any]) -> None:
        """An epoch of a head."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard(Tracker):
    """Event files under <store>/tensorboard/<task>/<run>: `tensorboard --logdir <store>/tensorboard`."""

    def __init__(self, store: Path) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.folder = store / "tensorboard"
        self.writers: dict[str, Any] = {}

    def line(self, task: str, run: str, setting: str, line: dict[str, Any]) -> None:
        """An epoch of a head."""
        if run not in self.writers:
            self.writers[run] = self.writer(str(self.folder / task / run))
            self.writers[run].add_text("setting", setting)
        for name, value in _numbers(line).items():
            self.writers[run].add_scalar(name, value, line["epoch"])

    def close(self) -> None:
        """Write what is left."""
        for writer in self.writers.values():
            writer.close()


class Trackio(Tracker):
    """A project a task in trackio's own folder: `trackio show`. It has one run at a time: they are handed over at the end."""

    def __init__(self, store: Path) -> None:
        self.trackio = importlib.import_module("trackio")
        self.runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def line(self, task: str, run: str, setting: str, line: dict[str, Any]) -> None:
        """An epoch of a head."""
        self.runs.setdefault((task, run, setting), []).append(line)

    def close(self) -> None:
        """Hand over all of them."""
        for (task, name, setting), lines in self.runs.items():
            run = self.trackio.init(
                project=f"readcache-{task}",
                name=name,
                config={"setting": setting},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            for line in lines:
                run.log(_numbers(line), step=line["epoch"])
            run.finish()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"none": lambda store: Tracker(), "tensorboard": TensorBoard, "trackio": Trackio}


def check(name: str) -> None:
    """Refuse a tracker whose package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise Refused(
            f"track={name} needs its package: pip install 'readcache[track]', or leave TRACK out; JSON lines are written anyway"
        )


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    chosen = {f"choosing part/{name}": value for name, value in line["choose"].items()}
    return {"loss": line["loss"], "lr": line["lr"], "seconds": line["seconds"], **chosen}
