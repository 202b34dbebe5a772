"""The published caches under a root: found by fingerprint, or by what is known of their recipe. A listing, no database."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from store import manifest
from store.errors import Damaged
from store.fingerprint import canonical
from store.manifest import Manifest


class Found(NamedTuple):
    """A cache that is there; opening it is what checks it."""

    path: Path
    manifest: Manifest


def find(root: Path, fingerprint: str) -> Path | None:
    """The published cache of that fingerprint, or None."""
    path = root / "caches" / fingerprint
    return path if path.is_dir() else None


def listing(root: Path) -> Iterator[Found | Damaged]:
    """Every cache under a root in order of fingerprint; in place of one that cannot be read, why."""
    folder = root / "caches"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            yield Found(path, manifest.load(path))
        except Damaged as error:
            yield error


def agrees(recipe: Any, known: Any) -> bool:
    """Whether a recipe has all that is known of it: of a dict each known field, of anything else the same value."""
    if isinstance(known, dict):
        return isinstance(recipe, dict) and all(key in recipe and agrees(recipe[key], known[key]) for key in known)
    return bool(recipe == known)


def differences(recipe: Any, known: Any, name: str = "") -> list[str]:
    """The known fields in which a recipe differs, as `field: its value, not the known one`."""
    if isinstance(known, dict) and isinstance(recipe, dict):
        return [d for key in known for d in differences(recipe.get(key), known[key], f"{name}.{key}".lstrip("."))]
    return [] if recipe == known else [f"{name}: {_short(recipe)}, not {_short(known)}"]


def _short(value: Any) -> str:
    text = canonical(value).decode()
    return text if len(text) < 24 else text[:12] + "…"
