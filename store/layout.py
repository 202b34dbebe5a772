"""The format on disk, version 1, as plain data: which arrays there are, and where chunks and rows start.

    zarr.json                                 Zarr v3 group; its attributes say what the cache is
    <stream>/<name>                           (R, S, …), chunks (C, S, …): `values`, and `scales` where a codec has them
    encoder/cross_attention                   (R, L) of an encoder-decoder: what its decoder's row takes of each encoder token
    examples/start, examples/length           (N,) where an example's rows begin, and how many they are
    examples/decoder_row                      (N,) of an encoder-decoder with both streams: where its decoder's one row is
    examples/input_ids, token_type_ids        (tokens,) the tokens themselves, ragged
    examples/offset                           (N + 1,) where an example's tokens begin
    examples/key                              (N, 16) hash of an example's token ids, or pixels
    examples/columns/<column>                 (N,) the other columns of the data set: label, idx, …
    words/embedding                           (K, D) the label words' rows of the frozen output embedding

Chunks are raw little-endian bytes in C order followed by their crc32c (4 bytes): a chunk file is the array. With a codec
`…+blosc` the bytes of states go through blosc first (zstd, bits shuffled), and then only zarr reads them.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
import zarr
from numcodecs.blosc import BITSHUFFLE, MAX_OVERHEAD, Blosc
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from store.codecs import codec, parse

FORMAT = 1
CRC_BYTES = 4
CROSS_ATTENTION = "encoder/cross_attention"
WORDS = "words/embedding"
TABLES = ("examples/", "words/")
"""what is small, and not of a stream"""
MOST_UNPACKED = 1 << 30
"""of a compressed chunk, in bytes: what says that it becomes more is not believed"""
FLAT_CHUNK = 1 << 22
"""items of one chunk of the arrays under examples/"""
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
"""what a column, a task or a run may be called: it becomes a name on disk"""


def column_path(name: str) -> str:
    """Where a data set's column lies under examples/: its name, with what is not plain written as %XX.

    Dots too: `..` would leave the folder, and `zarr.json` is taken.
    """
    return f"columns/{quote(name, safe='').replace('.', '%2E')}"


def column_name(path: str) -> str:
    """The column that lies at a path."""
    return unquote(path.rsplit("/", 1)[1])


class Array(NamedTuple):
    """One Zarr array."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    """of its dimensions"""
    attributes: dict[str, Any]
    compressed: bool = False
    """by blosc"""

    def raw_bytes(self) -> int:
        """The size of one chunk's numbers, in bytes; exact, however large they say they are."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize

    def chunk_bytes(self) -> int:
        """The size of one chunk file, in bytes; of a compressed one, at most."""
        raw = self.raw_bytes()
        return raw + CRC_BYTES + (MAX_OVERHEAD if self.compressed else 0)

    def fits(self, size: int) -> bool:
        """Whether a chunk file may have that size, in bytes."""
        if self.compressed:
            return CRC_BYTES < size <= self.chunk_bytes() and self.raw_bytes() <= MOST_UNPACKED
        return size == self.chunk_bytes()

    def chunk_count(self) -> int:
        """Chunks lie along the first axis only."""
        return -(-self.shape[0] // self.chunks[0])


class Placement(NamedTuple):
    """Where every example's rows lie."""

    chunk_rows: int
    """C"""
    first: np.ndarray
    """(chunks + 1,) the first example of each chunk, and N"""
    start: np.ndarray
    """(N,) the example's first row"""

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return len(self.first) - 1

    @property
    def rows(self) -> int:
        """R: stored rows, the empty ones at the end of a chunk included."""
        return self.chunks * self.chunk_rows


def place(lengths: np.ndarray, row_bytes: int, chunk_bytes: int) -> Placement:
    """Put examples into chunks in order, none across two chunks.

    lengths: (N,) rows of each example, all ≥ 1. Chunks are as even as they can be, and hold about `chunk_bytes` at
    most, or the longest example.
    """
    longest, total = int(lengths.max()), int(lengths.sum())
    limit = max(longest, chunk_bytes // row_bytes)
    # n chunks of ceil(total / n) + longest - 1 rows always suffice, since each is left with fewer than `longest` empty rows
    even = -(-total // -(-total // limit)) + longest - 1
    rows = min(limit, even, total)
    assert rows >= longest, (rows, longest)  # or the loop below would not end
    ends = np.cumsum(lengths)
    first = [0]
    start = np.empty(len(lengths), np.int64)
    while first[-1] < len(lengths):
        begin = first[-1]
        before = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, before + rows, "right"))
        start[begin:end] = ends[begin:end] - lengths[begin:end] - before + (len(first) - 1) * rows
        first.append(end)
    return Placement(rows, np.array(first, np.int64), start)


def rows_of(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(r,) the rows of examples, one example behind the other. starts, lengths: (n,) where each begins, how many it has."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def state_arrays(stream: str, codec_name: str, placement: Placement, states: list[str], width: int) -> dict[str, Array]:
    """The arrays that hold a stream's states, by path. width: D."""
    base, compressed = parse(codec_name)
    return {
        f"{stream}/{name}": Array(
            (placement.rows, len(states), stored.width(width)),
            (placement.chunk_rows, len(states), stored.width(width)),
            stored.dtype,
            ("row", "state", "width"),
            {"codec": base, "meaning": stored.meaning, "states": states},
            compressed,
        )
        for name, stored in codec(codec_name).arrays.items()
    }


def one_each(placement: Placement) -> Placement:
    """One row an example, in the same chunks: for a stream beside the main one."""
    rows = int(np.diff(placement.first).max())
    number = np.repeat(np.arange(placement.chunks), np.diff(placement.first))  # (N,) the chunk of each example
    return Placement(rows, placement.first, number * rows + np.arange(len(number)) - placement.first[number])


def attention_array(placement: Placement, blocks: int) -> Array:
    """The array of cross-attention, beside the encoder's states."""
    meaning = "cross-attention of the decoder's row to each encoder token at each kept decoder block, mean over heads"
    return Array((placement.rows, blocks), (placement.chunk_rows, blocks), "<f4", ("row", "block"), {"meaning": meaning})


def flat_array(data: np.ndarray, **attributes: Any) -> Array:
    """The array that holds a table of the examples, whole or in large chunks."""
    rows = max(1, min(len(data), FLAT_CHUNK))
    names = ("item", "part")[: data.ndim]
    return Array(data.shape, (rows, *data.shape[1:]), data.dtype.newbyteorder("<").str, names, attributes)


def chunk_path(array: str, number: int, dimensions: int) -> str:
    """The path of a chunk file in the cache: Zarr's default key encoding with `.`, so that an array is one folder."""
    return f"{array}/c.{number}" + ".0" * (dimensions - 1)


def chunk_paths(arrays: Mapping[str, Array]) -> Iterable[tuple[str, Array]]:
    """Every chunk file that the arrays have, and the array that it is of."""
    for path, array in arrays.items():
        for number in range(array.chunk_count()):
            yield chunk_path(path, number, len(array.shape)), array


_LEVEL = 5
"""blosc's effort, 1 to 9"""


def compress(block: np.ndarray) -> bytes:
    """A chunk's bytes through blosc, as the metadata say."""
    return bytes(Blosc("zstd", _LEVEL, BITSHUFFLE, typesize=block.dtype.itemsize).encode(block))


def decode(metadata: bytes, array: Array, number: int, chunk: bytes) -> np.ndarray:
    """A chunk file's numbers, as zarr reads them from an array's zarr.json and this file, checksum included.

    Given the file's bytes, since to zarr a missing one reads as zeros, in every version. Raises ValueError or RuntimeError.
    """
    if array.compressed:
        # blosc makes room for what its header says, and reads as far as it says, whatever is there
        told = [int.from_bytes(chunk[begin : begin + 4], "little") for begin in (4, 12)]
        if told != [array.raw_bytes(), len(chunk) - CRC_BYTES]:
            raise ValueError(f"blosc's header tells of {told[1]} bytes that become {told[0]}, and these are other numbers")
    place = chunk_path("array", number, len(json.loads(metadata)["shape"]))
    held = {"array/zarr.json": metadata, place: chunk}
    memory = MemoryStore({path: cpu.Buffer.from_bytes(data) for path, data in held.items()}, read_only=True)
    found = zarr.open_array(memory, path="array", mode="r", zarr_format=3)
    first = found.chunks[0]
    return np.asarray(found[number * first : (number + 1) * first])


def metadata(arrays: Mapping[str, Array], attributes: dict[str, Any]) -> dict[str, bytes]:
    """Every zarr.json of the group, by path, as zarr itself writes it."""
    held: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(held), zarr_format=3, attributes=attributes)
    blosc = [BloscCodec(cname="zstd", clevel=_LEVEL, shuffle="bitshuffle")]
    for path, array in arrays.items():
        group.create_array(
            path,
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            serializer=BytesCodec(endian="little" if np.dtype(array.dtype).itemsize > 1 else None),
            compressors=[*blosc, Crc32cCodec()] if array.compressed else [Crc32cCodec()],
            filters=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=array.names,
            attributes=array.attributes,
        )

    return {path: buffer.to_bytes() for path, buffer in held.items()}
