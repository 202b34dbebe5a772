"""What a finished cache says of itself: `manifest.json`, written last.

A manifest holds nothing of when, where or by whom, so that the same recipe gives the same bytes.
"""

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from store.errors import Damaged, Refused
from store.files import Receipt
from store.fingerprint import canonical, fingerprint, parse
from store.layout import FORMAT
from store.objects import Folder, Objects

NAME = "manifest.json"
MOST = 256 << 20
"""of a manifest, in bytes: one of a million objects is smaller"""
LARGEST = 1 << 53
"""of an object, in bytes"""
_DIGITS = 64
_PATH = re.compile(r"(?:(?!\.\.?(?:/|$))[A-Za-z0-9_.%~-]{1,255}/)*(?!\.\.?$)[A-Za-z0-9_.%~-]{1,255}")
_SHA256 = re.compile("[0-9a-f]{64}")


class Manifest(NamedTuple):
    """A cache's own account of itself."""

    recipe: dict[str, Any]
    """what fixes the content; its hash is the fingerprint"""
    about: dict[str, Any]
    """names that fix nothing: task, split, backbone, versions"""
    counts: dict[str, int]
    """examples, rows (kept tokens), tokens"""
    objects: dict[str, Receipt]
    """every file but the manifest: path -> size in bytes, sha256"""
    reused: tuple[tuple[str, int], ...] = ()
    """caches from which rows were copied, and of how many examples: `examples/copied_from` says which"""
    write: str = ""
    """in an object store, where nothing can be renamed: whose objects these are, <root>/objects/<fingerprint>/<write>/"""

    @property
    def fingerprint(self) -> str:
        """The recipe's hash."""
        return fingerprint(self.recipe)

    @property
    def bytes(self) -> int:
        """The size of the whole cache on disk, the manifest included, in bytes."""
        return sum(item.size for item in self.objects.values()) + len(dump(self))


def dump(manifest: Manifest) -> bytes:
    """The text of manifest.json. Its length depends on names and sizes only, never on digests."""
    body = {
        "format": FORMAT,
        "fingerprint": manifest.fingerprint,
        "recipe": manifest.recipe,
        "about": manifest.about,
        "counts": manifest.counts,
        "objects": {path: {"size": r.size, "sha256": r.sha256} for path, r in sorted(manifest.objects.items())},
    }
    if manifest.reused:
        body["reused"] = [{"fingerprint": cache, "examples": count} for cache, count in manifest.reused]
    if manifest.write:
        body["write"] = manifest.write
    body["digest"] = hashlib.sha256(canonical(body)).hexdigest()
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode()


def plain(path: str) -> bool:
    """Whether a path stays in its cache and is written as this format writes paths: no `..`, no root, no link's name."""
    return _PATH.fullmatch(path) is not None


def attributes(recipe: dict[str, Any]) -> dict[str, Any]:
    """What the Zarr group says of itself to readers that know only Zarr: nothing that the recipe does not fix."""
    return {"readcache": {"format": FORMAT, "fingerprint": fingerprint(recipe), "recipe": recipe}}


def planned(recipe: dict[str, Any], about: dict[str, Any], counts: dict[str, int], sizes: Mapping[str, int]) -> Manifest:
    """The manifest that a cache will have, its digests still open: for the exact size before anything is spent."""
    return Manifest(recipe, about, counts, {path: Receipt(size, "0" * _DIGITS) for path, size in sizes.items()})


def load(where: Path | Objects) -> Manifest:
    """Read a cache's manifest. Raises Damaged where it is missing or altered in any byte, Refused where it has another format."""
    held = Folder(where) if isinstance(where, Path) else where
    try:
        text = held.read(NAME, MOST)
    except FileNotFoundError:
        raise Damaged(
            f"{held}/{NAME} is missing: {held} is no cache (look at the path), or one that lost its manifest; then repair it, or "
            f"remove {held} and extract again"
        ) from None
    except ValueError as error:
        raise Damaged(f"{held}/{NAME} is not a manifest ({error}); repair it, or remove {held} and extract again") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Damaged(f"{held}/{NAME} is a link, and no manifest; repair it, or remove {held} and extract again") from None
        raise Refused(f"{held}/{NAME} cannot be read ({error.strerror}); see to its rights and its disk") from None
    return parsed(text, str(held))


def parsed(text: bytes, held: str) -> Manifest:
    """A manifest from its text. held: the cache, for messages. Raises Damaged and Refused as `load` does."""
    path, again, same = f"{held}/{NAME}", f"repair it, or remove {held} and extract again", False
    try:
        body = parse(text)
        told = body["format"]
        if told == FORMAT:
            objects = {place: _object(place, item) for place, item in body["objects"].items()}
            reused = tuple(_source(item["fingerprint"], item["examples"]) for item in body.get("reused", ()))
            for part, kind in (("recipe", object), ("about", object), ("counts", int)):
                if not isinstance(body[part], dict) or not all(isinstance(value, kind) for value in body[part].values()):
                    raise ValueError(f"{part} is {str(body[part])[:80]}")
            write = _write(body.get("write", ""))
            found = Manifest(body["recipe"], body["about"], body["counts"], objects, reused, write)
            same = dump(found) == text
        foreign = told != FORMAT and _sound(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is not a manifest ({type(error).__name__}: {error}); {again}") from None
    if foreign:
        raise Refused(f"{path} has format {told!r}, this version reads {FORMAT}; use a matching readcache or {again}")
    if not same:
        raise Damaged(f"{path} was altered: its digest {str(body.get('digest'))[:12]}… is not that of its text; {again}")
    return found


def _sound(body: dict[str, Any]) -> bool:
    """Whether a manifest is as it was written, whatever it says."""
    rest = {name: value for name, value in body.items() if name != "digest"}
    return bool(hashlib.sha256(canonical(rest)).hexdigest() == body.get("digest"))


def _object(place: str, item: dict[str, Any]) -> Receipt:
    if not plain(place):
        raise ValueError(f"a path may not leave its cache, and {place[:80]!r} is none that this format writes")
    size, digest = item["size"], item["sha256"]
    if type(size) is not int or not 0 <= size <= LARGEST or not _SHA256.fullmatch(digest):
        raise ValueError(f"{place} has size {size!r} and sha256 {digest!r}")
    return Receipt(size, digest)


def _source(fingerprint: str, examples: int) -> tuple[str, int]:
    if not _SHA256.fullmatch(fingerprint) or type(examples) is not int:
        raise ValueError(f"rows of {examples!r} examples are said to be from {fingerprint!r}")
    return fingerprint, examples


def _write(name: str) -> str:
    if not re.fullmatch("[0-9a-f]{0,32}", name):
        raise ValueError(f"{name[:80]!r} is no name of a write")
    return name
