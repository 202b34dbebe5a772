"""What READ must beat: the majority class and a linear probe on the backbone's own final state, from the same cache."""

import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from stages.depths import Depths
from stages.heads import Pool
from stages.loader import Loader
from stages.metrics import scores
from stages.tasks import Task

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""inverse regularisation of the probe; the part that chooses READ's epoch chooses among them too"""

BLOCK = 4096
"""examples that are standardised at a time"""


def majority(task: Task, train: np.ndarray, count: int) -> np.ndarray:
    """What one would say without looking (count,): the most frequent class, or the mean."""
    if task.kind == "regression":
        return np.full(count, train.mean(), np.float32)
    return np.full(count, np.bincount(train).argmax(), np.int64)


def features(loader: Loader, pool: str, depths: Depths) -> tuple[np.ndarray, np.ndarray]:
    """The final state of every example, pooled without training: (n, D) float32 in a temporary file, mapped, and labels (n,).

    So memory does not grow with the cache.
    """
    with tempfile.TemporaryFile() as file:  # goes when it is let go
        if hasattr(os, "posix_fallocate"):  # a disk that is full says so now: where a mapped page has no place, the process ends
            os.posix_fallocate(file.fileno(), 0, max(1, len(loader) * loader.cache.width * 4))
        found = np.memmap(file, np.float32, "w+", shape=(len(loader), loader.cache.width))
    labels, done = [], 0
    plain = Pool("mean" if pool == "attention" else pool, 0)
    for batch in loader.in_order():
        states = batch.rows if batch.decoder is None else batch.decoder
        found[done : done + len(batch.labels)] = plain(states[:, depths.final], batch).cpu().numpy()
        labels.append(batch.labels.cpu())
        done += len(batch.labels)
    return found, torch.cat(labels).numpy()


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(values), BLOCK):
        yield values[begin : begin + BLOCK]


def linear_probe(
    task: Task, train: tuple[np.ndarray, np.ndarray], choose: tuple[np.ndarray, np.ndarray], *others: np.ndarray
) -> list[np.ndarray]:
    """Logistic or ridge regression on features (n, D), which are standardised in place; predictions (m,) for each of the others.

    Regularisation is what scores best on `choose`.
    """
    scaler = StandardScaler(copy=False)
    for block in _blocks(train[0]):
        scaler.partial_fit(block.copy())
    for values in (train[0], choose[0], *others):
        for block in _blocks(values):
            block[:] = scaler.transform(block.copy())
    fitted = []
    for strength in STRENGTHS:
        if task.kind == "regression":
            model = Ridge(alpha=1 / strength, copy_X=False)  # it takes off the mean, which is 0
        else:
            model = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
        model.fit(train[0], train[1])
        score = scores(task.metrics[:1], model.predict(choose[0]), choose[1])[task.metrics[0]]
        fitted.append((score, model))
    best = max(fitted, key=lambda item: item[0])[1]
    return [best.predict(other) for other in others]


def beside(
    task: Task, fit: Loader, choose: Loader, others: dict[str, Loader], pool: str, depths: Depths
) -> dict[str, dict[str, dict[str, float]]]:
    """The scores of both on other splits: {majority | linear_probe: {split: {metric: value}}}."""
    train, chosen = features(fit, pool, depths), features(choose, pool, depths)
    seen = {split: features(loader, pool, depths) for split, loader in others.items()}
    guesses = linear_probe(task, train, chosen, *(inputs for inputs, _ in seen.values()))
    return {
        "majority": {s: scores(task.metrics, majority(task, train[1], len(y)), y) for s, (_, y) in seen.items()},
        "linear_probe": {s: scores(task.metrics, g, y) for (s, (_, y)), g in zip(seen.items(), guesses, strict=True)},
    }
