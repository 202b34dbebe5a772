"""The recipe of a cache: all that fixes the states of its inputs, and nothing else. Its hash is the fingerprint."""

from importlib import metadata
from typing import Any

from pipeline.config import Inputs
from stages import depths
from stages.batching import RULE
from stages.sources import Checkpoint
from stages.tasks import Task
from store.layout import FORMAT

CHUNK_BYTES = 16 << 20
"""about the size of a chunk, in bytes"""

Recipe = dict[str, Any]


def known(config: Inputs, task: Task, split: str, digest: str | None, checkpoint: Checkpoint | None) -> Recipe:
    """What can be said of a cache without loading backbone, tokenizer or data.

    digest: of the split's data, None where these are not at hand. checkpoint: None where its files are not at hand.
    """
    recipe = identity(task, split, digest, checkpoint) | {
        "format": FORMAT,
        "tokens": config.tokens,
        "layers": depths.normal(config.layers),
        "codec": config.codec,
        "chunk_bytes": CHUNK_BYTES,
        "batching": RULE,
        "order_seed": config.order_seed,
        "limit": config.limit,
        "max_length": config.max_length,
    }
    return recipe | ({"transformers": version} if checkpoint and (version := transformers_version()) else {})


def identity(task: Task, split: str, digest: str | None, checkpoint: Checkpoint | None) -> Recipe:
    """Of these, what says whose states they are: the part that a choice of cache may not override."""
    data: Recipe = {"split": split, "template": list(task.text)} | ({"digest": digest} if digest else {})
    model = {"weights": checkpoint.weights, "config": checkpoint.config} if checkpoint else {}
    tokenizer = {"tokenizer": {"files": checkpoint.tokenizer, "truncation": "longest_first"}} if checkpoint else {}
    return {"data": data} | ({"backbone": model} if model else {}) | tokenizer


def complete(recipe: Recipe, kind: str, states: list[str], everything: bool, attention: str, dtype: str) -> Recipe:
    """The whole recipe: what is known, and what only the backbone's own code can say.

    kind: of backbone. states: that are kept, (S,). everything: whether these are all that there are.
    """
    return recipe | {
        "backbone": recipe["backbone"] | {"kind": kind},
        "states": states,
        "layers": "all" if everything else recipe["layers"],
        "compute": {"dtype": dtype, "attention": attention},
    }


def family(recipe: Recipe) -> Recipe:
    """What the caches of a task's splits have in common."""
    return recipe | {"data": {key: value for key, value in recipe["data"].items() if key not in ("digest", "split")}}


def transformers_version() -> str | None:
    """major.minor, without importing it; None where it is not installed."""
    try:
        return ".".join(metadata.version("transformers").split(".")[:2])
    except metadata.PackageNotFoundError:
        return None
