"""The chunk files of one array, mapped into memory one behind the other: any rows of any chunks by one numpy indexing.

A row is copied once, from the page cache to where it is wanted, and no Python runs for it. Mapped pages belong to the
files: they are not the process's own memory, and the system takes them back when it needs to. A file that is cut short, or a
disk that fails, while it is mapped ends the process: that is for local disks, and caches are never changed once published.
"""

import ctypes
import errno
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

from store.errors import Refused
from store.layout import CRC_BYTES, Array

MAP_FIXED = 0x10
"""on Linux and macOS; Python's own mmap cannot choose an address"""
MOST_FILES = 30_000
"""that should be mapped at once: Linux gives a process 65,530 mappings, and a file takes two with the gap behind it"""


class Mapped:
    """An array's chunk files as one array of rows. Threads may share it; a forked child may go on with it."""

    def __init__(self, paths: list[Path], array: Array, bad: Callable[[int, str], Exception]) -> None:
        """
        paths: the array's raw chunk files, in order. bad: from a chunk's number and what is wrong with it, what to raise.
        """
        self.array, self.bad = array, bad
        self.size = array.chunk_bytes()
        row = int(np.prod(array.chunks[1:])) * np.dtype(array.dtype).itemsize
        # files begin at pages; begun at a multiple of rows too, all of them are one array of rows, with unused ones in between
        unit = math.lcm(mmap.PAGESIZE, row)
        self.stride = -(-self.size // unit) * unit
        # reserved, then filled in; all of it is given back when the last array on it goes
        self._space = mmap.mmap(-1, self.stride * len(paths), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
        self._bytes = np.frombuffer(self._space, np.uint8)
        for number, path in enumerate(paths):
            self._map(number, path)
        self._rows = self._bytes.view(array.dtype).reshape(-1, *array.chunks[1:])
        self._between = self.stride // row
        self._checked, self._process = np.zeros(len(paths), bool), os.getpid()

    def _map(self, number: int, path: Path) -> None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self.bad(number, "there is no such file") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self.bad(number, "it is a link, and a path may not leave its cache") from None
            raise Refused(f"{path} cannot be read ({error.strerror}); see to its rights and its disk") from None
        try:
            found = os.fstat(handle).st_size
            if found != self.size:  # past a file's end there is no page: touching it ends the process
                raise self.bad(number, f"it has {found} bytes, the manifest says {self.size}")
            wanted = self._bytes.ctypes.data + number * self.stride
            got = _libc.mmap(wanted, self.size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, handle, 0)
            if got != wanted:
                raise Refused(
                    f"{path} cannot be mapped into memory ({os.strerror(ctypes.get_errno())}); read windows of chunks instead: "
                    f"reading.access=windows"
                )
        finally:
            os.close(handle)

    def check(self, chunks: np.ndarray) -> None:
        """Compare chunks with their crc32c, each once in a process. Raises for the first that is damaged."""
        if self._process != os.getpid():  # a forked child trusts what it has seen itself
            self._checked, self._process = np.zeros(len(self._checked), bool), os.getpid()
        for number in np.unique(chunks[~self._checked[chunks]]).tolist():
            data = self._bytes[number * self.stride : number * self.stride + self.size]
            found = google_crc32c.value(data[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little")
            if found != data[-CRC_BYTES:].tobytes():
                raise self.bad(number, f"its crc32c is {found.hex()}, it says {data[-CRC_BYTES:].tobytes().hex()}")
            self._checked[number] = True

    def take(self, rows: np.ndarray, into: np.ndarray) -> None:
        """Copy rows (r,), counted over all chunks, into (r, …). Their chunks are checked first where this is still to be done."""
        chunk, place = np.divmod(rows, self.array.chunks[0])
        self.check(chunk)
        self._rows.take(chunk * self._between + place, 0, into, "clip")  # all are in range, and `clip` spares a buffer


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong]
