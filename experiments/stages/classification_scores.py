"""Scores of a classifier, by scikit-learn's definitions; undefined scores are None, never NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import metrics

from medfuncta_jax.datasets.dataset import Task


def scores(labels: np.ndarray, probabilities: np.ndarray, *, task: Task) -> dict[str, Any]:
    """Scores of the predictions for one split.

    Args:
      labels: int [n] in [0, classes), or 0 and 1, [n, classes], where `task` is "multi-label".
      probabilities: [n, classes]; the largest of a row is the prediction, or every label from above 0.5.
      task: the data set's.
    Returns:
      accuracy, macro_f1, balanced_accuracy and auroc (one against the rest), each in [0, 1]. All but accuracy are means
      over classes; accuracy is a mean over labels if there are several. auroc_of_class [classes]. Classes without true
      signals have neither recall nor AUROC and are left out of these means. "ordinal-regression" adds
      mean_absolute_error, in classes, and quadratic_kappa; "multi-label" adds accuracy_of_class [classes].
    """
    classes = range(probabilities.shape[1])
    truth = labels if task == "multi-label" else labels[:, None] == np.arange(len(classes))
    auroc = [
        float(metrics.roc_auc_score(truth[:, c], probabilities[:, c])) if 0 < truth[:, c].sum() < len(truth) else None
        for c in classes
    ]
    if task == "multi-label":
        predicted = (probabilities > 0.5).astype(np.int64)
        result: dict[str, Any] = {
            "accuracy": float(np.mean(predicted == labels)),
            # A label that is neither true nor predicted has no F1.
            "macro_f1": _mean(metrics.f1_score(labels, predicted, average=None, zero_division=np.nan)),
            "balanced_accuracy": _mean([_recall(labels[:, c], predicted[:, c]) for c in classes]),
        }
    else:
        predicted = probabilities.argmax(1)
        result = {
            "accuracy": float(metrics.accuracy_score(labels, predicted)),
            "macro_f1": float(metrics.f1_score(labels, predicted, average="macro")),
            "balanced_accuracy": _recall(labels, predicted),
        }
    result |= {"auroc": _mean(auroc), "auroc_of_class": auroc}
    if task == "multi-label":
        result["accuracy_of_class"] = np.mean(predicted == labels, axis=0).tolist()
    if task == "ordinal-regression":
        result["mean_absolute_error"] = float(metrics.mean_absolute_error(labels, predicted))
        varied = len(np.unique(np.concatenate([labels, predicted]))) > 1
        kappa = metrics.cohen_kappa_score(labels, predicted, weights="quadratic") if varied else None
        result["quadratic_kappa"] = None if kappa is None else float(kappa)
    return result


def _recall(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes with true signals."""
    return float(metrics.recall_score(labels, predicted, labels=np.unique(labels), average="macro"))


def _mean(values: Any) -> float | None:
    """Mean of the values that are defined."""
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None
