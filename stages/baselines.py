"""What READ must beat: the majority class and a linear probe on the backbone's own final state, from the same cache."""

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


def majority(task: Task, train: np.ndarray, count: int) -> np.ndarray:
    """What one would say without looking (count,): the most frequent class, or the mean."""
    if task.kind == "regression":
        return np.full(count, train.mean(), np.float32)
    return np.full(count, np.bincount(train).argmax(), np.int64)


def features(loader: Loader, pool: str, depths: Depths) -> tuple[np.ndarray, np.ndarray]:
    """The final state of every example, pooled without training: (n, D) float32, and labels (n,)."""
    found, labels = [], []
    plain = Pool("mean" if pool == "attention" else pool, 0)
    for batch in loader.in_order():
        states = batch.rows if batch.decoder is None else batch.decoder
        found.append(plain(states[:, depths.final], batch).cpu())
        labels.append(batch.labels.cpu())
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def linear_probe(
    task: Task, train: tuple[np.ndarray, np.ndarray], choose: tuple[np.ndarray, np.ndarray], *others: np.ndarray
) -> list[np.ndarray]:
    """Logistic or ridge regression on standardised features (n, D); predictions (m,) for each of the others.

    Regularisation is what scores best on `choose`.
    """
    scaler = StandardScaler().fit(train[0])
    fitted = []
    for strength in STRENGTHS:
        model = Ridge(alpha=1 / strength) if task.kind == "regression" else LogisticRegression(C=strength, max_iter=300, tol=1e-3)
        model.fit(scaler.transform(train[0]), train[1])
        score = scores(task.metrics[:1], model.predict(scaler.transform(choose[0])), choose[1])[task.metrics[0]]
        fitted.append((score, model))
    best = max(fitted, key=lambda item: item[0])[1]
    return [best.predict(scaler.transform(other)) for other in others]


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
