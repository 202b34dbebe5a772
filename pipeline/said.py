"""What the user said, as one command's configuration: defaults < YAML file < --set < options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline import config, upkeep
from pipeline.config import Frozen
from stages.tasks import explain, written
from store.errors import Refused

COMMANDS: dict[str, type[Frozen]] = {
    "plan": config.Plan, "extract": config.Extract, "train": config.Train, "sweep": config.Sweep, "ablate": config.Ablate,
    "evaluate": config.Evaluate, "predict": config.Predict, "catalog": config.Catalog, "report": config.Report,
    "verify": upkeep.Verify, "repair": upkeep.Repair, "explain": upkeep.Explain, "du": upkeep.Du, "gc": upkeep.Gc,
    "pin": upkeep.Pin, "unpin": upkeep.Unpin, "push": upkeep.Push, "pull": upkeep.Pull, "bench": config.Bench,
}  # fmt: skip

C = TypeVar("C", bound=Frozen)


def build(model: type[C], file: Path | None, sets: list[str], options: Mapping[str, Any]) -> C:
    """A command's configuration. Raises Refused in one line for an unknown key or an impossible value.

    A YAML file may serve several commands: each takes what is its own, and a key that none knows is refused.
    """
    said: dict[str, Any] = _file(file) if file else {}
    for item in sets:
        path, equals, value = item.partition("=")
        if not equals:
            raise Refused(f"--set {item}: give key=value, such as schedule.clip=0.5")
        *groups, last = path.split(".")
        inner = said
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise Refused(f"--set {item}: {group} is a value, not a group")
        try:
            inner[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise Refused(f"--set {item}: {value!r} is not YAML ({' '.join(str(error).split())})") from None
    known = {name for command in COMMANDS.values() for name in command.model_fields}
    for name in said:
        if name not in known:
            raise Refused(f"unknown key {name!r}; known: {', '.join(sorted(known))}")
    mine = {name: value for name, value in said.items() if name in model.model_fields}
    return explained(model, mine | {name: value for name, value in options.items() if value is not None})


def explained(model: type[C], said: Mapping[str, Any], where: str = "") -> C:
    """A configuration from plain values. Raises Refused in one line for an impossible one. where: what the line begins with."""
    try:
        return model(**said)
    except ValidationError as error:
        raise Refused(where + _explain(error, model)) from None


def _explain(error: ValidationError, model: type[Frozen]) -> str:
    group = error.errors()[0]["loc"][0]
    groups: dict[str, type[Frozen]] = {
        "read": config.ReadOptions, "schedule": config.ScheduleOptions, "reading": config.ReadingOptions,
    }  # fmt: skip
    return explain(error, groups.get(str(group), model))


def _file(path: Path) -> dict[str, Any]:
    said = written(path, "--config ")
    if not isinstance(said, dict):
        raise Refused(f"--config {path} holds no fields")
    return {str(name): value for name, value in said.items()}
