"""The compared classifiers: k-NN and the MLP on vectors, Keras's networks on images."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from sklearn.neighbors import NearestNeighbors

from experiments.runtime.run_directory import RunError
from medfuncta_jax.mlp_classifier import fit_mlp
from medfuncta_jax.settings import MlpSettings

# The smallest side of an image that Keras's ResNet50 and EfficientNet accept.
_LEAST_SIDE = 32

IMAGE_NETWORKS = {"resnet50": "ResNet50", "efficientnet_b0": "EfficientNetB0"}


@dataclass(frozen=True)
class Labelled:
    """Vectors [n, F], or images [n, H, W, D] in [0, 1], and their labels, int [n], or 0 and 1, [n, classes]."""

    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """The result of one classifier.

    Attributes:
      probabilities: [n, classes], of the test split.
      seconds: time of training and prediction.
      parameters: number of trained parameters.
      val_accuracy: validation accuracy of the kept epoch, in [0, 1]; None if none was chosen.
    """

    probabilities: np.ndarray
    seconds: float
    parameters: int = 0
    val_accuracy: float | None = None


def nearest_neighbours(train: Labelled, test: Labelled, *, neighbours: int, classes: int) -> Outcome:
    """The labels of the `neighbours` nearest training vectors (Euclidean), each with one vote.

    The result equals scikit-learn's KNeighborsClassifier, with probabilities also for several labels and for classes
    without training vectors.
    """
    began = time.monotonic()
    search = NearestNeighbors(n_neighbors=neighbours).fit(train.features)
    nearest = search.kneighbors(test.features, return_distance=False)  # [n, neighbours]
    votes = train.labels if train.labels.ndim == 2 else np.eye(classes)[train.labels]  # [m, classes]
    return Outcome(votes[nearest].mean(1), time.monotonic() - began)


def mlp(
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    classes: int,
    seed: int,
    normalise: Literal["none", "scale", "standardise"],
    settings: MlpSettings,
    after_epoch: Callable[[float], None],
) -> Outcome:
    """`medfuncta_jax.fit_mlp` with the key of a seed."""
    began = time.monotonic()
    fit = fit_mlp(
        train.features, train.labels, val.features, val.labels,
        classes=classes, key=jax.random.key(seed), normalise=normalise, settings=settings, after_epoch=after_epoch,
    )  # fmt: skip
    probabilities = fit.probabilities(test.features)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(fit.params))
    return Outcome(probabilities, time.monotonic() - began, parameters, float(fit.val_accuracy.max()))


def image_network(
    name: str,
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    classes: int,
    seed: int,
    settings: MlpSettings,
    after_epoch: Callable[[float], None],
    after_batch: Callable[[], None],
) -> Outcome:
    """One of Keras's networks (a key of IMAGE_NETWORKS) from random weights, trained like the MLP.

    Raises:
      RunError: as `import_keras`.
    """
    keras = import_keras()
    began = time.monotonic()
    keras.utils.set_random_seed(seed)
    keras.backend.clear_session()
    splits = [Labelled(_as_keras_expects(split.features), split.labels) for split in (train, val, test)]
    model = image_model(keras, name, splits[0].features.shape[1:], classes)
    probabilities, accuracy = fit_keras(
        keras, model, *splits, settings=settings, after_epoch=after_epoch, after_batch=after_batch
    )
    return Outcome(probabilities, time.monotonic() - began, model.count_params(), accuracy)


def image_model(keras: Any, name: str, shape: tuple[int, ...], classes: int) -> Any:
    """The untrained network for images of `shape`, [H, W, D], with logits as its output."""
    network = getattr(keras.applications, IMAGE_NETWORKS[name])
    return network(weights=None, input_shape=shape, classes=classes, classifier_activation=None)


def fit_keras(
    keras: Any,
    model: Any,
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    settings: MlpSettings,
    after_epoch: Callable[[float], None],
    after_batch: Callable[[], None],
) -> tuple[np.ndarray, float]:
    """Train a Keras model of logits and keep its best epoch; returns test probabilities and validation accuracy.

    `after_epoch` is called with the validation accuracy of every epoch, `after_batch` after every batch of training and
    validation; either may raise, which ends the training.
    """
    several = train.labels.ndim == 2

    class Best(keras.callbacks.Callback):
        """Holds the weights of the first epoch with the best validation accuracy."""

        accuracy, weights = -1.0, None

        def on_train_batch_end(self, batch, logs=None):
            after_batch()

        on_test_batch_end = on_train_batch_end

        def on_epoch_end(self, epoch, logs=None):
            if logs["val_accuracy"] > self.accuracy:
                # Weights are copied, because the next step overwrites the buffers.
                weights = [np.array(keras.ops.convert_to_numpy(w.value)) for w in self.model.weights]
                self.accuracy, self.weights = logs["val_accuracy"], weights
            after_epoch(logs["val_accuracy"])

    losses, metrics = keras.losses, keras.metrics
    model.compile(
        optimizer=keras.optimizers.AdamW(settings.learning_rate, weight_decay=settings.weight_decay),
        loss=losses.BinaryCrossentropy(from_logits=True) if several
        else losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            metrics.BinaryAccuracy("accuracy", threshold=0.0) if several
            else metrics.SparseCategoricalAccuracy("accuracy")
        ],
    )  # fmt: skip
    best = Best()
    model.fit(
        train.features, train.labels, validation_data=(val.features, val.labels),
        batch_size=settings.batch_size, epochs=settings.epochs, callbacks=[best], verbose=0,
    )  # fmt: skip
    model.set_weights(best.weights)
    logits = model.predict(test.features, batch_size=settings.batch_size, verbose=0)
    return np.asarray(jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits)), float(best.accuracy)


def import_keras() -> Any:
    """Keras, on JAX unless the variable KERAS_BACKEND names another backend; the first import decides.

    Raises:
      RunError: Keras or its backend is not installed.
    """
    backend = os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        import keras
    except (ImportError, ValueError) as error:  # the latter for a backend that Keras does not know
        raise RunError(
            f"classify.classifiers: networks on images need Keras on {backend} ({error}); "
            "pip install 'medfuncta_jax[classify-images]' brings Keras on JAX, KERAS_BACKEND=jax"
        ) from error
    return keras


def _as_keras_expects(images: np.ndarray) -> np.ndarray:
    """[0, 1] to [0, 255], and small images padded with zeros to the least side."""
    missing = [max(0, _LEAST_SIDE - side) for side in images.shape[1:3]]
    edges = [(0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)]
    return np.pad(np.multiply(images, np.float32(255)), edges)
