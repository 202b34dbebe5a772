"""What a cache says of its arrays, checked: Zarr metadata of the kind that this format writes, and no other.

Nothing is allocated by what they say before they agree with each other and with the manifest.
"""

from collections.abc import Mapping
from typing import Any

from store import layout
from store.codecs import codec, parse
from store.errors import Refused, damaged
from store.fingerprint import parse as parse_json
from store.layout import Array
from store.manifest import Manifest

_DTYPES = {"int8": "|i1", "uint8": "|u1", "uint16": "<u2", "int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}


def arrays_of(where: object, described: Manifest, texts: Mapping[str, bytes]) -> dict[str, Array]:
    """The arrays of a cache, by path. texts: its zarr.json files. where: the cache, for messages.

    Raises Damaged for what format 1 has not, and where metadata, manifest and recipe contradict each other.
    """
    told = {place: _array(where, place, text) for place, text in texts.items() if place.endswith("/zarr.json")}
    arrays = {place.removesuffix("/zarr.json"): array for place, array in told.items() if array}
    for place, array in layout.chunk_paths(arrays):
        if place not in described.objects or not array.fits(described.objects[place].size):
            raise damaged(where, place, f"the metadata ask for {array.chunk_bytes()} bytes, the manifest has none such")
    try:
        _agree(where, described, arrays)
    except (KeyError, TypeError, AttributeError, IndexError, Refused) as error:
        if isinstance(error, Refused) and str(error).startswith("damaged cache"):
            raise
        raise damaged(where, "manifest.json", f"it lacks what a cache has ({type(error).__name__}: {error})") from None
    return arrays


def of_states(path: str) -> bool:
    """Whether an array at a path is the states of a stream: a column of the data set may be called `values` too."""
    return path.endswith("/values") and not path.startswith(layout.TABLES)


def _agree(where: object, described: Manifest, arrays: dict[str, Array]) -> None:
    """States are as the recipe's codec stores them, and every example has its place."""
    name, width = described.recipe["codec"], described.counts["width"]
    for path in [path for path in arrays if of_states(path)]:
        stream, states = path.removesuffix("/values"), arrays[path].shape[:2]
        for part, stored in codec(name).arrays.items():
            array = arrays[f"{stream}/{part}"]
            right = ((*states, stored.width(width)), stored.dtype, parse(name)[1])
            if (array.shape, array.dtype, array.compressed) != right or array.chunks[0] != arrays[path].chunks[0]:
                raise damaged(
                    where, f"{stream}/{part}/zarr.json", f"codec {name} at width {width} has no {array.shape} {array.dtype}"
                )
    start, length = arrays["examples/start"], arrays["examples/length"]
    if not start.shape == length.shape == (described.counts["examples"],) or {start.dtype, length.dtype} != {"<i8"}:
        raise damaged(where, "examples/start/zarr.json", f"it is {start.shape} for {described.counts['examples']} examples")


def _array(where: object, place: str, metadata: bytes) -> Array | None:
    """An array's metadata, of the kind that this format writes and no other; None for a group."""
    try:
        text: dict[str, Any] = parse_json(metadata)
        if text["node_type"] == "group":
            return None
        if text["node_type"] != "array":
            raise damaged(where, place, f"format 1 has no {text['node_type']!r}")
        codecs = [item["name"] for item in text["codecs"]]
        compressed = codecs == ["bytes", "blosc", "crc32c"]
        keys = text["chunk_key_encoding"]["configuration"]["separator"]
        known = compressed or codecs == ["bytes", "crc32c"]
        if not known or (text["zarr_format"], keys) != (3, ".") or text["data_type"] not in _DTYPES:
            raise damaged(where, place, f"format 1 has no {text['data_type']} with codecs {codecs} and keys {keys!r}")
        if (
            text["chunk_key_encoding"]["name"] != "default"
            or text["chunk_grid"]["name"] != "regular"
            or text.get("storage_transformers")
        ):
            raise damaged(where, place, "format 1 has neither other grids and keys nor storage transformers")
        if text["codecs"][0].get("configuration", {}).get("endian", "little") != "little":
            raise damaged(where, place, "format 1 has little-endian numbers only")
        shape, chunks = tuple(text["shape"]), tuple(text["chunk_grid"]["configuration"]["chunk_shape"])
        names = tuple(text["dimension_names"])
        found = Array(shape, chunks, _DTYPES[text["data_type"]], names, dict(text["attributes"]), compressed)
        whole = all(type(size) is int and size > 0 for size in (*shape, *chunks))
        if not whole or not shape or not len(shape) == len(chunks) == len(names) or shape[1:] != chunks[1:]:
            raise damaged(where, place, f"format 1 has no shape {shape} in chunks {chunks}, named {names}")
        if of_states(place.removesuffix("/zarr.json")) and len(found.attributes["states"]) != shape[1]:
            raise damaged(where, place, f"{len(found.attributes['states'])} states are named, and {shape[1]} are stored")
        return found
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise damaged(where, place, f"these are no Zarr v3 metadata ({type(error).__name__}: {error})") from None
