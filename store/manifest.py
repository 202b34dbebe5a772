"""What a finished cache says of itself: `manifest.json`, written last.

A manifest holds nothing of when, where or by whom, so that the same recipe gives the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from store.errors import Damaged
from store.files import Receipt
from store.fingerprint import canonical, fingerprint
from store.layout import FORMAT
from store.objects import Folder, Objects

NAME = "manifest.json"
_DIGITS = 64


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
    body["digest"] = hashlib.sha256(canonical(body)).hexdigest()
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode()


def attributes(recipe: dict[str, Any]) -> dict[str, Any]:
    """What the Zarr group says of itself to readers that know only Zarr: nothing that the recipe does not fix."""
    return {"readcache": {"format": FORMAT, "fingerprint": fingerprint(recipe), "recipe": recipe}}


def planned(recipe: dict[str, Any], about: dict[str, Any], counts: dict[str, int], sizes: Mapping[str, int]) -> Manifest:
    """The manifest that a cache will have, its digests still open: for the exact size before anything is spent."""
    return Manifest(recipe, about, counts, {path: Receipt(size, "0" * _DIGITS) for path, size in sizes.items()})


def load(where: Path | Objects) -> Manifest:
    """Read a cache's manifest. Raises Damaged where it is missing, altered in any byte, or of another format."""
    held = Folder(where) if isinstance(where, Path) else where
    path = f"{held}/{NAME}"
    again = f"remove {held} and extract again"
    try:
        text = held.read(NAME)
        body = json.loads(text)
        told = body["format"]
        if told == FORMAT:
            objects = {place: Receipt(item["size"], item["sha256"]) for place, item in body["objects"].items()}
            found = Manifest(body["recipe"], body["about"], body["counts"], objects)
            same = dump(found) == text
    except FileNotFoundError:
        raise Damaged(
            f"{path} is missing: {held} is no cache (look at the path), or one that lost its manifest; then {again}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is not a manifest ({type(error).__name__}: {error}); {again}") from None
    if told != FORMAT:
        raise Damaged(f"{path} has format {told!r}, this version reads {FORMAT}; use a matching readcache or {again}")
    if not same:
        raise Damaged(f"{path} was altered: its digest {str(body.get('digest'))[:12]}… is not that of its text; {again}")
    return found
