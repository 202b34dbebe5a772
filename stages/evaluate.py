"""What heads say of the examples of a loader."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.heads import Batch, Head
from stages.loader import Loader
from stages.metrics import scores
from stages.stack import Stack
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


def outputs(head: Head, logits: Tensor) -> Tensor:
    """Logits (…, K) as probabilities; a regressor's predictions as they are."""
    return logits if head.regression else logits.softmax(-1)


def say(head: Head, loader: Loader) -> Said:
    """Run a head over a loader, in order, without dropout."""
    head.eval()
    return _hear([lambda batch: outputs(head, head(batch))[None]], loader)[0][0]


def say_all(stacks: Sequence[Stack], loader: Loader) -> list[list[Said]]:
    """The same of all heads of several stacks, from one pass."""
    return _hear([lambda batch, stack=stack: outputs(stack.like, stack.logits(batch)) for stack in stacks], loader)  # type: ignore[misc]


def _hear(speakers: Sequence[Callable[[Batch], Tensor]], loader: Loader) -> list[list[Said]]:
    """speakers: from a batch to (M, B, K)."""
    n, done = len(loader), 0
    place, labels = np.empty(n, np.int64), np.empty(n, loader.labels.dtype)
    said: list[np.ndarray] = []  # (n, M, K) each, made once: small pieces that stay keep an allocator from using large ones again
    with torch.inference_mode():
        for batch in loader.in_order():
            here = slice(done, done + len(batch.labels))
            parts = [speak(batch).transpose(0, 1).cpu().numpy() for speak in speakers]
            said = said or [np.empty((n, *part.shape[1:]), part.dtype) for part in parts]
            place[here], labels[here] = batch.place.numpy(), batch.labels.cpu().numpy()
            for whole, part in zip(said, parts, strict=True):
                whole[here] = part
            done = here.stop
    assert done == n, (done, n)
    return [[Said(place, whole[:, head], labels) for head in range(whole.shape[1])] for whole in said]


def score(task: Task, said: Said, labels: np.ndarray | None = None) -> dict[str, float]:
    """The task's metrics. labels: (N,) of all examples of the cache, where they are not the loader's."""
    return scores(task.metrics, said.predicted, said.labels if labels is None else labels[said.place])
