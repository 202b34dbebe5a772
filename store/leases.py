"""Who is at work on a cache: advice for people and for `gc`, renewed by a heartbeat. Nothing that is published depends on it.

    <root>/leases/<fingerprint>/extract.json      who extracts it
    <root>/leases/<fingerprint>/<unique>.json     who reads it, or mends it; in an object store too

How old one is, is told by the clock of the file system, or object store, it lies in: those of machines may differ by a day.
"""

import contextlib
import getpass
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from store import files
from store.bucket import SCHEME, Bucket
from store.errors import Refused
from store.objects import Folder

BEAT = 5.0
"""between two heartbeats, in seconds"""
EXPIRES = 60.0
"""without a heartbeat for so long a holder is taken for gone, in seconds"""
FAR_BEAT, FAR_EXPIRES = 300.0, 1800.0
"""the same in an object store, where every heartbeat is a request"""
MOST = 1 << 16
"""of what a lease says, in bytes"""
EXTRACT = "extract.json"


class Holder(NamedTuple):
    """Who holds a lease."""

    who: str
    """user@host"""
    process: str
    """as `process` gives it"""
    age: float
    """since the last heartbeat, in seconds by the store's clock"""
    done: int = 0
    total: int = 0

    @property
    def alive(self) -> bool:
        """Whether it is to be taken for at work."""
        return self.age < EXPIRES and not gone(self.process)


def process() -> str:
    """This process, so that others on its machine can tell whether it is still there: boot, pid namespace, pid, start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getpid()} {_started(os.getpid())}"
    except OSError:  # no Linux
        return f"- - {os.getpid()} -"


def _started(pid: int) -> str:
    # the name, second, may hold spaces and brackets
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def gone(told: str) -> bool:
    """Whether a process is known to be gone: only one of this very machine and namespace can be."""
    try:
        boot, space, pid, started = told.split()
        if [boot, space] != process().split()[:2] or boot == "-":
            return False
        os.kill(int(pid), 0)
        return _started(int(pid)) != started
    except ProcessLookupError:
        return True
    except (ValueError, IndexError, OSError):  # another user's, or one that we may not see
        return False


def me() -> dict[str, Any]:
    """Who we are, as a lease says it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a number without a name, in a container
        user = str(os.getuid())
    return {"who": f"{user}@{socket.gethostname()}", "process": process()}


def read(path: Path, clock: float | None = None) -> Holder | None:
    """Who holds a lease; None where it is not there. One that cannot be read is held, by whom is not known.

    clock: the time by the folder's clock, asked for where left out.
    """
    folder = Folder(path.parent)
    try:
        written = os.stat(path, follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return None
    except OSError:
        return Holder("somebody", "", 0.0)
    age = (folder.now() if clock is None else clock) - written
    try:
        return _holder(folder.read(path.name, MOST), age)
    except FileNotFoundError:  # taken back just now, or no file
        return Holder("somebody", "", age) if path.exists() else None
    except (OSError, ValueError):
        return Holder("somebody", "", age)


def _holder(text: bytes, age: float) -> Holder:
    try:
        told = json.loads(text)
        return Holder(str(told["who"]), str(told["process"]), age, int(told.get("done", 0)), int(told.get("total", 0)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return Holder("somebody", "", age)  # just taken, and nothing is said yet


class Lease:
    """Some files, or objects, that say who is at work here, kept fresh by a thread until it is closed."""

    def __init__(self, *places: Path | str, needed: Path | None = None) -> None:
        """places: files, and addresses s3://…. needed: a file that must be written; raises OSError where it cannot be."""
        self.told = me() | {"id": secrets.token_hex(8)}
        self.paths = [place for place in places if isinstance(place, Path)]
        self.far = [place for place in places if isinstance(place, str)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if needed:
            files.put(needed, self._text(), sync=False)
            self.paths.insert(0, needed)
        self.write()
        self._write_far()
        self._thread.start()

    def _text(self) -> bytes:
        return json.dumps(self.told).encode()

    def write(self) -> None:
        """Say it, in all files; where that fails, it was advice only."""
        for path in self.paths:
            with contextlib.suppress(OSError):
                files.put(path, self._text(), sync=False)

    def _write_far(self) -> None:
        self._said = time.monotonic()
        for address in self.far:
            with contextlib.suppress(Refused):
                root, _, name = address.rpartition("/")
                Bucket(root).put(name, self._text())

    def mine(self, path: Path) -> bool:
        """Whether a file still says what we wrote, as far as can be told."""
        try:
            return bool(json.loads(Folder(path.parent).read(path.name, MOST)).get("id") == self.told["id"])
        except FileNotFoundError:
            return False
        except OSError:  # no handles left, a disk that is away for a moment
            return True
        except (ValueError, AttributeError, RecursionError):
            return False

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self.paths = [path for path in self.paths if self.mine(path)]  # what another has taken over is its own
            self.write()
            if self.far and time.monotonic() - self._said >= FAR_BEAT:
                self._write_far()

    def close(self, keep: Path | None = None) -> None:
        """Take it back. keep: a file that stays, and is too old to be believed."""
        self._over.set()
        self._thread.join()
        for path in self.paths:
            with contextlib.suppress(OSError):
                if path == keep:
                    os.utime(path, (0, 0))  # a disk that is full can still do that
                elif self.mine(path):
                    path.unlink()
                    path.parent.rmdir()
        for address in self.far:
            with contextlib.suppress(Refused):
                root, _, name = address.rpartition("/")
                Bucket(root).delete([name])


def take(root: Path, fingerprint: str) -> Path | None:
    """The lease to extract a cache, if nobody has it or its holder is gone; None where somebody is at work.

    Raises OSError where leases cannot be written.
    """
    path = root / "leases" / fingerprint / EXTRACT
    for _ in range(2):
        files.make(path.parent)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o664))
            return path
        except FileExistsError:
            holder = read(path)
            if holder and holder.alive:
                return None
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        except FileNotFoundError:  # its folder went with the lease before
            continue
    return None


@contextmanager
def using(*caches: Path | str) -> Iterator[None]:
    """Say that published caches are in use while this goes on, where that can be said. caches: <root>/caches/<fingerprint>."""
    unique = secrets.token_hex(8)
    places: list[Path | str] = []
    for where in caches:
        if isinstance(where, Path):
            places.append(where.parent.parent / "leases" / where.name / f"{unique}.json")
        elif where.startswith(SCHEME):
            root, _, fingerprint = where.rsplit("/", 2)
            places.append(f"{root}/leases/{fingerprint}/{unique}.json")
    lease = Lease(*places)
    try:
        yield
    finally:
        lease.close()


def sweep(root: Path, clock: float) -> None:
    """Remove the leases of those that are gone. clock: the time by the root's clock."""
    for path in (root / "leases").glob("*/*.json"):
        holder = read(path, clock)
        if holder and not holder.alive:
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()


def held(root: Path | str, clock: float) -> dict[str, list[Holder]]:
    """Fingerprint -> who is at work on it. clock: the time by the root's clock. Raises OSError where that cannot be told."""
    found: dict[str, list[Holder]] = {}
    if isinstance(root, str):
        bucket = Bucket(root)
        for place, about in bucket.listing("leases/").items():
            if clock - about.written < FAR_EXPIRES and place.count("/") == 2:
                age = clock - about.written
                try:
                    holder = _holder(bucket.read(place, MOST), age)
                except FileNotFoundError:
                    continue
                except ValueError:
                    holder = Holder("somebody", "", age)
                found.setdefault(place.split("/")[1], []).append(holder)
        return found
    for place in Folder(root).listing("leases/"):
        near = read(root / place, clock)
        if near and near.alive and place.count("/") == 2:
            found.setdefault(place.split("/")[1], []).append(near)
    return found
