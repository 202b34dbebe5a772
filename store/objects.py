"""Where the objects of a cache lie: in a folder of this machine, or at an address that fsspec reaches. Sole home of fsspec."""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import fsspec

from store import files
from store.bucket import SCHEME, Bucket, Listed
from store.errors import Refused


class Objects(Protocol):
    """The objects of one cache, by their paths in it. What is not there raises FileNotFoundError."""

    def read(self, place: str, most: int | None = None) -> bytes:
        """A whole object. most: of its bytes; raises ValueError where there are more."""

    def sizes(self) -> dict[str, int]:
        """Of every object that is there, in bytes; links lead nowhere."""

    def sha256(self, place: str) -> str:
        """Of an object, 64 hex digits."""

    def written(self, fingerprint: str, write: str) -> "Objects":
        """Where a write of this cache to an object store lies: <root>/objects/<fingerprint>/<write>, of <root>/caches/<…>."""


class Folder:
    """In a folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def opened(self, place: str) -> FileIO:
        """An object, to be read; it is a file, no link and no device. The caller closes it."""
        handle = os.open(self.path / place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FileNotFoundError(errno.ENOENT, "no file", str(self.path / place))
        return FileIO(handle, "rb")

    def read(self, place: str, most: int | None = None) -> bytes:
        with self.opened(place) as file:
            _limit(os.fstat(file.fileno()).st_size, most)
            return file.read()

    def sizes(self) -> dict[str, int]:
        return {place: entry.stat().st_size for place, entry in self._inside() if entry.is_file(follow_symlinks=False)}

    def strange(self) -> list[str]:
        """What is there and neither file nor folder: links, devices."""
        return sorted(place for place, entry in self._inside() if not entry.is_file(follow_symlinks=False))

    def _inside(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{folder}{entry.name}/")
                    else:
                        yield folder + entry.name, entry

    def sha256(self, place: str) -> str:
        with self.opened(place) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def written(self, fingerprint: str, write: str) -> "Folder":
        return Folder(self.path.parent.parent / "objects" / fingerprint / write)

    def listing(self, prefix: str) -> dict[str, Listed]:
        """What there is under a path, by path; what is being written is not."""
        found, waiting = {}, [self.path / prefix]
        while waiting:
            try:
                with os.scandir(waiting.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(Path(entry.path))
                        elif not entry.name.startswith(".") and not entry.name.endswith(files.PART):
                            try:
                                about = entry.stat(follow_symlinks=False)
                            except FileNotFoundError:  # gone meanwhile; it hides no other
                                continue
                            tag = f"{about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino}"
                            place = str(Path(entry.path).relative_to(self.path))
                            found[place] = Listed(about.st_size, tag, about.st_mtime)
            except FileNotFoundError:  # gone meanwhile
                continue
        return found

    def put(self, place: str, data: bytes) -> None:
        """Write a whole object, durably, over what was there."""
        files.write(self.path / place, data)

    def delete(self, places: Iterable[str]) -> None:
        """Remove objects, and folders that are empty then; what is gone already is gone."""
        for place in places:
            path = self.path / place
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()

    def now(self) -> float:
        """The time by the clock of its file system, in seconds; where nothing can be written, by this machine's."""
        try:
            return files.now(self.path)
        except OSError:
            return time.time()


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

    def read(self, place: str, most: int | None = None) -> bytes:
        with self.reaching(place):
            system, base = self._reach()
            data = bytes(system.cat_file(f"{base}/{place}", 0, None if most is None else most + 1))
        _limit(len(data), most)
        return data

    def sizes(self) -> dict[str, int]:
        with self.reaching(""):
            system, base = self._reach()
            system.invalidate_cache()  # a listing of before says nothing of now
            found = system.find(base, detail=True)
            real = {path: about for path, about in found.items() if not about.get("islink")}
            return {path.removeprefix(base).lstrip("/"): int(about["size"]) for path, about in real.items()}

    def sha256(self, place: str) -> str:
        return hashlib.sha256(self.read(place)).hexdigest()

    def written(self, fingerprint: str, write: str) -> "Remote":
        return Remote(f"{self.address.rsplit('/', 2)[0]}/objects/{fingerprint}/{write}")


def at(where: Path | str) -> Objects:
    """The objects of the cache that lies there: a folder, or an address with `://` in it."""
    if isinstance(where, Path) or "://" not in where:
        return Folder(Path(where))
    return Bucket(where) if where.startswith(SCHEME) else Remote(where)


def root_at(where: Path | str) -> Folder | Bucket:
    """A store that can be listed and written: a folder, or s3://bucket/prefix."""
    return Bucket(where) if isinstance(where, str) else Folder(where)


def _limit(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise ValueError(f"it has {size:,} bytes, and at most {most:,} are read")
