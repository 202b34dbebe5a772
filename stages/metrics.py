"""GLUE's metrics, under its names. Sole home of scikit-learn's and scipy's scores."""

import math
from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn import metrics


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Of class 1 where there are two classes, as GLUE has it; otherwise the mean over classes."""
    if max(predicted.max(), labels.max()) > 1:
        return float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
    return float(metrics.f1_score(labels, predicted, zero_division=0))


def _correlation(measure: Callable[..., tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(predicted: np.ndarray, labels: np.ndarray) -> float:
        # undefined for a constant, which has learned nothing: 0
        if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(measure(predicted, labels)[0])

    return score


SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predicted, labels: float(metrics.accuracy_score(labels, predicted)),
    "f1": _f1,
    "matthews_correlation": _correlation(lambda predicted, labels: (metrics.matthews_corrcoef(labels, predicted), 0.0)),
    "pearson": _correlation(lambda predicted, labels: stats.pearsonr(predicted.astype(np.float64), labels)),
    "spearmanr": _correlation(stats.spearmanr),
}


def scores(names: tuple[str, ...], predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Each named metric of predictions (n,) against labels (n,): class numbers, or numbers."""
    return {name: SCORES[name](predicted, labels) for name in names}


def paired(one: np.ndarray, two: np.ndarray) -> tuple[float, float, float]:
    """Of paired scores (n,): mean difference, its standard error, p of a two-sided t-test. No difference at all: p = 1."""
    apart = one - two
    if not apart.any():
        return 0.0, 0.0, 1.0
    error = float(apart.std(ddof=1)) / math.sqrt(len(apart))
    p = float(2 * stats.t.sf(abs(apart.mean()) / error, len(apart) - 1)) if error else 0.0
    return float(apart.mean()), error, p
