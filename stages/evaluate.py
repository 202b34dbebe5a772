"""What a head says of the examples of a loader."""

from typing import NamedTuple

import numpy as np
import torch

from stages.heads import Head
from stages.loader import Loader
from stages.metrics import scores
from stages.tasks import Task


class Said(NamedTuple):
    """A head's word on n examples."""

    place: np.ndarray
    """(n,) the examples' places in the cache"""
    outputs: np.ndarray
    """(n, K) probabilities, or (n, 1) predictions in the labels' unit"""
    labels: np.ndarray
    """(n,) the truth"""

    @property
    def predicted(self) -> np.ndarray:
        """(n,) class numbers, or numbers."""
        return self.outputs[:, 0] if self.outputs.shape[1] == 1 else self.outputs.argmax(1)


def outputs(head: Head, logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) as probabilities; a regressor's predictions as they are."""
    return logits if head.regression else logits.softmax(1)


def say(head: Head, loader: Loader) -> Said:
    """Run a head over a loader, in order, without dropout."""
    head.eval()
    said, done = None, 0
    with torch.inference_mode():
        for batch in loader.in_order():
            parts = [part.cpu().numpy() for part in (batch.place, outputs(head, head(batch)), batch.labels)]
            if said is None:  # room for all at once: small pieces that stay would keep an allocator from using large ones again
                said = Said(*(np.empty((len(loader), *part.shape[1:]), part.dtype) for part in parts))
            for whole, part in zip(said, parts, strict=True):
                whole[done : done + len(part)] = part
            done += len(batch.labels)
    assert said is not None and done == len(loader), (done, len(loader))
    return said


def score(task: Task, said: Said) -> dict[str, float]:
    """The task's metrics."""
    return scores(task.metrics, said.predicted, said.labels)
