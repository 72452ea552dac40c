"""Scores against scikit-learn's own summaries where those are defined, and None where they are not."""

import numpy as np
import pytest
from sklearn import metrics

from experiments.stages.classification_scores import scores


def made_up(classes, count=200, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    probabilities = generator.dirichlet(np.ones(classes), count) + 0.3 * np.eye(classes)[labels]
    return labels, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_one_class_a_signal(classes):
    labels, probabilities = made_up(classes)
    result = scores(labels, probabilities, task="multi-class")
    predicted = probabilities.argmax(1)
    assert result["accuracy"] == metrics.accuracy_score(labels, predicted)
    assert result["macro_f1"] == metrics.f1_score(labels, predicted, average="macro")
    assert result["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    own = {"y_score": probabilities[:, 1]} if classes == 2 else {"y_score": probabilities, "multi_class": "ovr"}
    assert result["auroc"] == pytest.approx(metrics.roc_auc_score(labels, **own))
    assert "quadratic_kappa" not in result


def test_several_labels_a_signal():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, (100, 4))
    probabilities = np.clip(0.4 * labels + generator.uniform(0, 0.7, (100, 4)), 0, 1)
    predicted = (probabilities > 0.5).astype(int)
    result = scores(labels, probabilities, task="multi-label")
    assert result["auroc"] == pytest.approx(metrics.roc_auc_score(labels, probabilities, average="macro"))
    assert result["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    each = [metrics.accuracy_score(labels[:, c], predicted[:, c]) for c in range(4)]
    assert result["accuracy_of_class"] == pytest.approx(each)
    assert result["accuracy"] == pytest.approx(np.mean(each))
    balanced = [metrics.balanced_accuracy_score(labels[:, c], predicted[:, c]) for c in range(4)]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(balanced))


def test_ordered_classes():
    labels, probabilities = made_up(5)
    predicted = probabilities.argmax(1)
    result = scores(labels, probabilities, task="ordinal-regression")
    assert result["mean_absolute_error"] == pytest.approx(np.abs(labels - predicted).mean())
    # Cohen 1968: one minus the ratio of squared disagreement to that of independent raters.
    chance = ((labels[:, None] - predicted[None, :]) ** 2).mean()
    assert result["quadratic_kappa"] == pytest.approx(1 - ((labels - predicted) ** 2).mean() / chance)


def test_a_class_absent_from_the_split_leaves_the_others():
    labels, probabilities = made_up(3)
    kept = labels != 2
    result = scores(labels[kept], probabilities[kept], task="multi-class")
    assert result["auroc_of_class"][2] is None
    assert result["auroc"] == pytest.approx(np.mean(result["auroc_of_class"][:2]))
    recalls = [np.mean(probabilities[labels == c].argmax(1) == c) for c in (0, 1)]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(recalls))


@pytest.mark.parametrize("task", ["binary-class", "ordinal-regression", "multi-label"])
def test_what_is_not_defined_is_none(task):
    certain = np.tile([0.9, 0.1], (5, 1))
    labels = np.zeros((5, 2), int) if task == "multi-label" else np.zeros(5, int)
    result = scores(labels, certain, task=task)
    assert result["auroc"] is None
    assert result["accuracy"] == (0.5 if task == "multi-label" else 1.0)
    if task == "ordinal-regression":
        assert result["quadratic_kappa"] is None
    if task == "multi-label":  # the second label is neither there nor predicted
        assert result["macro_f1"] == 0.0
