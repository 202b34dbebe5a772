"""The published caches under a root: found by fingerprint, or by what is known of their recipe. A listing, no database.

What manifests say is remembered in the user's cache folder, each by size, times and number of its file (in an object store by
its tag), so that ten thousand are listed without being read. Opening a cache reads its own.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from store import files, manifest
from store.errors import Damaged, Refused
from store.fingerprint import canonical
from store.objects import at, root_at

READERS = 16
"""threads that read manifests which are not remembered"""
NEEDED: dict[str, dict[str, type]] = {
    "about": {"task": str, "split": str, "backbone": str},
    "recipe": {"backbone": dict, "data": dict, "codec": str, "tokens": str, "layers": str},
    "counts": {"examples": int, "rows": int},
}
"""what is asked of manifests that are listed"""
_NAME = re.compile("[0-9a-f]{64}")


class Found(NamedTuple):
    """A cache that is there; opening it is what checks it."""

    path: Path | str
    """its folder, or its address"""
    fingerprint: str
    recipe: dict[str, Any]
    about: dict[str, Any]
    counts: dict[str, int]
    bytes: int
    """all of it, the manifest included"""
    written: float
    """when it was published, by the store's clock, in seconds"""
    reused: list[str]
    """caches from which rows were copied"""


def find(root: Path | str, fingerprint: str) -> Path | str | None:
    """The published cache of that fingerprint, or None."""
    if isinstance(root, Path):
        path = root / "caches" / fingerprint
        return path if path.is_dir() else None
    return f"{root}/caches/{fingerprint}" if root_at(root).listing(f"caches/{fingerprint}") else None


def places(root: Path | str) -> list[Path | str]:
    """Where every cache under a root lies, those that do not read too."""
    return [_at(root, name) for name in sorted(_there(root))]


def _at(root: Path | str, name: str) -> Path | str:
    return root / "caches" / name if isinstance(root, Path) else f"{root}/caches/{name}"


def one(root: Path | str, name: str) -> Found:
    """The cache of that name under a root. Raises FileNotFoundError where there is none, Damaged where it does not read."""
    path, listed = _at(root, name), _there(root, name)
    if name not in listed:
        raise FileNotFoundError(str(path))
    told = _told(path, name)
    return Found(path, name, told["recipe"], told["about"], told["counts"], told["bytes"], listed[name][1], told["reused"])


def listing(root: Path | str) -> Iterator[Found | Damaged]:
    """Every cache under a root in order of fingerprint; in place of one that cannot be read, why."""
    memo = _Memo(root)
    there = _there(root)

    def look(item: tuple[str, tuple[str, float]]) -> Found | Damaged | None:
        name, (tag, written) = item
        path = _at(root, name)
        told = memo.known(name, tag)
        if told is None:
            try:
                told = _told(path, name)
            except Refused as error:
                gone = isinstance(path, Path) and not path.exists()  # to the trash, meanwhile
                return None if gone else Damaged(str(error))
            memo.add(name, tag, told)
        return Found(path, name, told["recipe"], told["about"], told["counts"], told["bytes"], written, told["reused"])

    unknown = sum(memo.known(name, tag) is None for name, (tag, _) in there.items())
    with ThreadPoolExecutor(READERS if unknown > 1 and not isinstance(root, Path) else 1, "manifests") as pool:
        found = list((pool.map if unknown > 1 else map)(look, sorted(there.items())))
    memo.save(len(there))
    yield from (item for item in found if item is not None)


def _told(path: Path | str, name: str) -> dict[str, Any]:
    found = manifest.load(at(path))
    if found.fingerprint != name:
        raise Damaged(f"damaged cache: {path} holds cache {found.fingerprint} under another's name; move it there, or away")
    told = {"recipe": found.recipe, "about": found.about, "counts": found.counts}
    lacks = [f"{part}.{name}" for part, names in NEEDED.items() for name, kind in names.items()
             if not isinstance(told[part].get(name), kind)]  # fmt: skip
    if lacks:
        raise Damaged(
            f"damaged cache: {path}/{manifest.NAME} is of no cache of this project, it says nothing of {', '.join(lacks)}"
        )
    return told | {"bytes": found.bytes, "reused": [source for source, _ in found.reused]}


def _there(root: Path | str, only: str = "") -> dict[str, tuple[str, float]]:
    """Of every cache: what changes with its manifest, and when this was written. A folder without one is there, too.

    only: of that one alone.
    """
    if not isinstance(root, Path):
        listed = root_at(root).listing(f"caches/{only}")
        names = {place.split("/")[1]: item for place, item in listed.items() if place.endswith(f"/{manifest.NAME}")}
        return {name: (item.tag, item.written) for name, item in names.items() if _NAME.fullmatch(name)}
    found = {}
    try:
        if only:
            names_here = [only] if (root / "caches" / only).is_dir() else []
        else:
            with os.scandir(root / "caches") as entries:
                names_here = [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Refused(f"{root}/caches cannot be listed ({error.strerror}); see to its rights") from None
    for name in names_here:
        try:
            about = os.stat(root / "caches" / name / manifest.NAME, follow_symlinks=False)
            found[name] = (f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}", about.st_mtime)
        except OSError:
            found[name] = ("", 0.0)
    return found


class _Memo:
    """What manifests under a root said: a line each, in the user's cache folder; where that cannot be, nothing is lost."""

    def __init__(self, root: Path | str) -> None:
        where = str(root.resolve()) if isinstance(root, Path) else root
        self.path = files.remembered("listings") / f"{hashlib.sha256(where.encode()).hexdigest()[:32]}.jsonl"
        self.lines: dict[str, tuple[str, dict[str, Any]]] = {}
        self.new: list[bytes] = []
        self.held = 0
        try:
            for line in self.path.read_bytes().splitlines():
                name, tag, told = json.loads(line)
                self.lines[name], self.held = (tag, told), self.held + 1
        except (OSError, ValueError, TypeError):
            self.lines, self.held = {}, 1 << 30  # torn: written anew

    def known(self, name: str, tag: str) -> dict[str, Any] | None:
        line = self.lines.get(name)
        return line[1] if line and tag and line[0] == tag else None

    def add(self, name: str, tag: str, told: dict[str, Any]) -> None:
        if tag:
            self.lines[name] = (tag, told)
            self.new.append(json.dumps([name, tag, told]).encode() + b"\n")

    def save(self, there: int) -> None:
        if not self.new:
            return
        try:
            if self.held + len(self.new) > 2 * there + 100:  # mostly of what is gone
                lines = (json.dumps([name, *line]).encode() + b"\n" for name, line in self.lines.items())
                files.put(self.path, b"".join(lines), sync=False)
            else:
                files.make(self.path.parent)
                with self.path.open("ab") as file:
                    file.write(b"".join(self.new))
        except OSError:
            pass


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
