"""Open a cache and give its chunks and its examples. Not order, batches or torch.

Opening checks every object of the manifest for presence and size and the small ones for their digest; a chunk's crc32c is
checked before its first use. A missing or altered byte raises Damaged; it never reads as zeros.
"""

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from store import layout, manifest, metadata
from store.codecs import codec
from store.errors import Refused, damaged
from store.layout import Array
from store.manifest import Manifest
from store.mapped import Mapped
from store.objects import Folder, Objects, at

_FINGERPRINT = re.compile("[0-9a-f]{64}")


class Cache:
    """One published cache, open for reading. Threads may share it, workers may be forked with it or be sent it."""

    def __init__(self, where: Path | str, objects: Objects, described: Manifest, arrays: dict[str, Array]) -> None:
        self.where = where
        """as it was opened"""
        self.objects = objects
        self.manifest = described
        self.arrays = arrays
        self._maps: dict[str, Mapped] = {}
        self._metadata: dict[str, bytes] = {}
        self._mapping = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is mapped: another process maps for itself."""
        return {"where": self.where, "objects": self.objects, "manifest": self.manifest, "arrays": self.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state.values())  # type: ignore[misc]

    @property
    def path(self) -> Path:
        """The folder in which it lies. Raises Refused for a remote one."""
        if not isinstance(self.objects, Folder):
            raise Refused(f"{self.objects} is no folder of this machine")
        return self.objects.path

    @property
    def fingerprint(self) -> str:
        """The hash of the recipe, 64 hex digits."""
        return self.manifest.fingerprint

    @cached_property
    def states(self) -> dict[str, list[str]]:
        """What each index of the state axis means, (S,), of each stream; the main stream comes first."""
        found = {path.split("/")[0]: a.attributes["states"] for path, a in self.arrays.items() if metadata.of_states(path)}
        return dict(sorted(found.items(), key=lambda item: item[0] == "decoder"))

    @property
    def main(self) -> str:
        """The stream whose tokens `start` and `length` are about: encoder, decoder or image."""
        return next(iter(self.states))

    @property
    def width(self) -> int:
        """D."""
        return self.manifest.counts["width"]

    @property
    def codec(self) -> str:
        """How states are stored."""
        return str(self.manifest.recipe["codec"])

    @property
    def why_whole(self) -> str | None:
        """Why zarr reads the states' chunks, a whole one at a time: in half a sentence; None where any rows can be read."""
        if not isinstance(self.objects, Folder):
            return f"{self.objects} is no folder of this machine"
        return "they are compressed" if self.arrays[f"{self.main}/values"].compressed else None

    @cached_property
    def words(self) -> np.ndarray | None:
        """(K, D) float32: the label words' rows of the frozen output embedding, where the cache carries them."""
        array = self.arrays.get(layout.WORDS)
        return None if array is None else self._read(layout.WORDS, 0)[: array.shape[0]]

    @cached_property
    def start(self) -> np.ndarray:
        """(N,) int64: each example's first row. Raises Damaged where an example's rows are none of one chunk."""
        start, rows = self.table("start"), self.chunk_rows(self.main)
        end = start + self.length - 1
        whole = (start >= 0) & (self.length >= 1) & (end < self.arrays[f"{self.main}/values"].shape[0])
        if not (whole & (start // rows == end // rows)).all():
            raise damaged(self.objects, "examples/start", "an example has rows that are not in one chunk")
        return start

    @cached_property
    def length(self) -> np.ndarray:
        """(N,) int64: each example's rows."""
        return self.table("length")

    @cached_property
    def _one_row(self) -> tuple[np.ndarray, np.ndarray]:
        row = self.table("decoder_row")
        if row.shape != self.length.shape or row.min() < 0 or row.max() >= self.arrays["decoder/values"].shape[0]:
            raise damaged(self.objects, "examples/decoder_row", "an example has a row that is not there")
        return row, np.ones_like(self.length)

    def place(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) where each example's rows begin in a stream, and how many they are."""
        return (self.start, self.length) if stream == self.main else self._one_row

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
        """The size of one chunk of some streams, in bytes; of compressed ones in memory."""
        return sum(array.chunk_bytes() for path, array in self.arrays.items() if path.split("/")[0] in streams)

    def stored(self, stream: str) -> dict[str, Array]:
        """The arrays of a stream, by name."""
        prefix = f"{stream}/"
        return {path.removeprefix(prefix): array for path, array in self.arrays.items() if path.startswith(prefix)}

    def chunk(self, number: int, stream: str, into: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """One chunk of a stream as it is stored: array name -> (C, S, …), read from its file and checked.

        into: arrays to read into, new ones where left out.
        """
        return {name: self._read(f"{stream}/{name}", number, into[name] if into else None) for name in self.stored(stream)}

    def rows_of(self, examples: np.ndarray, stream: str) -> np.ndarray:
        """(r,) where the rows of examples (n,) are in a stream, one example behind the other."""
        return layout.rows_of(*(values[examples] for values in self.place(stream)))

    def gather(self, examples: np.ndarray, stream: str, into: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The rows of any examples (n,) of a stream, as they are stored: array name -> (r, S, …), copies.

        Straight from the mapped chunk files; of a compressed or remote cache by way of whole chunks. Each chunk is checked
        before its first use in a process. into: arrays to copy into, new ones where left out.
        """
        rows = self.rows_of(examples, stream)
        found = into or {name: np.empty((len(rows), *a.chunks[1:]), a.dtype) for name, a in self.stored(stream).items()}
        if not self.why_whole:
            for name, values in found.items():
                self._mapped(f"{stream}/{name}").take(rows, values)
            return found
        number, place = np.divmod(rows, self.chunk_rows(stream))
        for chunk in np.unique(number).tolist():
            mine = number == chunk
            for name, block in self.chunk(chunk, stream).items():
                found[name][mine] = block[place[mine]]
        return found

    def rows(self, example: int, stream: str | None = None) -> np.ndarray:
        """An example's states, decoded: (its rows, S, D) float32. stream: the main one where left out."""
        kind, stored = codec(self.codec), self.gather(np.array([example]), stream or self.main)
        return kind.decode({name: stored[name] for name in kind.arrays}, self.width)

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
            if path.startswith(layout.TABLES) or self.why_whole:
                for number in range(array.chunk_count()):
                    self._read(path, number)
            else:
                self._mapped(path).check(np.arange(array.chunk_count()))

    def _mapped(self, path: str) -> Mapped:
        with self._mapping:
            if path not in self._maps:
                self._maps[path] = self._map(path)
            return self._maps[path]

    def _map(self, path: str) -> Mapped:
        array = self.arrays[path]
        places = [layout.chunk_path(path, number, len(array.shape)) for number in range(array.chunk_count())]
        files_of = [self.path / place for place in places]
        return Mapped(files_of, array, lambda number, what: damaged(self.objects, places[number], what))

    def _read(self, path: str, number: int, into: np.ndarray | None = None) -> np.ndarray:
        array = self.arrays[path]
        place = layout.chunk_path(path, number, len(array.shape))
        found = np.empty(array.chunks, array.dtype) if into is None else into
        if array.compressed or not isinstance(self.objects, Folder):
            if path not in self._metadata:
                self._metadata[path] = layout.metadata({path: array}, {})[f"{path}/zarr.json"]
            try:
                most = self.manifest.objects[place].size
                data = _had(self.objects, place, lambda place: self.objects.read(place, most))
                _check_size(self.objects, place, len(data), self.manifest)
                block = layout.decode(self._metadata[path], array, number, data)
            except (ValueError, RuntimeError) as error:
                raise damaged(self.objects, place, f"zarr does not read it ({error})") from None
            found[: len(block)] = block  # of a table's last chunk zarr gives what is in the table
            found[len(block) :] = 0
            return found
        told = _fill(self.objects, place, found)
        crc = google_crc32c.value(found).to_bytes(layout.CRC_BYTES, "little")
        if crc != told:
            raise damaged(self.objects, place, f"its crc32c is {crc.hex()}, it says {told.hex()}")
        return found


def open(where: Path | str) -> Cache:
    """Open a published cache, with all checks. where: its folder, or its address where it is remote (s3://…).

    Raises Damaged where an object is missing, has another size, or (tables and metadata) another digest, and where the cache
    lies under the fingerprint of another recipe; Refused where it is not there, or an address cannot be reached.
    """
    objects = at(where)
    described = manifest.load(objects)
    if wrong := misplaced(where, described):
        raise damaged(objects, manifest.NAME, wrong)
    objects = objects.written(described.fingerprint, described.write) if described.write else objects
    try:
        there = objects.sizes()
    except OSError as error:
        raise Refused(f"{objects} cannot be listed ({error.strerror or error})") from None
    read: dict[str, bytes] = {}
    for place, receipt in described.objects.items():
        _check_size(objects, place, there.get(place), described)
        if place.endswith("zarr.json"):
            read[place] = _had(objects, place, objects.read)
            found = hashlib.sha256(read[place]).hexdigest()
        elif place.startswith(layout.TABLES):
            found = _had(objects, place, objects.sha256)
        else:
            continue
        if found != receipt.sha256:
            raise damaged(objects, place, f"its sha256 is {found[:12]}…, the manifest says {receipt.sha256[:12]}…")
    return Cache(where, objects, described, metadata.arrays_of(objects, described, read))


def misplaced(where: Path | str, described: Manifest) -> str | None:
    """What is wrong with a cache that lies in a store under the name of another; None where it does not."""
    above, name = ["", "", *str(where).rstrip("/").rsplit("/", 2)][-2:]
    if above != "caches" or not _FINGERPRINT.fullmatch(name) or name == described.fingerprint:
        return None
    return f"its recipe is that of cache {described.fingerprint}, under another's name: move it there, or away"


def _check_size(objects: Objects, place: str, size: int | None, described: Manifest) -> None:
    if size is None:
        raise damaged(objects, place, "there is no such file, or it is a link, and a path may not leave its cache")
    if size != described.objects[place].size:
        raise damaged(objects, place, f"it has {size} bytes, the manifest says {described.objects[place].size}")


def _fill(folder: Folder, place: str, into: np.ndarray) -> bytes:
    """Read a raw chunk file into an array, without a copy; returns the checksum behind it."""

    def fill(place: str) -> tuple[int, int, bytes]:
        with folder.opened(place) as file:
            size = os.fstat(file.fileno()).st_size
            return size, file.readinto(into.reshape(-1).view(np.uint8).data), file.read(layout.CRC_BYTES)

    size, got, told = _had(folder, place, fill)
    if size != into.nbytes + layout.CRC_BYTES or got != into.nbytes:
        raise damaged(folder, place, f"it has {size} bytes, the manifest says {into.nbytes + layout.CRC_BYTES}")
    return told


T = TypeVar("T")


def _had(objects: Objects, place: str, get: Callable[[str], T]) -> T:
    """What `get` gives of an object. Raises Damaged where there is none, and Refused where it cannot be read."""
    try:
        return get(place)
    except FileNotFoundError:
        raise damaged(objects, place, "there is no such file") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise damaged(objects, place, "it is a link, and a path may not leave its cache") from None
        raise Refused(f"{objects}/{place} cannot be read ({error.strerror}); see to its rights and its disk") from None
