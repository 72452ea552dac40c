"""k-NN against scikit-learn's classifier, and the networks of Keras."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from experiments.runtime.interruption import Interrupted
from experiments.stages import classifiers
from experiments.stages.classifiers import Labelled
from experiments.stages.classify import ClassifySettings


def made_up(seed, classes, several, count=40):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (count, classes)) if several else generator.integers(0, classes, count)
    return Labelled(generator.normal(size=(count, 6)), labels)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(1, 6), st.booleans())
def test_neighbours_vote_as_in_scikit_learn_in_any_order(seed, classes, k, several):
    train, test = made_up(seed, classes, several), made_up(seed + 1, classes, several, 15)
    outcome = classifiers.nearest_neighbours(train, test, neighbours=k, classes=classes)
    reference = KNeighborsClassifier(k).fit(train.features, train.labels).predict(test.features)
    predicted = outcome.probabilities > 0.5 if several else outcome.probabilities.argmax(1)
    np.testing.assert_array_equal(predicted, reference)
    order = np.random.default_rng(seed).permutation(len(train.labels))
    turned = Labelled(train.features[order], train.labels[order])
    again = classifiers.nearest_neighbours(turned, test, neighbours=k, classes=classes)
    np.testing.assert_allclose(again.probabilities, outcome.probabilities)


def test_a_class_without_a_neighbour_has_probability_0():
    train = Labelled(np.array([[0.0], [1], [2]]), np.array([0, 2, 2]))
    outcome = classifiers.nearest_neighbours(train, Labelled(np.array([[1.4]]), np.array([1])), neighbours=3, classes=4)
    np.testing.assert_allclose(outcome.probabilities, [[1 / 3, 0, 2 / 3, 0]])


@pytest.fixture(scope="module")
def keras():
    if importlib.util.find_spec("keras") is None:
        pytest.skip("the extra classify-images is not installed")
    return classifiers.import_keras()


@pytest.mark.parametrize("backend", ["nonsense", "torch"])
def test_a_backend_that_is_not_there_is_named(keras, backend):
    """In a process of its own, for the first import decides."""
    if importlib.util.find_spec(backend) is not None:
        pytest.skip(f"{backend} is installed")
    script = "from experiments.stages.classifiers import import_keras; import_keras()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"KERAS_BACKEND": backend}, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert "RunError: classify.classifiers: networks on images need Keras on " + backend in last
    assert last.endswith("KERAS_BACKEND=jax")


def test_a_network_has_the_published_size(keras, monkeypatch):
    # Drawing random weights for every layer would take long, and counting needs none.
    zeros = lambda self, shape, dtype=None, **_: np.zeros(shape, dtype)  # noqa: E731
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)
    assert classifiers.image_model(keras, "resnet50", (32, 32, 1), 2).count_params() == pytest.approx(23.5e6, rel=0.005)


@pytest.mark.parametrize("several", [False, True])
def test_a_keras_model_learns_and_keeps_its_best_epoch(keras, several):
    """A small network in place of the large ones: which half of the image is bright."""
    generator = np.random.default_rng(0)
    left = generator.integers(0, 2, 96)
    images = generator.uniform(0, 0.4, (96, 4, 4, 1)).astype(np.float32)
    images[:, :, :2] += left[:, None, None, None] * 0.6
    images[:, :, 2:] += (1 - left[:, None, None, None]) * 0.6
    labels = np.stack([left, 1 - left], 1) if several else left
    train, val, test = (Labelled(images[rows], labels[rows]) for rows in np.split(np.arange(96), [64, 80]))
    options = dataclasses.replace(ClassifySettings(), epochs=6, batch_size=16, learning_rate=3e-2)
    seen, batches, results = [], [], []
    for _ in range(1 if several else 2):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
        results.append(
            classifiers.fit_keras(
                keras, model, train, val, test,
                settings=options, after_epoch=seen.append, after_batch=lambda: batches.append(len(seen)),
            )
        )  # fmt: skip
    probabilities, accuracy = results[0]
    assert len(seen) == 6 * len(results)
    assert batches[:10] == [0] * 5 + [1] * 5  # four of training and one of validation before each epoch's end
    assert accuracy == max(seen[:6])
    predicted = probabilities > 0.5 if several else probabilities.argmax(1)
    assert np.mean(predicted == test.labels) > 0.9
    np.testing.assert_array_equal(probabilities, results[-1][0])


def test_a_keras_model_can_be_stopped_after_a_batch(keras):
    some = Labelled(np.zeros((8, 4, 4, 1), np.float32), np.zeros(8, int))
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    epochs, options = [], dataclasses.replace(ClassifySettings(), epochs=2, batch_size=2)

    def stop():
        raise Interrupted("asked to")

    with pytest.raises(Interrupted, match="asked to"):
        classifiers.fit_keras(
            keras, model, some, some, some, settings=options, after_epoch=epochs.append, after_batch=stop
        )
    assert epochs == []


def test_small_images_are_padded_and_scaled_as_keras_expects():
    padded = classifiers._as_keras_expects(np.ones((2, 28, 40, 3), np.float32))
    assert padded.shape == (2, 32, 40, 3)
    assert padded[:, 2:30].min() == 255
    assert padded[:, :2].max() == padded[:, 30:].max() == 0
