"""The recipe of a cache: all that fixes the states of its inputs, and nothing else. Its hash is the fingerprint."""

from importlib import metadata
from typing import Any

from pipeline.config import Inputs
from stages import depths
from stages.batching import RULE
from stages.kinds import KINDS, article, main_stream, tokens_of
from stages.sources import Checkpoint
from stages.tasks import Task
from store.errors import Refused
from store.layout import FORMAT

CHUNK_BYTES = 16 << 20
"""about the size of a chunk, in bytes"""

Recipe = dict[str, Any]


def known(config: Inputs, task: Task, kind: str, split: str, digest: str | None, checkpoint: Checkpoint | None) -> Recipe:
    """What can be said of a cache without loading backbone, tokenizer or data.

    kind: of backbone. digest: of the split's data, None where these are not at hand. checkpoint: None where its files are
    not at hand. Raises Refused for a token rule that the kind does not allow.
    """
    recipe = identity(config, task, kind, split, digest, checkpoint) | {
        "format": FORMAT,
        "tokens": tokens_of(kind, config.tokens),
        "layers": depths.normal(config.layers),
        "codec": config.codec,
        "chunk_bytes": CHUNK_BYTES,
        "batching": RULE,
        "order_seed": config.order_seed,
        "limit": config.limit,
    }
    if KINDS[kind].reads == "text":
        recipe["max_length"] = config.max_length
    if KINDS[kind].speaks and (answers := words(config, task)):
        recipe["words"] = list(answers)
    return recipe | ({"transformers": version} if checkpoint and (version := transformers_version()) else {})


def possible(config: Inputs, task: Task, kind: str) -> bool:
    """Whether a cache of that kind of backbone can be what is meant."""
    reads = "image" if task.image else "text"
    return kind in KINDS and KINDS[kind].reads == reads and config.tokens in (None, *KINDS[kind].tokens)


def identity(config: Inputs, task: Task, kind: str, split: str, digest: str | None, checkpoint: Checkpoint | None) -> Recipe:
    """Of these, what says whose states they are: the part that a choice of cache may not override."""
    asked = template(config, task, kind)
    data: Recipe = {"split": split, "template": asked} | ({"digest": digest} if digest else {})
    recipe: Recipe = {"data": data}
    if checkpoint:
        recipe["backbone"] = {"weights": checkpoint.weights, "config": checkpoint.config}
        if KINDS[kind].reads == "image":
            recipe["processor"] = {"files": checkpoint.processor, "backend": "pil"}
        else:
            cut = "left" if isinstance(asked, str) else "longest_first"
            recipe["tokenizer"] = {"files": checkpoint.tokenizer, "truncation": cut}
    return recipe


def template(config: Inputs, task: Task, kind: str) -> list[str] | str:
    """How an example's columns become an input: the columns themselves, or a prompt for a backbone that speaks."""
    if config.prompt is None and not KINDS[kind].speaks:
        return list(task.inputs)
    return config.prompt or task.prompt or "\n".join(f"{column}: {{{column}}}" for column in task.text)


def words(config: Inputs, task: Task) -> tuple[str, ...]:
    """The label words that are asked for, or that the task has."""
    return tuple(word.strip() for word in config.words.split(",")) if config.words else task.words or ()


def check_words(config: Inputs, kind: str) -> None:
    """Refuse WORDS for a kind of backbone that cannot answer with them."""
    if config.words and not KINDS[kind].speaks:
        raise Refused(
            f"WORDS={config.words} needs a backbone with an output embedding; {config.backbone} is {article(kind)}; "
            f"leave WORDS out"
        )


def complete(recipe: Recipe, anatomy: Any, dtype: str) -> Recipe:
    """The whole recipe: what is known, and what only the backbone's own code can say (`stages.anatomy.Anatomy`).

    Raises Refused for a depth that is not there.
    """
    states = anatomy.states(recipe["layers"], recipe["tokens"])
    main = main_stream(anatomy.kind, recipe["tokens"])
    whole = recipe | {
        "backbone": recipe["backbone"] | {"kind": anatomy.kind},
        "states": states[main],
        "layers": "all" if states == anatomy.states("all", recipe["tokens"]) else recipe["layers"],
        "compute": {"dtype": dtype, "attention": anatomy.attention},
    }
    if anatomy.kind == "encoder-decoder":
        whole |= {"decoder_input": [anatomy.start]} | ({"decoder_states": states["decoder"]} if main == "encoder" else {})
    if anatomy.kind == "image":
        whole["image"] = {"pixels": list(anatomy.pixels), "prefix": anatomy.prefix}
    return whole


def states(recipe: Recipe) -> dict[str, list[str]]:
    """The states of each stream that a cache of this recipe has; the main stream comes first."""
    main = {main_stream(recipe["backbone"]["kind"], recipe["tokens"]): list(recipe["states"])}
    return main | ({"decoder": list(recipe["decoder_states"])} if "decoder_states" in recipe else {})


def family(recipe: Recipe) -> Recipe:
    """What the caches of a task's splits have in common."""
    return recipe | {"data": {key: value for key, value in recipe["data"].items() if key not in ("digest", "split")}}


def transformers_version() -> str | None:
    """major.minor, without importing it; None where it is not installed."""
    try:
        return ".".join(metadata.version("transformers").split(".")[:2])
    except metadata.PackageNotFoundError:
        return None
