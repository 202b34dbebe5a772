"""Where the objects of a cache lie: in a folder of this machine, or at an address that fsspec reaches. Sole home of fsspec."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import fsspec

from store import files
from store.errors import Refused


class Objects(Protocol):
    """The objects of one cache, by their paths in it. What is not there raises FileNotFoundError."""

    def read(self, place: str) -> bytes:
        """A whole object."""

    def sizes(self) -> dict[str, int]:
        """Of every object that is there, in bytes; links lead nowhere."""

    def sha256(self, place: str) -> str:
        """Of an object, 64 hex digits."""


class Folder:
    """In a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, place: str) -> bytes:
        return (self.path / place).read_bytes()

    def sizes(self) -> dict[str, int]:
        found, waiting = {}, [""]
        while waiting:
            folder = waiting.pop()
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{folder}{entry.name}/")
                    elif entry.is_file(follow_symlinks=False):
                        found[folder + entry.name] = entry.stat().st_size
        return found

    def sha256(self, place: str) -> str:
        return files.sha256(self.path / place)


class Remote:
    """At an address: s3://bucket/caches/…, memory://…. May be sent to workers, or forked with them."""

    def __init__(self, address: str) -> None:
        """Raises Refused for an address of a kind that is not known or not installed here, or that leads nowhere."""
        self.address = address.rstrip("/")
        if self.address.endswith(":"):
            raise Refused(f"{address} names no place; give all of it, up to the fingerprint")
        try:
            self._reach()
        except Exception as error:  # each system behind fsspec has its own
            raise Refused(f"{address} cannot be reached from here: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        return self.address

    def _reach(self) -> tuple[Any, str]:
        """The file system, which fsspec keeps for each process and thread, and the path in it."""
        return fsspec.url_to_fs(self.address)  # type: ignore[no-any-return]

    @contextmanager
    def reaching(self, place: str) -> Iterator[None]:
        """Tells what is not there (FileNotFoundError) from what cannot be had now: Refused, whatever the system behind raises."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise Refused(
                f"{self}/{place} cannot be had ({why}); see to the connection and to your rights, then try again"
            ) from None

    def read(self, place: str) -> bytes:
        with self.reaching(place):
            system, base = self._reach()
            return bytes(system.cat_file(f"{base}/{place}"))

    def sizes(self) -> dict[str, int]:
        with self.reaching(""):
            system, base = self._reach()
            system.invalidate_cache()  # a listing of before says nothing of now
            found = system.find(base, detail=True)
            real = {path: about for path, about in found.items() if not about.get("islink")}
            return {path.removeprefix(base).lstrip("/"): int(about["size"]) for path, about in real.items()}

    def sha256(self, place: str) -> str:
        return hashlib.sha256(self.read(place)).hexdigest()


def at(where: Path | str) -> Folder | Remote:
    """The objects of the cache that lies there: a folder, or an address with `://` in it."""
    return Remote(where) if isinstance(where, str) and "://" in where else Folder(Path(where))
