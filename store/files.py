"""Files that survive a crash, and their digests. Every byte of a cache reaches the disk through `put`."""

import contextlib
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

WORTH_REMEMBERING = 16 << 20
"""size from which a file's digest is remembered across processes, in bytes"""

WORTH_A_THREAD = 1 << 20
"""size from which a file is hashed in a thread beside the writing, in bytes"""

Piece = bytes | np.ndarray
"""of a file: anything whose bytes lie one behind the other"""


class Receipt(NamedTuple):
    """What was written: enough to know it again."""

    size: int
    """in bytes"""
    sha256: str
    """64 hex digits"""


def put(path: Path, *pieces: Piece, sync: bool = True) -> Receipt:
    """Write a whole file, the pieces one behind the other, so that its name never stands for less; returns its receipt.

    Its name is durable once its folder is synced. sync: whether its bytes are durable now; False where they are checked
    before they are trusted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    views = [memoryview(cast(bytes, piece)).cast("B") for piece in pieces]
    size = sum(len(view) for view in views)
    # beside the writing: where the backbone has the cores, two threads for half as long hold it up half as much
    with ThreadPoolExecutor(1, "digest") as pool, part.open("wb", buffering=0) as file:
        digest = pool.submit(_sha256_of, views) if size >= WORTH_A_THREAD else None
        for left in views:
            while left:
                left = left[file.write(left) :]
        if sync:
            os.fsync(file.fileno())
    part.replace(path)
    return Receipt(size, digest.result() if digest else _sha256_of(views))


def _sha256_of(views: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def write(path: Path, data: Piece) -> Receipt:
    """Write a whole file so that after a crash it is there with these bytes or not at all; returns its receipt."""
    receipt = put(path, data)
    sync_folder(path.parent)
    return receipt


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


def remembered_sha256(path: Path) -> str:
    """A file's sha256, computed once for each (path, size, mtime, ctime): the ctime tells what a restored mtime hides.

    Remembered in this process, and that of large files in the user's cache folder too, where that can be written.
    """
    info = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}|{info.st_ctime_ns}".encode()).hexdigest()
    if key not in _seen:
        memo = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "readcache" / "digests" / key
        found = _read(memo) if info.st_size >= WORTH_REMEMBERING else ""
        if not re.fullmatch("[0-9a-f]{64}", found):
            found = sha256(path)
            if info.st_size >= WORTH_REMEMBERING:
                with contextlib.suppress(OSError):
                    write(memo, found.encode())
        _seen[key] = found
    return _seen[key]


_seen: dict[str, str] = {}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
