"""Files that survive a crash, and their digests. Every byte of a cache reaches the disk through `put`."""

import contextlib
import hashlib
import os
import re
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

WORTH_REMEMBERING = 16 << 20
"""size from which a file's digest is remembered across processes, in bytes"""

WORTH_A_THREAD = 1 << 20
"""size from which a file is hashed in a thread beside the writing, in bytes"""

PART = ".part"
"""what the name of a file ends in that is not whole yet"""

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
    make(path.parent)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
    views = [memoryview(cast(bytes, piece)).cast("B") for piece in pieces]
    size = sum(len(view) for view in views)
    # beside the writing: where the backbone has the cores, two threads for half as long hold it up half as much
    with ThreadPoolExecutor(1, "digest") as pool:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            digest = pool.submit(_sha256_of, views) if size >= WORTH_A_THREAD else None
            for left in views:
                while left:
                    left = left[os.write(handle, left) :]
            _inherit(handle, path.parent, 0o664)
            if sync:
                os.fsync(handle)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        finally:
            os.close(handle)
    os.replace(part, path)
    return Receipt(size, digest.result() if digest else _sha256_of(views))


def make(folder: Path, sync: bool = False) -> None:
    """Make a folder and those above it. What is new has the rights of the folder it lies in, whatever the umask.

    So a store that its group may write stays one, whoever extracts. sync: whether new names are durable.
    """
    if folder.is_dir():
        return
    make(folder.parent, sync)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    _inherit(folder, folder.parent, 0o775)
    if sync:
        with contextlib.suppress(PermissionError):  # a folder that may be passed through, not listed
            sync_folder(folder.parent)


def _inherit(new: Path | int, folder: Path, most: int) -> None:
    """Give what is new the rights of its folder, but none to write for everybody. In one like /tmp the umask decides."""
    above, mine = os.stat(folder).st_mode, stat.S_IMODE(os.stat(new).st_mode)
    wanted = (mine & ~0o777) | (above & most) | (mine & 0o700)
    if wanted != mine and not above & stat.S_ISVTX:
        with contextlib.suppress(PermissionError):  # some file systems have rights of their own
            os.chmod(new, wanted)


def _sha256_of(views: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.hexdigest()


def write(path: Path, data: Piece) -> Receipt:
    """Write a whole file so that after a crash it is there with these bytes or not at all; returns its receipt."""
    make(path.parent, sync=True)
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


def now(folder: Path) -> float:
    """The time by the clock of a folder's file system, in seconds. Raises OSError where nothing can be written there."""
    path = folder / f".clock-{secrets.token_hex(4)}"
    try:
        put(path, b"", sync=False)
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a folder and all that is in it, as far as rights go; links are removed, not followed."""
    try:
        with os.scandir(folder) as entries:
            inside = list(entries)
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                remove(Path(entry.path))
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
        os.rmdir(folder)
    except OSError:  # gone meanwhile, or another user's
        pass


def rename(path: Path, target: Path) -> None:
    """Rename a folder. Raises OSError where the target is a folder with something in it: one of several renamers wins."""
    os.rename(path, target)


def link(path: Path, target: Path) -> None:
    """A second name for a file that never changes, or a copy where the file system gives none."""
    make(target.parent)
    try:
        os.link(path, target)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise
    except OSError:  # no such links here, or a file of another user's
        put(target, path.read_bytes())


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
        memo = remembered("digests") / key
        found = _read(memo) if info.st_size >= WORTH_REMEMBERING else ""
        if not re.fullmatch("[0-9a-f]{64}", found):
            found = sha256(path)
            if info.st_size >= WORTH_REMEMBERING:
                with contextlib.suppress(OSError):
                    write(memo, found.encode())
        _seen[key] = found
    return _seen[key]


def remembered(what: str) -> Path:
    """The folder of the user's in which something is remembered from one process to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "readcache" / what


_seen: dict[str, str] = {}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
