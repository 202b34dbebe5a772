"""Open a cache and give its chunks and its examples. Not order, batches or torch.

Opening checks every object of the manifest for presence and size and the small ones for their digest; reading a
chunk checks its crc32c. A missing or altered byte raises Damaged; it never reads as zeros.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from store import files, layout, manifest
from store.codecs import codec
from store.errors import Damaged
from store.layout import Array
from store.manifest import Manifest

_DTYPES = {"uint8": "|u1", "uint16": "<u2", "int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}


class Cache:
    """One published cache, open for reading."""

    def __init__(self, path: Path, described: Manifest, arrays: dict[str, Array]) -> None:
        self.path = path
        self.manifest = described
        self.arrays = arrays

    @property
    def fingerprint(self) -> str:
        """The hash of the recipe, 64 hex digits."""
        return self.manifest.fingerprint

    @property
    def states(self) -> dict[str, list[str]]:
        """What each index of the state axis means, (S,), of each stream; the main stream comes first."""
        found = {path.split("/")[0]: a.attributes["states"] for path, a in self.arrays.items() if path.endswith("/values")}
        return dict(sorted(found.items(), key=lambda item: item[0] == "decoder"))

    @property
    def main(self) -> str:
        """The stream whose tokens `start` and `length` are about: encoder, decoder or image."""
        return next(iter(self.states))

    def place(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) where each example's rows begin in a stream, and how many they are."""
        if stream == self.main:
            return self.start, self.length
        return self.table("decoder_row"), np.ones_like(self.length)

    @cached_property
    def words(self) -> np.ndarray | None:
        """(K, D) float32: the label words' rows of the frozen output embedding, where the cache carries them."""
        array = self.arrays.get(layout.WORDS)
        return None if array is None else self._read(layout.WORDS, 0)[: array.shape[0]]

    @cached_property
    def start(self) -> np.ndarray:
        """(N,) int64: each example's first row."""
        return self.table("start")

    @cached_property
    def length(self) -> np.ndarray:
        """(N,) int64: each example's rows."""
        return self.table("length")

    @cached_property
    def chunk_of(self) -> np.ndarray:
        """(N,) int64: the chunk in which each example lies, whole."""
        return self.start // self.chunk_rows(self.main)

    @property
    def chunks(self) -> int:
        """How many chunks the states have."""
        return self.arrays[f"{self.main}/values"].chunk_count()

    def chunk_rows(self, stream: str) -> int:
        """C, of a stream."""
        return self.arrays[f"{stream}/values"].chunks[0]

    def chunk_bytes(self, streams: Iterable[str]) -> int:
        """The size of one chunk of some streams, in bytes."""
        return sum(array.chunk_bytes() for path, array in self.arrays.items() if path.split("/")[0] in streams)

    def chunk(self, number: int, stream: str | None = None) -> dict[str, np.ndarray]:
        """One chunk of a stream (the main one) as it is stored: array name -> (C, S, D), read-only."""
        prefix = f"{stream or self.main}/"
        found = {path: array for path, array in self.arrays.items() if path.startswith(prefix)}
        return {path.removeprefix(prefix): self._read(path, number) for path in found}

    def rows(self, example: int, stream: str | None = None) -> np.ndarray:
        """An example's states, decoded: (its rows, S, D) float32. For a look at a few; training has its own path."""
        stream = stream or self.main
        start, length = (int(values[example]) for values in self.place(stream))
        local = start % self.chunk_rows(stream)
        kind = codec(self.manifest.recipe["codec"])
        stored = self.chunk(int(self.chunk_of[example]), stream)
        return kind.decode({name: stored[name][local : local + length] for name in kind.dtypes})

    def table(self, name: str) -> np.ndarray:
        """A whole array under examples/."""
        path = f"examples/{name}"
        array = self.arrays[path]
        parts = [self._read(path, number) for number in range(array.chunk_count())]
        return np.concatenate(parts)[: array.shape[0]]

    def columns(self) -> list[str]:
        """The data set's other columns that the cache carries."""
        return [layout.column_name(path) for path in self.arrays if path.startswith("examples/columns/")]

    def column(self, name: str) -> tuple[np.ndarray, list[Any] | None]:
        """A column (N,), and its distinct values if it has few.

        A column of text is stored as positions in its distinct values, -1 where there was none.
        """
        path = layout.column_path(name)
        return self.table(path), self.arrays[f"examples/{path}"].attributes.get("values")

    def check(self) -> None:
        """Read every chunk once. Raises Damaged for the first whose crc32c is not its own."""
        for path, array in self.arrays.items():
            for number in range(array.chunk_count()):
                self._read(path, number)

    def _read(self, path: str, number: int) -> np.ndarray:
        array = self.arrays[path]
        place = layout.chunk_path(path, number, len(array.shape))
        data = _bytes(self.path, place, array.chunk_bytes())
        raw, told = data[: -layout.CRC_BYTES], data[-layout.CRC_BYTES :]
        found = google_crc32c.value(raw).to_bytes(layout.CRC_BYTES, "little")
        if found != told:
            raise _damaged(self.path, place, f"its crc32c is {found.hex()}, it says {told.hex()}")
        return np.frombuffer(raw, array.dtype).reshape(array.chunks)


def open(path: Path | str) -> Cache:
    """Open a published cache, with all checks.

    Raises Damaged where an object is missing, has another size, or (tables and metadata) another digest.
    """
    folder = Path(path)
    described = manifest.load(folder)
    for place, receipt in described.objects.items():
        _check_place(folder, place)
        size = _size(folder, place)
        if size != receipt.size:
            raise _damaged(folder, place, f"it has {size} bytes, the manifest says {receipt.size}")
        if place.startswith(layout.TABLES) or place.endswith("zarr.json"):
            found = files.sha256(folder / place)
            if found != receipt.sha256:
                raise _damaged(folder, place, f"its sha256 is {found[:12]}…, the manifest says {receipt.sha256[:12]}…")
    read = {place: _array(folder, place) for place in described.objects if place.endswith("/zarr.json")}
    arrays = {place.removesuffix("/zarr.json"): array for place, array in read.items() if array}
    for place, array in layout.chunk_paths(arrays):
        if place not in described.objects or described.objects[place].size != array.chunk_bytes():
            raise _damaged(folder, place, f"the metadata ask for {array.chunk_bytes()} bytes, the manifest has none such")
    return Cache(folder, described, arrays)


def _check_place(folder: Path, place: str) -> None:
    if place.startswith("/") or ".." in place.split("/") or (folder / place).is_symlink():
        raise _damaged(folder, place, "a path may not leave its cache")


def _size(folder: Path, place: str) -> int:
    try:
        return (folder / place).stat().st_size
    except OSError as error:
        raise _damaged(folder, place, f"it cannot be read ({error.strerror})") from None


def _bytes(folder: Path, place: str, size: int) -> bytes:
    try:
        data = (folder / place).read_bytes()
    except OSError as error:
        raise _damaged(folder, place, f"it cannot be read ({error.strerror})") from None
    if len(data) != size:
        raise _damaged(folder, place, f"it has {len(data)} bytes, the manifest says {size}")
    return data


def _array(folder: Path, place: str) -> Array | None:
    """An array's metadata, of the kind that this format writes and no other; None for a group."""
    try:
        text = json.loads((folder / place).read_bytes())
        if text["node_type"] == "group":
            return None
        codecs = [item["name"] for item in text["codecs"]]
        keys = text["chunk_key_encoding"]["configuration"]["separator"]
        if (text["zarr_format"], codecs, keys) != (3, ["bytes", "crc32c"], ".") or text["data_type"] not in _DTYPES:
            raise _damaged(folder, place, f"format 1 has no {text['data_type']} with codecs {codecs} and keys {keys!r}")
        shape, chunks = tuple(text["shape"]), tuple(text["chunk_grid"]["configuration"]["chunk_shape"])
        return Array(shape, chunks, _DTYPES[text["data_type"]], tuple(text["dimension_names"]), text["attributes"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, place, f"these are no Zarr v3 metadata ({type(error).__name__}: {error})") from None


def _damaged(folder: Path, place: str, what: str) -> Damaged:
    return Damaged(f"damaged cache: {folder / place}: {what}; remove {folder} and extract again")
