"""A sweep's grid: which settings there are.

    lr: [0.0003, 0.001, 0.003]             # every combination of the values is a setting
    read.dropout: [0, 0.1]                 # groups by a dot, as with --set
    schedule.weight_decay: {low: 0.001, high: 0.1, log: true}    # a range: for Optuna alone

or a list of such grids, the settings of which are joined.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import opening
from pipeline.board import in_words
from pipeline.config import Sweep, Train
from pipeline.said import explained
from stages.tasks import written
from store.errors import Refused

FIXED = {
    "task",
    "store",
    "device",
    "dask",
    "no_extract",
    "cache",
    "reading",
    "seeds",
    "track",
    "grid",
    "trials",
    "width",
    "read.shared",
}
"""what is of the whole sweep, not of a setting"""


class Range(NamedTuple):
    """Numbers from low to high, both of them among them."""

    low: float
    high: float
    log: bool
    """whether their logarithms are spread evenly"""
    step: float | None

    @property
    def whole(self) -> bool:
        """Whether they are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)


Grid = dict[str, list[Any] | Range]
"""option -> its values"""


def read(path: Path) -> list[Grid]:
    """The grids of a file. Raises Refused for what is no grid, and for options that are not there."""
    said = written(path, "GRID=")
    grids = said if isinstance(said, list) else [said]
    if not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise Refused(f"GRID={path} holds no options; write for example `lr: [0.001, 0.003]`")
    return [_grid(path, grid) for grid in grids]


def _grid(path: Path, said: Mapping[Any, Any]) -> Grid:
    known = _known(Train)
    found: Grid = {}
    for name, value in _flat(said, known).items():
        if name not in known:
            raise Refused(f"GRID={path}: unknown option {name!r}; known: {', '.join(sorted(known))}")
        if isinstance(value, dict):
            found[name] = _range(path, name, value)
        else:
            found[name] = value if isinstance(value, list) else [value]
            if not found[name]:
                raise Refused(f"GRID={path}: {name} has no values")
    return found


def _known(model: type[Any]) -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        names |= {f"{name}.{each}" for each in inner} if inner else {name}
    return {name for name in names if name not in FIXED and name.split(".")[0] not in FIXED}


def _flat(said: Mapping[Any, Any], known: set[str]) -> dict[str, Any]:
    """`read: {dropout: […]}` is `read.dropout: […]`."""
    groups = {name.split(".")[0] for name in known if "." in name}
    found: dict[str, Any] = {}
    for name, value in said.items():
        if name in groups and isinstance(value, dict):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[str(name)] = value
    return found


def _range(path: Path, name: str, said: dict[str, Any]) -> Range:
    low, high, log, step = (said.get(field, other) for field, other in (("low", ""), ("high", ""), ("log", False), ("step", 1)))
    right = set(said) <= {"low", "high", "log", "step"} and isinstance(log, bool)
    right = right and all(type(number) in (int, float) and math.isfinite(number) for number in (low, high, step))
    right = right and low < high and step > 0 and not (log and (low <= 0 or "step" in said))
    if not right or ("step" in said and abs((high - low) / step - round((high - low) / step)) > 1e-9):
        raise Refused(
            f"GRID={path}: {name} is {said}; a range is {{low: 0.001, high: 0.1}}, with `log: true` (low above 0, no step) or "
            f"a `step:` that leads from low to high"
        )
    return Range(low, high, log, said.get("step"))


def settings(grids: list[Grid]) -> list[dict[str, Any]]:
    """All settings, each once. Raises Refused for a range: there is no end to its values."""
    found: list[dict[str, Any]] = []
    for grid in grids:
        for name, values in grid.items():
            if isinstance(values, Range):
                raise Refused(
                    f"{name} is a range from {values.low:g} to {values.high:g}: list values, or say TRIALS to have some proposed"
                )
        for combination in itertools.product(*grid.values()):
            setting = dict(zip(grid, combination, strict=True))
            if setting not in found:
                found.append(setting)
    return found


def check(config: Sweep, grids: list[Grid]) -> None:
    """Refuse any value of the grids that cannot be, each by itself; of a range its ends."""
    for grid in grids:
        for name, values in grid.items():
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                opening.check(training(config, {name: value}))


def training(config: Sweep, setting: Mapping[str, Any]) -> Train:
    """The training that a setting means. Raises Refused for a value that cannot be, with the setting."""
    said = {name: getattr(config, name) for name in Train.model_fields}
    said = Train.model_construct(**said).model_dump()
    for name, value in setting.items():
        *group, last = name.split(".")
        (said[group[0]] if group else said)[last] = value
    return explained(Train, said, f"setting {in_words(setting)}: ")
