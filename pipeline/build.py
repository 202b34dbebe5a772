"""Everything of a split that is to be extracted, laid out: inputs, where rows lie, what is stored beside them, exact sizes."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import recipe, reuse
from pipeline.config import Inputs
from pipeline.recipe import Recipe
from pipeline.reuse import Reuse
from stages import images, inputs, selection, texts, words
from stages.anatomy import Anatomy
from stages.images import Images, Processor
from stages.sources import Checkpoint
from stages.tasks import Task
from stages.texts import Tokens
from store import layout, manifest
from store.codecs import codec
from store.errors import Refused
from store.layout import Array, Placement
from store.manifest import Manifest


class Reading(NamedTuple):
    """How a backbone's inputs are made, and what it may answer."""

    tokenizer: Any
    """of a backbone that reads text"""
    processor: Processor | None
    """of one that reads images"""
    answers: np.ndarray | None
    """(K, D) the label words' rows of its output embedding"""


class Build(NamedTuple):
    """A split that is to be extracted."""

    examples: Tokens | Images
    placement: Placement
    arrays: dict[str, Array]
    tables: dict[str, np.ndarray]
    """what is stored of the examples, by array path"""
    states: dict[str, list[str]]
    planned: Manifest
    reused: Reuse | None = None
    """what is copied from other caches"""

    def chunk_paths(self, number: int) -> list[str]:
        """The files of one chunk of the states."""
        of_streams = {path: array for path, array in self.arrays.items() if path.split("/")[0] in self.states}
        return [layout.chunk_path(path, number, len(array.shape)) for path, array in of_streams.items()]

    @property
    def to_compute(self) -> np.ndarray:
        """(N,) bool: the examples that go through the backbone."""
        return np.ones(len(self.examples.source), bool) if self.reused is None else self.reused.which == reuse.COMPUTED


def open_reading(config: Inputs, task: Task, checkpoint: Checkpoint, anatomy: Anatomy, processor: Processor | None) -> Reading:
    """Tokenizer, label words and prompt, checked. Raises Refused for what does not fit the backbone or the task."""
    recipe.check_words(config, anatomy.kind)
    if anatomy.kind == "image":
        if config.prompt is not None:
            raise Refused(f"PROMPT={config.prompt!r} is for texts, and {config.backbone} reads images; leave it out")
        return Reading(None, processor, None)
    tokenizer = texts.tokenizer(checkpoint)
    asked = recipe.template(config, task, anatomy.kind)
    if isinstance(asked, str):
        texts.check_prompt(asked, task.text)
    if config.words:
        words.token_ids(tokenizer, recipe.words(config, task))  # what the user asks for by name is refused at once
    longest = min(anatomy.longest, tokenizer.model_max_length)
    least = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2) + len(task.text)
    if config.max_length < least:
        raise Refused(f"max_length {config.max_length} leaves no room for text: task {task.name} needs at least {least}")
    if config.max_length > longest:
        raise Refused(f"max_length {config.max_length} is above the {longest} tokens that backbone {config.backbone} takes")
    return Reading(tokenizer, None, None)


def answers(config: Inputs, task: Task, checkpoint: Checkpoint, anatomy: Anatomy, tokenizer: Any) -> np.ndarray | None:
    """The label words' rows of the output embedding (K, D), or None where the task's own words have none.

    Raises Refused for words that the user asked for by WORDS and that cannot be had, and for another number than of classes.
    """
    asked = recipe.words(config, task)
    try:
        ids = words.token_ids(tokenizer, asked)
    except Refused:
        return None  # the task's own words may not fit: only a verbalizer needs them
    if task.classes and len(ids) != len(task.classes):
        raise Refused(
            f"{len(ids)} label words ({', '.join(asked)}) for the {len(task.classes)} classes {', '.join(task.classes)}"
        )
    found = words.rows(checkpoint.path, anatomy, ids)
    if found is None and config.words:
        raise Refused(
            f"backbone {checkpoint.name}: label words have no rows: no output embedding, or logits that are no product with it"
        )
    return found


def lay_out(
    config: Inputs, task: Task, anatomy: Anatomy, reading: Reading, split: inputs.Split, found: Recipe,
    sources: Iterable[str] | None = None,
) -> Build:  # fmt: skip
    """Lay out a split of a recipe. Raises Refused naming the row of an input that cannot be used.

    sources: caches from which rows are copied; where left out, with --reuse, all that there are.
    """
    rows = inputs.order(len(split.dataset), config.limit, config.order_seed)
    examples: Tokens | Images
    if task.image:
        assert reading.processor
        examples = images.read(split.dataset, task.image, reading.processor, rows, anatomy.longest, f"{task.name}, {split.name}")
    else:
        examples = texts.tokenize(reading.tokenizer, split.dataset, found["data"]["template"], rows, config.max_length)
    kept = selection.kept(examples.lengths, found["tokens"])
    states = recipe.states(found)
    main, *beside = states
    row_bytes = codec(config.codec).state_bytes(anatomy.width) * len(states[main])
    placement = layout.place(kept, row_bytes, recipe.CHUNK_BYTES)
    arrays = layout.state_arrays(main, config.codec, placement, states[main], anatomy.width)
    tables: dict[str, texts.Table] = {
        "examples/start": (placement.start, {}),
        "examples/length": (kept.astype(np.int64), {}),
        "examples/row": (rows.astype(np.int64), {"meaning": "the example's row in the data set's split, from 0"}),
    }
    for stream in beside:
        single = layout.one_each(placement)
        arrays |= layout.state_arrays(stream, config.codec, single, states[stream], anatomy.width)
        blocks = sum(name.startswith("block.") for name in states[stream])
        arrays[layout.CROSS_ATTENTION] = layout.attention_array(placement, blocks)
        tables["examples/decoder_row"] = (single.start, {"meaning": "where the example's one row of the decoder's stream is"})
    own = examples.tables()
    tables |= {f"examples/{name}": table for name, table in own.items()}
    wanted = config.reuse if sources is None else bool(sources)
    copied = reuse.find(config.store, found, own["key"][0], sources) if wanted else None
    if copied:
        told = {
            "sources": [cache.fingerprint for cache in copied.sources],
            "meaning": "which of the sources rows are from, or -1",
        }
        tables["examples/copied_from"] = (copied.which, told)
    for name, (values, distinct) in split.columns.items():
        few = {} if distinct is None else {"values": distinct}
        tables[f"examples/{layout.column_path(name)}"] = (values[rows], {"column": name} | few)
    if reading.answers is not None:
        tables[layout.WORDS] = (reading.answers, {"words": found["words"]})
    for path, (values, attributes) in tables.items():
        arrays[path] = layout.flat_array(values, **attributes)
    about = {
        "task": task.name, "split": split.name, "backbone": Path(config.backbone).name, "max_length": config.max_length,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "zarr", "numpy")},
    }  # fmt: skip
    counts = {
        "examples": len(rows), "rows": int(kept.sum()), "tokens": int(examples.lengths.sum()), "cut": examples.cut,
        "states": len(states[main]), "width": anatomy.width,
    }  # fmt: skip
    sizes = {path: array.chunk_bytes() for path, array in layout.chunk_paths(arrays)}
    sizes |= {path: len(text) for path, text in layout.metadata(arrays, manifest.attributes(found)).items()}
    planned = manifest.planned(found, about, counts, sizes)._replace(reused=copied.counts if copied else ())
    return Build(examples, placement, arrays, {path: values for path, (values, _) in tables.items()}, states, planned, copied)


def at_hand(
    task: Task, found: Recipe, checkpoint: Checkpoint, processor: Processor | None, columns: list[list[str]], anatomy: Anatomy
) -> Tokens | Images:
    """New inputs by column, read as those of a recipe were."""
    rows = np.arange(len(columns[0]))
    if processor is not None:
        column = task.inputs[0]
        return images.read(inputs.of_images({column: columns[0]}), column, processor, rows, anatomy.longest, "FILE")
    texted = inputs.of_texts(dict(zip(task.text, columns, strict=True)))
    return texts.tokenize(texts.tokenizer(checkpoint), texted, found["data"]["template"], rows, found["max_length"])
