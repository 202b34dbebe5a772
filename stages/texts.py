"""Texts to ragged token ids to padded batches. Sole home of tokenizers."""

import hashlib
import itertools
import tempfile
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.sources import Checkpoint
from store.errors import Refused

BLOCK = 1000
"""examples that are tokenised at a time"""

Template = list[str] | str
"""columns, one or two that the tokenizer takes as a pair; or a prompt with {column} in it"""

Table = tuple[np.ndarray, dict[str, Any]]
"""what is stored of the examples, and what it means"""


class Tokens(NamedTuple):
    """The token ids of a split's examples, ragged, in the order of the cache."""

    ids: np.ndarray
    """(tokens,) int32, memory-mapped"""
    types: np.ndarray | None
    """(tokens,) uint8 segment of each token in a pair, where the backbone wants it"""
    offset: np.ndarray
    """(N + 1,) int64 where an example's tokens begin"""
    source: np.ndarray
    """(N,) int64 the example's row in the data set"""
    cut: int
    """how many examples were cut to the maximum length"""
    pad: int
    """the id that fills a batch"""

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each example."""
        return np.diff(self.offset)

    def tables(self) -> dict[str, Table]:
        """What a cache keeps of them: the tokens themselves, and a hash of each example's."""
        found: dict[str, Table] = {
            "offset": (self.offset, {"meaning": "where an example's tokens begin in input_ids"}),
            "input_ids": (self.ids, {}),
            "key": (self._keys(), {"meaning": "blake2b-128 of the example's input_ids and token_type_ids"}),
        }
        return found if self.types is None else found | {"token_type_ids": (self.types, {})}

    def _keys(self) -> np.ndarray:
        found = bytearray()
        parts = [np.asarray(values).data for values in (self.ids, self.types) if values is not None]
        for begin, end in itertools.pairwise(self.offset.tolist()):
            key = hashlib.blake2b(digest_size=16)
            for part in parts:
                key.update(part[begin:end])
            found += key.digest()
        return np.frombuffer(found, np.uint8).reshape(-1, 16)

    def collate(self, examples: np.ndarray) -> dict[str, torch.Tensor]:
        """Pad a batch on the right: input_ids, attention_mask, and token_type_ids where there are any, each (B, T) int64."""
        begin, lengths = self.offset[examples], self.lengths[examples]
        column = np.arange(int(lengths.max()))
        mask = column < lengths[:, None]  # (B, T)
        place = np.where(mask, begin[:, None] + column, 0)
        batch = {"input_ids": np.where(mask, self.ids[place], self.pad), "attention_mask": mask}
        if self.types is not None:
            batch["token_type_ids"] = np.where(mask, self.types[place], 0)
        return {name: torch.from_numpy(value.astype(np.int64)) for name, value in batch.items()}


def tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The backbone's own tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise Refused(f"backbone {checkpoint.name}: {checkpoint.path} has no tokenizer that loads ({reason})") from None


def check_prompt(prompt: str, columns: tuple[str, ...]) -> None:
    """Refuse a prompt that names no input column, or something else."""
    try:
        fields = [part[1:] for part in Formatter().parse(prompt) if part[1] is not None]
    except ValueError as error:
        raise Refused(
            f"prompt {prompt!r} does not read ({error}); {{column}} stands for a text, {{{{ and }}}} for braces"
        ) from None
    strange = [name for name, _, _ in fields if name not in columns]
    changed = [name for name, form, change in fields if form or change]
    if strange or changed or not fields:
        what = (
            f"names {strange[0]!r}" if strange else f"does more to {changed[0]!r} than name it" if changed else "names no column"
        )
        raise Refused(f"prompt {prompt!r} {what}; it may name {', '.join('{' + column + '}' for column in columns)}")


def tokenize(tokenizer: PreTrainedTokenizerBase, dataset: Any, template: Template, rows: np.ndarray, longest: int) -> Tokens:
    """Token ids of the given rows, special tokens included, each cut to `longest` tokens; pairs as pairs.

    A prompt is cut at its beginning: its end is the question. Ids go to a temporary file and are mapped from there, so
    that memory does not grow with the data set. Raises Refused for an example without any token.
    """
    lengths: list[int] = []
    cut = 0
    kinds: dict[str, Any] = {"input_ids": np.int32, "token_type_ids": np.uint8}
    tokenizer.truncation_side = "left" if isinstance(template, str) else "right"
    with tempfile.TemporaryDirectory() as folder:
        files = {name: (Path(folder) / name).open("wb") for name in kinds}
        for begin in range(0, len(rows), BLOCK):
            texts = _texts(dataset[rows[begin : begin + BLOCK]], template)
            batch = tokenizer(*texts, truncation=True, max_length=longest, padding=False, return_attention_mask=False)
            lengths += [len(ids) for ids in batch["input_ids"]]
            cut += sum(bool(e.overflowing) for e in batch.encodings or [])
            for name, file in files.items():
                if name in batch:
                    file.write(np.concatenate([np.asarray(ids, kinds[name]) for ids in batch[name]]).tobytes())
        for file in files.values():
            file.close()
        if max(lengths) > longest:
            raise Refused(f"the tokenizer gives {max(lengths)} tokens where {longest} are the limit: raise max_length")
        if 0 in lengths:
            raise Refused(f"row {rows[lengths.index(0)]} (counted from 0) gives no token at all; drop it, or fill in its text")
        ids = np.memmap(Path(folder) / "input_ids", np.int32, "r")
        typed = (Path(folder) / "token_type_ids").stat().st_size > 0
        types = np.memmap(Path(folder) / "token_type_ids", np.uint8, "r") if typed else None
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(ids, types, offset, rows, cut, int(tokenizer.pad_token_id or 0))


def _texts(rows: dict[str, list[str]], template: Template) -> list[list[str]]:
    """What the tokenizer is given: a list of texts, or two for pairs."""
    if not isinstance(template, str):
        return [list(rows[column]) for column in template]
    parts = [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    count = len(next(iter(rows.values())))
    return [["".join(literal + (rows[name][row] if name else "") for literal, name in parts) for row in range(count)]]
