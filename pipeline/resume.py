"""Training that goes on where it was killed: what is kept between epochs, in one safetensors file of the store.

<root>/training/<key>.safetensors       gone once the heads are saved as runs
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from stages.standing import Standing
from store import files

SECONDS = 60.0
"""between two times that a standing is kept, at least, in seconds"""


class Resume:
    """Keeps the standing of one pass."""

    def __init__(self, root: Path, key: str, told: Callable[[str], None]) -> None:
        """key: of all that fixes the heads of the pass, and where they end. told: of what could not be kept."""
        self.path = root / "training" / f"{key}.safetensors"
        self.kept = time.monotonic()
        self.told = told

    def load(self) -> Standing | None:
        """What was kept, if it is whole."""
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                found = Standing(json.loads(file.metadata()["numbers"]), tensors)
                return found if file.metadata()["digest"] == _digest(found) else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def due(self) -> bool:
        """Whether it is time to keep one again."""
        return time.monotonic() - self.kept >= SECONDS

    def save(self, standing: Standing) -> None:
        """Keep it, in place of the one before; where that cannot be, training goes on without."""
        told = {"numbers": json.dumps(standing.numbers), "digest": _digest(standing)}
        try:
            files.write(self.path, safetensors.torch.save(standing.tensors, told))
        except OSError as error:
            self.told(f"where this training stands could not be kept under {self.path.parent} ({error.strerror}); it goes on")
        self.kept = time.monotonic()

    def done(self) -> None:
        """The heads are saved."""
        self.path.unlink(missing_ok=True)


def _digest(standing: Standing) -> str:
    digest = hashlib.sha256(json.dumps(standing.numbers).encode())
    for name, value in sorted(standing.tensors.items()):
        digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
