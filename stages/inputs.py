"""The rows of a data set, checked: its inputs, and its other columns as numbers. Sole home of `datasets`."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import HfApi
from PIL import Image

from stages.sources import IMAGES, READERS, Source
from stages.tasks import Task
from store.errors import Refused
from store.order import shuffled

FEW = 1000
"""a column with at most this many distinct values carries them, so that classes can be named"""

BLOCK = 1000
"""rows that are hashed at a time"""

Column = tuple[np.ndarray, list[Any] | None]
"""(N,) numbers, and the distinct values if they are few; text is stored as positions in these"""

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)


class Split(NamedTuple):
    """One split of a task's data, checked."""

    name: str
    dataset: datasets.Dataset
    """memory-mapped"""
    digest: str
    """of the content, 64 hex digits"""
    columns: dict[str, Column]
    """every column that is no input, of the whole split"""


def load(task: Task, source: Source, split: str) -> Split:
    """Load a split and check all that can be wrong with it. Raises Refused naming file, column and row."""
    where = place(source, split)
    read = {"demo": _demo, "digits": _digits}.get(source.kind, _dataset)
    dataset = read(task, source, split, where)
    if not len(dataset):
        raise Refused(f"{where}: the split is empty")
    labelled = () if split in task.unlabelled else (task.label,)
    for column in (*task.inputs, *labelled):
        if column not in dataset.column_names:
            raise Refused(f"{where}: no column {column!r}; it has {', '.join(dataset.column_names)}")
    for column in task.text:
        kind = dataset.data.schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise Refused(f"{where}: text column {column!r} holds {kind}, not text; name another column or quote its values")
        if dataset.data.column(column).null_count:
            row = dataset.data.column(column).is_null().to_pylist().index(True)
            raise Refused(f"{where}: row {row} (counted from 0) has no text in column {column!r}; fill it in or drop the row")
    if task.image:
        dataset = _as_images(dataset, task.image, where)
    csv = source.kind == "files" and source.files[split][0].suffix == ".csv"
    columns = _columns(dataset, task, csv)
    for column in labelled:
        if column not in columns:
            kind = dataset.data.schema.field(column).type
            raise Refused(f"{where}: label column {column!r} holds {kind} that are no labels: numbers, or at most {FEW} texts")
    return Split(split, dataset, source.digest(split) or _content(dataset), columns)


def place(source: Source, split: str) -> str:
    """A split, for messages: its files, or the data set it is of."""
    files = ", ".join(str(path) for path in source.files[split]) if source.kind == "files" else source.text
    return f"{files}, split {split}"


def _as_images(dataset: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    """The data set with its images to be opened when they are read."""
    kind = dataset.features[column]
    if isinstance(kind, datasets.Image):
        return dataset
    stored = dataset.data.schema.field(column).type
    if not (pa.types.is_binary(stored) or pa.types.is_large_binary(stored) or pa.types.is_struct(stored)):
        raise Refused(f"{where}: image column {column!r} holds {stored}, not the bytes of images; name another column")
    return dataset.cast_column(column, datasets.Image())


def of_texts(columns: dict[str, list[str]]) -> datasets.Dataset:
    """A data set of texts that are at hand."""
    return datasets.Dataset.from_dict(dict(columns))


def of_images(columns: dict[str, list[str]]) -> datasets.Dataset:
    """A data set of image files that are at hand."""
    return datasets.Dataset.from_dict(dict(columns), features=datasets.Features(dict.fromkeys(columns, datasets.Image())))


def _dataset(task: Task, source: Source, split: str, where: str) -> datasets.Dataset:
    if source.kind == "hub":
        return _hub(task, source, split)
    files = [str(path) for path in source.files[split]]
    if Path(files[0]).suffix.lower() in IMAGES:
        return _folder(files)
    reader = READERS[Path(files[0]).suffix]
    # text such as "NA" and "null" is text
    more: dict[str, Any] = {"keep_default_na": False} if reader == "csv" else {}
    # a cache of datasets' own, keyed by mtime, could serve a file's old content: a fresh one each time
    with tempfile.TemporaryDirectory() as folder:
        try:
            return datasets.load_dataset(reader, data_files={split: files}, split=split, cache_dir=folder, **more)
        except StopIteration:
            raise Refused(f"{where}: the file is empty") from None
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, ValueError, OSError) as error:
            if "corresponds to no data" in str(error):
                raise Refused(f"{where}: the split is empty") from None
            reason = str(error.__cause__ or error).splitlines() or [type(error.__cause__ or error).__name__]
            raise Refused(f"{where}: it cannot be read as {reader}: {reason[0]}") from None


def _hub(task: Task, source: Source, split: str) -> datasets.Dataset:
    instead = f"give DATA=<dir> with <dir>/{task.name}/<split>.parquet, .csv or .jsonl"
    assert task.hub
    try:
        HfApi().dataset_info(task.hub, timeout=10)
    except Exception:  # whatever the reason: what is on this machine may do, and `datasets` would retry for half a minute
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(task.hub, task.subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise Refused(f"{source.text}: split {split} could not be had ({type(error).__name__}: {reason}); {instead}") from None


def _folder(files: list[str]) -> datasets.Dataset:
    """A folder of class folders: columns `image` and `label`."""
    labels = [Path(file).parent.name for file in files]
    classes = datasets.ClassLabel(names=sorted(set(labels)))
    held = datasets.Dataset.from_dict({"image": files, "label": labels})
    return held.cast_column("image", datasets.Image()).cast_column("label", classes)


def _digits(task: Task, source: Source, split: str, where: str) -> datasets.Dataset:
    """scikit-learn's copy of the UCI test digits: 8 × 8 pixels of 0 … 16. See `sources.DIGITS_SPLIT` for the rule."""
    table = np.loadtxt(source.files[split][0], np.uint8, delimiter=",")  # (1797, 65)
    taken = [row for row in table if (row[:64].sum(dtype=int) % 5 == 0) == (split != task.train)]
    pixels = [Image.fromarray((row[:64].reshape(8, 8) * 15).astype(np.uint8)) for row in taken]
    columns = {"image": pixels, "label": [int(row[64]) for row in taken]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")))


def _demo(task: Task, source: Source, split: str, where: str) -> datasets.Dataset:
    """BBC news: one folder a class, one file a text. See `sources.DEMO_SPLIT` for the rule."""
    seen: dict[str, tuple[str, str]] = {}
    for path in source.files[split]:
        text = path.read_text(errors="ignore")
        seen.setdefault(hashlib.sha256(text.encode()).hexdigest(), (text, path.parent.name))
    taken = [pair for key, pair in seen.items() if (int(key[:8], 16) % 5 == 0) == (split != task.train)]
    return datasets.Dataset.from_dict({"text": [text for text, _ in taken], "label": [label for _, label in taken]})


def _columns(dataset: datasets.Dataset, task: Task, csv: bool) -> dict[str, Column]:
    """The columns that are no input, as numbers: what is neither number, truth value nor short list of texts is left out."""
    found: dict[str, Column] = {}
    for name in dataset.column_names:
        if name in task.inputs:
            continue
        column, feature = dataset.data.column(name).combine_chunks(), dataset.features[name]
        if isinstance(feature, datasets.ClassLabel):
            found[name] = (column.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), list(feature.names))
            continue
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = _without_empty(column, csv)
        kind = column.type
        if pa.types.is_integer(kind):
            distinct = column.slice(0, 2 * FEW).unique()  # ids and the like: not worth a look at all of them
            values = sorted(v for v in column.unique().to_pylist() if v is not None) if len(distinct) <= FEW else []
            numbers = column.cast(pa.float64()) if column.null_count else column
            few = values if 0 < len(values) <= FEW else None
            whole = np.float64 if column.null_count else np.int64
            found[name] = (numbers.to_numpy(zero_copy_only=False).astype(whole), few)
        elif pa.types.is_floating(kind):
            exact = np.float32 if kind == pa.float32() else np.float64
            found[name] = (column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(exact), None)
        elif (pa.types.is_boolean(kind) or pa.types.is_large_string(kind)) and len(column.slice(0, 2 * FEW).unique()) <= FEW:
            texts = column.cast(pa.large_string())
            names = sorted(value for value in texts.unique().to_pylist() if value is not None)
            if len(names) <= FEW:
                places = pc.index_in(texts, value_set=pa.array(names, pa.large_string())).fill_null(-1)
                found[name] = (places.to_numpy(zero_copy_only=False).astype(np.int64), names)
    return found


def _without_empty(column: pa.Array, csv: bool) -> pa.Array:
    """A column of text whose empty cells are missing; that of a csv file, where all cells are text, as numbers if it can be."""
    texts = column.cast(pa.large_string())
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.large_string()), texts)
    for kind in (pa.int64(), pa.float64()) if csv and texts.null_count < len(texts) else ():
        try:
            return texts.cast(kind)
        except pa.ArrowInvalid:
            continue
    return texts


def _content(dataset: datasets.Dataset) -> str:
    """sha256 of every row as JSON: the digest of data that came through the hub, whatever its files were."""
    digest = hashlib.sha256(json.dumps(sorted(dataset.column_names)).encode())
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for begin in range(0, len(dataset), BLOCK):
        rows = dataset[begin : begin + BLOCK]
        rows |= {name: [_bytes_digest(value) for value in rows[name]] for name in pictures}
        digest.update(json.dumps(rows, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _bytes_digest(image: dict[str, Any] | None) -> str | None:
    """Of an image's bytes, in the table or in a file: not of where that file is."""
    if image is None:
        return None
    data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return hashlib.sha256(data).hexdigest()


def order(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Which rows of the data set are in the cache, and in which order: a seeded shuffle, the first `limit` of it."""
    return shuffled(count, seed)[:limit]
