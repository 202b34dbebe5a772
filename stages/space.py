"""Memory to read and decode into, used again once nobody holds it: fresh memory costs about as much as what is read into it."""

import contextlib
import mmap
import sys
import threading

import numpy as np
import torch
from torch import Tensor


class Space:
    """Gives tensors to read into. Threads may share it."""

    def __init__(self, most: int, pinned: bool, slack: int = 2) -> None:
        """most: buffers that are kept to be used again. pinned: for copies to a GPU; torch itself uses pinned memory again.

        slack: how many times as large as asked for they are made, for what comes next and is larger; what is not touched takes
        no memory.
        """
        self.most, self.pinned, self.slack = most, pinned, slack
        self._lock = threading.Lock()
        self._kept: list[np.ndarray] = []

    def __call__(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor on the host, its numbers anything. dtype: as numpy has it."""
        if self.pinned:
            return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return torch.from_numpy(self._bytes(size)[:size].view(dtype).reshape(shape))

    def _bytes(self, size: int) -> np.ndarray:
        with self._lock:
            # free is what only this list holds (and the call that counts): every view holds on to what it is of
            free = [number for number in range(len(self._kept)) if sys.getrefcount(self._kept[number]) == 2]
            large = [number for number in free if size <= len(self._kept[number])]
            if large:
                return self._kept[min(large, key=lambda number: len(self._kept[number]))]
            if free and len(self._kept) >= self.most:  # too small by now: make room
                del self._kept[free[0]]
            made = _mapped(self.slack * size)
            if len(self._kept) < self.most:
                self._kept.append(made)
            return made


def _mapped(size: int) -> np.ndarray:
    """Fresh memory: mapped, since an allocator would keep what is let go; private, so that a forked worker has its own."""
    made = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a system that has none, or a kernel
        made.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(made, np.uint8)
