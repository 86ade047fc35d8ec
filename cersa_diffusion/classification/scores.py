"""The metrics of GLUE, computed from the outputs of a model and the labels.

Classification takes logits of shape (examples, classes) and class numbers of shape (examples,).
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Share of the examples whose class is predicted correctly, in [0, 1]."""
    return float(accuracy_score(labels, outputs.argmax(axis=-1)))


def matthews(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of the predicted and the true classes, in [-1, 1]; 0 if one class is predicted for all examples."""
    return float(matthews_corrcoef(labels, outputs.argmax(axis=-1)))


def pearson(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation, in [-1, 1]; 0 if all predictions or all labels are equal, or if there is only one example.

    Args:
        outputs: (examples,) or (examples, 1) predicted numbers.
        labels: (examples,) true numbers.
    """
    predictions = np.asarray(outputs, dtype=np.float64).reshape(-1)
    labels = np.asarray(labels, dtype=np.float64)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(pearsonr(predictions, labels).statistic)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"accuracy": accuracy, "matthews": matthews, "pearson": pearson}
