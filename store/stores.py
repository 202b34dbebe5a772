"""Where caches are looked for, and where what is new goes: STORE=<mine>,<the team's>."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store import catalog
from store.bucket import SCHEME
from store.catalog import Found
from store.errors import Damaged, Refused

Root = Path | str
"""a folder, or s3://bucket/prefix"""

HOME = Path("cache")
"""where runs and what is being built lie, if no folder is named"""


@dataclass(frozen=True)
class Stores:
    """Stores in the order in which they are looked through."""

    roots: tuple[Root, ...]
    """what is new is written to the first; the others are only read"""

    def __str__(self) -> str:
        return ",".join(map(str, self.roots))

    @property
    def home(self) -> Path:
        """Where runs, logs and what is being built lie: the first that is a folder."""
        return next((root for root in self.roots if isinstance(root, Path)), HOME)

    @property
    def workshop(self) -> Path:
        """The folder under which caches are built: where they are published by a rename, or the first."""
        return self.target if isinstance(self.target, Path) else self.home

    @property
    def target(self) -> Root:
        """Where caches are published."""
        return self.roots[0]

    def check(self) -> "Stores":
        """Itself. Raises Refused where one of them is a folder that is not there."""
        for root in self.roots:
            if isinstance(root, Path) and not root.is_dir():
                raise Refused(f"there is no store {root}; `readcache extract` or `train` makes one")
        return self

    def find(self, fingerprint: str) -> Root | None:
        """The published cache of that fingerprint in the first store that has it, or None."""
        return next((found for root in self.roots if (found := catalog.find(root, fingerprint))), None)

    def listing(self) -> Iterator[Found | Damaged]:
        """Every cache, once, from the first store that has it; in place of one that cannot be read, why."""
        seen: set[str] = set()
        for root in self.roots:
            for found in catalog.listing(root):
                if isinstance(found, Damaged):
                    yield found
                elif found.fingerprint not in seen:
                    seen.add(found.fingerprint)
                    yield found

    def named(self, prefix: str) -> str:
        """The one fingerprint of a cache that begins like that, whether it reads or not. Raises Refused for none, or several."""
        self.check()
        if not re.fullmatch("[0-9a-f]{1,64}", prefix):
            raise Refused(f"CACHE={prefix} is no start of a fingerprint; `readcache catalog` lists them")
        every = {str(where).rsplit("/", 1)[1] for root in self.roots for where in catalog.places(root)}
        found = sorted(name for name in every if name.startswith(prefix))
        if len(found) != 1:
            several = ", ".join(name[:16] for name in found[:8]) or "none"
            raise Refused(f"CACHE={prefix} names {len(found)} caches under {self}: {several}; `readcache catalog` lists all")
        return found[0]

    def pick(self, prefix: str) -> Found:
        """That cache, from the first store where it reads. Raises Refused as `named` does, Damaged where it reads nowhere."""
        name, wrong = self.named(prefix), Damaged(f"CACHE={prefix} went to the trash just now")
        for root in self.roots:
            try:
                return catalog.one(root, name)
            except FileNotFoundError:
                continue
            except Refused as error:
                wrong = Damaged(str(error))
        raise wrong


def parse(said: Any) -> Stores:
    """Stores from what a user says: a folder, s3://bucket/prefix, or several with commas between them."""
    if isinstance(said, Stores):
        return said
    if isinstance(said, Path):
        return Stores((said.expanduser(),))
    parts = [part.strip() for part in str(said).split(",")]
    for part in parts:
        if not part:
            raise ValueError(f"STORE={said} names an empty store; give a folder, s3://bucket/prefix, or several: mine,shared")
        if part.startswith("s3:") and not re.match("s3://[^/]", part):
            raise ValueError(f"STORE={part} names no bucket; give s3://bucket/prefix")
        if "://" in part and not part.startswith(SCHEME):
            raise ValueError(f"STORE={part} is none that can be listed; give a folder or s3://bucket/prefix")
    roots = tuple(part.rstrip("/") if part.startswith(SCHEME) else Path(part).expanduser() for part in parts)
    for root in roots[1:]:
        if isinstance(root, Path) and not root.is_dir():
            raise ValueError(f"STORE={said}: {root} is to be read from, and is not there")
    return Stores(roots)


def root_of(where: Root) -> Root:
    """The store in which a cache lies: <root> of <root>/caches/<fingerprint>."""
    return where.parent.parent if isinstance(where, Path) else where.rsplit("/", 2)[0]
