"""Runs: a trained head (safetensors), its shape, its scores and its curve in one folder, saved and loaded strictly.

<root>/runs/<task>/<run>/read_config.json          the head's shape
<root>/runs/<task>/<run>/read_model.safetensors    READ and head
<root>/runs/<task>/<run>/curve.jsonl               a line an epoch
<root>/runs/<task>/<run>/run.json                  task, recipe, fingerprints, configuration, scores, versions; last
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from stages.heads import Head
from stages.shape import Shape, build
from stages.tasks import Task
from store import files
from store.errors import Damaged, Refused
from store.layout import PLAIN_NAME


class Run(NamedTuple):
    """A saved run."""

    path: Path
    told: dict[str, Any]
    """run.json"""

    @property
    def task(self) -> Task:
        """The task as it was when the run was trained: class names and all."""
        said = self.told["task_definition"]
        return Task(**{name: _tuples(value) for name, value in said.items()})


def save(root: Path, task: Task, name: str, shape: Shape, head: Head, told: dict[str, Any], curve: list[Any]) -> Path:
    """Write a run's folder beside and rename it into place; returns its path. The name gets a suffix if it is taken."""
    folder = root / "runs" / task.name / f".{secrets.token_hex(4)}"
    files.make(folder.parent, sync=True)
    files.put(folder / "read_config.json", _text(asdict(shape)))
    files.put(folder / "read_model.safetensors", safetensors.torch.save(head.state_dict()))
    files.put(folder / "curve.jsonl", "".join(json.dumps(line) + "\n" for line in curve).encode())
    for attempt in range(1000):
        path = folder.with_name(name + (f"-{attempt}" if attempt else ""))
        if path.exists():
            continue
        files.write(folder / "run.json", _text({"run": path.name} | told | {"task_definition": asdict(task)}))
        try:
            files.rename(folder, path)
        except OSError:
            continue
        files.sync_folder(path.parent)
        return path
    raise Refused(f"{folder.with_name(name)} and 999 more of that name are taken; clean up the runs")


def new_name(shape: Shape, tokens: str, seed: int) -> str:
    """A name that says when and what: 20260131-093000-gru256-mean-s0."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{shape.cell}{shape.hidden}-{tokens.replace('+', '-')}-s{seed}"


def listing(root: Path) -> Iterator[Run | Damaged]:
    """Every run under a root; in place of one that cannot be read, or of a folder that cannot be listed, why."""
    for task in _folders(root / "runs"):
        for path in [task] if isinstance(task, Damaged) else _folders(task):
            try:
                yield path if isinstance(path, Damaged) else open_run(path)
            except Damaged as error:
                yield error


def _folders(path: Path) -> list[Path | Damaged]:
    """Those in a folder, but for hidden ones."""
    try:
        with os.scandir(path) as entries:
            return [path / name for name in sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))]
    except FileNotFoundError:
        return []
    except OSError as error:
        return [Damaged(f"runs in {path} cannot be listed ({error.strerror}); see to its rights")]


def find(root: Path, name: str | None, task: str | None) -> Run:
    """A run by folder, by name or by the start of its name. Raises Refused with the runs that there are."""
    if name and (Path(name) / "run.json").is_file():
        return open_run(Path(name))
    if name and not PLAIN_NAME.fullmatch(name):
        raise Refused(f"run {name!r} is neither a run's folder nor a name (letters, digits, _ . -)")
    if task and not PLAIN_NAME.fullmatch(task):
        raise Refused(f"task {task!r} of a run is not a name (letters, digits, _ . -)")
    paths = sorted((root / "runs").glob(f"{task if task else '[!.]*'}/[!.]*/"))
    found = [path for path in paths if path.name == name] or [path for path in paths if name and path.name.startswith(name)]
    if len(found) != 1:
        known = ", ".join(f"{path.parent.name}/{path.name}" for path in (found or paths)[-8:]) or "none"
        which = "give RUN=" if not name else f"no run {name!r}" if not found else f"run {name!r} could be several"
        raise Refused(f"{which}; runs under {root}{f' of task {task}' if task else ''}: {known}")
    return open_run(found[0])


def open_run(path: Path) -> Run:
    """Read run.json. Raises Damaged where it is missing, torn, or says what no run says."""
    try:
        told = json.loads((path / "run.json").read_bytes())
        missing = {"fingerprints", "task_definition", "recipe", "metrics", "config", "backbone"} - set(told)
        for part, kind in (("fingerprints", str), ("metrics", dict)) if not missing else ():
            if not isinstance(told[part], dict) or not all(isinstance(value, kind) for value in told[part].values()):
                raise ValueError(f"{part} is {str(told[part])[:80]}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"run {path} has no run.json that reads ({type(error).__name__}: {error}); train again") from None
    if missing:
        raise Damaged(f"run {path}: run.json has no {', '.join(sorted(missing))}; train again")
    return Run(path, told)


def curve(run: Run) -> list[dict[str, Any]]:
    """A line an epoch. Raises Damaged where it does not read."""
    try:
        return [json.loads(line) for line in (run.path / "curve.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise Damaged(f"run {run.path}: curve.jsonl does not read ({error}); train again") from None


def load_head(run: Run) -> Head:
    """The trained head of a run. Raises Damaged where shape and weights do not fit to the last name."""
    try:
        shape, path = load_shape(run), run.path / "read_model.safetensors"
        with torch.device("meta"):  # what the shape says is compared with what is there before anything of its size is made
            asked = {name: tuple(value.shape) for name, value in build(shape).state_dict().items()}
        with safe_open(path, "pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if asked != there:
            name = next(name for name in sorted(asked.keys() | there.keys()) if asked.get(name) != there.get(name))
            raise ValueError(f"{name} is {there.get(name)}, and by read_config.json {asked.get(name)}")
        head = build(shape)
        head.load_state_dict(safetensors.torch.load_file(path), strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Damaged(f"run {run.path} does not load ({reason}); train again") from None
    return head.eval()


def load_shape(run: Run) -> Shape:
    """The shape of a run's head. Raises Damaged where it does not read."""
    try:
        return Shape(**json.loads((run.path / "read_config.json").read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"run {run.path}: read_config.json does not read ({error}); train again") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False, default=str) + "\n").encode()
