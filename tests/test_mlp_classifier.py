"""The MLP against an independent statement of it in numpy, and what it must be able to learn."""

import dataclasses

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.mlp_classifier import Mlp
from medfuncta_jax.settings import MlpSettings

SMALL = MlpSettings(hidden=(32, 16), epochs=60, batch_size=32, learning_rate=1e-2)


def parameters(features, classes, hidden):
    shapes = jax.eval_shape(Mlp(hidden, classes).init, jax.random.key(0), np.zeros((1, features), np.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("classes", [2, 7])
def test_parameters_are_those_of_the_text_and_not_of_the_table(classes):
    """The paper writes 1024 and 512 units and 1.2e6 parameters, which are those of 512 and 256."""
    assert MlpSettings().hidden == (1024, 512)
    assert parameters(2048, classes, (1024, 512)) == 2048 * 1024 + 1024 + 1024 * 512 + 512 + 512 * classes + classes
    assert round(parameters(2048, classes, (1024, 512)) / 1e6, 1) == 2.6
    assert round(parameters(2048, classes, (512, 256)) / 1e6, 1) == 1.2


def xor(count, seed, scale=1.0):
    """Four clusters whose opposite corners belong together: no linear classifier is better than chance."""
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1, 1], (count, 2))
    return scale * (signs + 0.3 * generator.normal(size=(count, 2))), (signs.prod(1) > 0).astype(int)


def dense(params, inputs):
    """Logits in float64, and the inputs of every layer."""
    layers = [(np.float64(params[f"Dense_{i}"]["kernel"]), np.float64(params[f"Dense_{i}"]["bias"])) for i in range(3)]
    seen = [np.float64(inputs)]
    for kernel, bias in layers[:2]:
        seen.append(np.maximum(seen[-1] @ kernel + bias, 0))
    return seen[-1] @ layers[2][0] + layers[2][1], seen, layers


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_learns_what_is_not_linear_at_any_scale_and_predicts_as_numpy_does(scale):
    train, val, test = (xor(count, seed, scale) for seed, count in enumerate((200, 100, 100)))
    fit = mf.fit_mlp(*train, *val, classes=2, key=jax.random.key(0), settings=SMALL)
    probabilities = fit.probabilities(test[0])
    assert np.mean(probabilities.argmax(1) == test[1]) > 0.95
    logits = dense(fit.params, (test[0] - train[0].mean(0)) / train[0].std(0))[0]
    np.testing.assert_allclose(probabilities, softmax(logits), atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_training_is_adamw_on_the_cross_entropy_of_all_signals(several):
    """Two epochs of batches of 8, the last of 3, against backpropagation and AdamW written out in numpy."""
    generator, rate, decay = np.random.default_rng(1), 1e-3, 0.1
    features = generator.normal(size=(19, 5)).astype(np.float32)
    labels = generator.integers(0, 2, (19, 3)) if several else generator.integers(0, 3, 19)
    targets = labels if several else np.eye(3)[labels]
    settings = dataclasses.replace(SMALL, epochs=2, batch_size=8, dropout=0.0, learning_rate=rate, weight_decay=decay)
    key = jax.random.key(3)
    fit = mf.fit_mlp(features, labels, features, labels, classes=3, key=key, normalise="none", settings=settings)

    start, order = jax.random.split(key)
    params = jax.tree.map(np.float64, Mlp((32, 16), 3).init(start, features[:1])["params"])
    moments = jax.tree.map(lambda leaf: np.zeros((2, *leaf.shape)), params)
    step, accuracies, epochs = 0, [], []
    for epoch in range(2):
        rows = np.asarray(jax.random.permutation(jax.random.split(jax.random.fold_in(order, epoch))[0], 19))
        for batch in (rows[:8], rows[8:16], rows[16:]):
            step += 1
            logits, seen, layers = dense(params, features[batch])
            probabilities = 1 / (1 + np.exp(-logits)) if several else softmax(logits)
            slope = (probabilities - targets[batch]) / len(batch) / (3 if several else 1)
            for i in (2, 1, 0):
                gradients = {"kernel": seen[i].T @ slope, "bias": slope.sum(0)}
                slope = slope @ layers[i][0].T * (seen[i] > 0)
                for name, gradient in gradients.items():
                    leaf, m = params[f"Dense_{i}"], moments[f"Dense_{i}"][name]
                    m[0] = 0.9 * m[0] + 0.1 * gradient
                    m[1] = 0.999 * m[1] + 0.001 * gradient**2
                    change = m[0] / (1 - 0.9**step) / (np.sqrt(m[1] / (1 - 0.999**step)) + 1e-8)
                    leaf[name] = leaf[name] - rate * (change + decay * leaf[name])
        logits = dense(params, features)[0]
        accuracies.append(np.mean((logits > 0) == labels if several else logits.argmax(1) == labels))
        epochs.append(jax.tree.map(np.copy, params))
    np.testing.assert_allclose(fit.val_accuracy, accuracies)
    assert fit.epoch == 1 + int(np.argmax(accuracies))
    # A gradient of almost 0 has a large relative rounding, and Adam divides by its size: 2 % of a step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02 * rate), fit.params, epochs[fit.epoch - 1])


def test_the_same_key_gives_the_same_network_bit_for_bit_and_another_does_not():
    train, val = xor(50, 0), xor(20, 1)
    settings = dataclasses.replace(SMALL, epochs=3)
    first, again, other = (
        mf.fit_mlp(*train, *val, classes=2, key=jax.random.key(seed), settings=settings) for seed in (5, 5, 6)
    )
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert not np.array_equal(first.params["Dense_0"]["kernel"], other.params["Dense_0"]["kernel"])


def test_several_labels_a_signal():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 3))
    labels = (features @ np.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]]) > 0).astype(int)
    fit = mf.fit_mlp(
        features[:200], labels[:200], features[200:], labels[200:],
        classes=3, key=jax.random.key(0), settings=dataclasses.replace(SMALL, epochs=20),
    )  # fmt: skip
    probabilities = fit.probabilities(features[200:])
    logits = dense(fit.params, (features[200:] - fit.shift) / fit.scale)[0]
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert np.mean((probabilities > 0.5) == labels[200:]) == pytest.approx(fit.val_accuracy.max())
    assert fit.val_accuracy.max() > 0.9


@pytest.mark.parametrize(
    ("kind", "shift", "scale"), [("none", [0, 0], [1, 1]), ("scale", [0, 0], None), ("standardise", [2, 5], [1, 1])]
)
def test_normalisation_leaves_what_does_not_vary(kind, shift, scale):
    features = np.array([[1.0, 5], [3, 5]])
    settings = dataclasses.replace(SMALL, epochs=1)
    fit = mf.fit_mlp(
        features, [0, 1], features, [0, 1], classes=2, key=jax.random.key(0), normalise=kind, settings=settings
    )
    np.testing.assert_allclose(fit.shift, shift)
    np.testing.assert_allclose(fit.scale, [features.std()] * 2 if scale is None else scale)


@pytest.mark.parametrize(
    ("labels", "val_labels", "message"),
    [
        ([0, 1, 2], [0], "a label lies outside the 2 classes"),
        ([0, 1, -1], [0], "a label lies outside the 2 classes"),
        ([0, 1], [0], "do not belong together"),
        ([0, 1, 0], [[0, 1]], r"labels \(1, 2\) are neither"),
        ([[0], [1], [0]], [[0]], r"labels \(3, 1\) are neither"),
    ],
)
def test_arrays_that_do_not_belong_together(labels, val_labels, message):
    with pytest.raises(ValueError, match=message):
        mf.fit_mlp(np.zeros((3, 4)), labels, np.zeros((1, 4)), val_labels, classes=2, key=jax.random.key(0))
