"""Files that survive a crash, and their digests. Every byte of a cache reaches the disk through `write`."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Receipt(NamedTuple):
    """What was written: enough to know it again."""

    size: int
    """in bytes"""
    sha256: str
    """64 hex digits"""


def write(path: Path, data: bytes | memoryview) -> Receipt:
    """Write a whole file so that after a crash it is there with these bytes or not at all; returns its receipt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
    return Receipt(len(data), hashlib.sha256(data).hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """A file's sha256, 64 hex digits, without holding the file in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_seen: dict[tuple[str, int, int], str] = {}


def remembered_sha256(path: Path, digest: Callable[[Path], str] = sha256) -> str:
    """A file's sha256, computed once a process for each (path, size, mtime)."""
    info = path.stat()
    key = (str(path.resolve()), info.st_size, info.st_mtime_ns)
    if key not in _seen:
        _seen[key] = digest(path)
    return _seen[key]
