"""The classifier of points, its loss and its overlap, on masks that are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import segmentation
from medfuncta_jax.segmentation import Examples, HeadTraining

FIELD = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=2, omega_first=3.0, omega_last=3.0), 2, 1)
SMALL = HeadTraining(hidden=(32, 32), steps=200, signals=12, points=60, learning_rate=1e-2)
CLASSES = 3


def _masks(latents, shape):
    """Two structures, on both sides of a line that the latent moves."""
    x = mf.grid(shape)[:, 0].reshape(1, *shape)
    edge = latents[:, 0].reshape(-1, 1, 1)
    return np.where(x < edge - 0.2, 1, np.where(x > edge + 0.2, 2, 0))


@pytest.fixture(scope="module")
def case():
    params = FIELD.init(jax.random.key(0))
    latents = np.random.default_rng(0).uniform(-0.6, 0.6, (2, 68, 2)).astype(np.float32)
    latents[1, :, 0] = latents[0, :, 0]  # another latent of the same signal
    return params, latents, _masks(latents[0], (21, 4))


def _fitted(case, after=lambda step, loss: None, **changed):
    params, latents, masks = case
    given = {"latents": latents[:, :60], "masks": masks[:60], "val_latents": latents[0, 60:], "val_masks": masks[60:]}
    first, second, *val = (given | changed).values()
    train = (first, second)
    return segmentation.fit_head(
        FIELD, params, Examples(*train), Examples(*val), classes=CLASSES, key=jax.random.key(1), training=SMALL,
        after=after,
    )  # fmt: skip


@pytest.fixture(scope="module")
def head(case):
    return _fitted(case)


def test_last_hidden_units_are_what_the_linear_layer_reads(case):
    params, latents, _ = case
    coords = jnp.asarray(mf.grid((4, 5)), jnp.float32)
    hidden = jax.jit(segmentation.last_hidden, static_argnums=0)(FIELD, params, jnp.asarray(latents[0, :3]), coords)
    last = params["layer_4"]
    np.testing.assert_allclose(
        hidden @ last["kernel"] + last["bias"] + 0.5, mf.reconstruct(FIELD, params, latents[0, :3], coords), atol=1e-5
    )


def test_the_head_finds_structures_at_any_resolution(case, head):
    _, latents, _ = case
    assert head.val_dice > 0.9
    assert head.step in range(20, 201, 20)
    for shape in ((21, 4), (23, 20)):
        found = head.labels(latents[1, 60:], shape)
        assert found.shape == (8, *shape)
        assert found.dtype == np.uint8
        assert segmentation.dice(found, _masks(latents[0, 60:], shape), classes=CLASSES).mean() > 0.85
    points = mf.grid((21, 4)).reshape(21, 4, 2)[::2]
    np.testing.assert_array_equal(head.labels(latents[0, 60:], points), head.labels(latents[0, 60:], (21, 4))[:, ::2])


def test_latents_that_move_hidden_units_by_little_are_read_as_well(case, head):
    """As those of a linear start do."""
    _, latents, _ = case
    scaled = {"latents": latents[:, :60] / 100, "val_latents": latents[0, 60:] / 100}
    assert _fitted(case, **scaled).val_dice > head.val_dice - 0.05


def test_the_same_arguments_give_the_same_head(case, head):
    steps = []
    again = _fitted(case, after=lambda step, loss: steps.append(step))
    assert steps == list(range(20, 201, 20))
    jax.tree.map(np.testing.assert_array_equal, again.params, head.params)
    assert (again.step, again.val_dice) == (head.step, head.val_dice)


def test_the_best_state_in_validation_is_kept(case, head):
    """Validation masks with the classes exchanged are best matched by the first states."""
    exchanged = np.array([0, 2, 1])[case[2][60:]]
    worse = _fitted(case, val_masks=exchanged)
    assert worse.val_dice < 0.5
    assert worse.step < head.step


@pytest.fixture(scope="module")
def detailed(case):
    """Signals that show, as their latents do not, a bright square that is the second structure."""
    params, latents, _ = case
    rng, shape, count = np.random.default_rng(1), (12, 12), 60
    masks = np.zeros((count, *shape), int)
    for mask in masks:
        at = rng.integers(0, 7, 2)
        mask[at[0] : at[0] + 6, at[1] : at[1] + 6] = 2
    latents = latents[:, :count]
    values = np.asarray(mf.reconstruct(FIELD, params, latents[0], mf.grid(shape))).reshape(count, *shape, 1)
    return params, latents[0], masks, values + 0.3 * (masks[..., None] == 2)


def _with_details(detailed, **changed):
    params, latents, masks, signals = detailed
    return segmentation.fit_head(
        FIELD, params, Examples(latents[:50], masks[:50], signals[:50])._replace(**changed),
        Examples(latents[50:], masks[50:], signals[50:], changed.get("seen")), classes=CLASSES, key=jax.random.key(1),
        training=dataclasses.replace(SMALL, detail=(0.0, 1.0)),
    )  # fmt: skip


def test_a_head_reads_what_latents_leave_of_signals(detailed):
    params, latents, masks, signals = detailed
    alone = segmentation.fit_head(
        FIELD, params, Examples(latents[:50], masks[:50]), Examples(latents[50:], masks[50:]), classes=CLASSES,
        key=jax.random.key(1), training=SMALL,
    )  # fmt: skip
    assert alone.val_dice < 0.6
    head = _with_details(detailed)
    assert head.val_dice > 0.97
    # At twice the resolution, from the same signals.
    fine = head.labels(latents[50:], (23, 23), signals=signals[50:])
    assert segmentation.dice(fine[:, ::2, ::2], masks[50:], classes=CLASSES)[:, 1].mean() > 0.97
    assert fine.shape == (10, 23, 23)
    # Few points show less, and those that were not seen are not read.
    seen = np.random.default_rng(0).random((12, 12)) < 0.3
    head = _with_details(detailed, seen=seen)
    assert 0.75 < head.val_dice < 0.97
    other = np.where(seen[..., None], signals[50:], 9.0)
    np.testing.assert_array_equal(
        *(head.labels(latents[50:], (12, 12), signals=some, seen=seen) for some in (signals[50:], other))
    )


def test_details_without_their_signals_are_refused(detailed):
    _, latents, _, signals = detailed
    for changed, message in (
        ({"signals": None}, r"detail = \(0.0, 1.0\)\) needs the signals"),
        ({"signals": signals[:49]}, r"signals \(49, 12, 12, 1\) and latents \(1, 50, 2\) do not belong together"),
        ({"signals": signals[:50, ..., 0]}, r"signals \(50, 12, 12\) must be on the grid"),
        (
            {"signals": signals[:50, :11]},
            r"signals \(50, 11, 12, 1\) must be on the grid of the training masks, \(12, 12\)",
        ),
        ({"seen": np.ones((11, 12), bool)}, r"seen \(11, 12\) must be of the grid of the signals, \(12, 12\)"),
    ):
        with pytest.raises(ValueError, match=message):
            _with_details(detailed, **changed)
    head = _with_details(detailed)
    with pytest.raises(ValueError, match="needs the signals"):
        head.labels(latents[:2], (12, 12))
    with pytest.raises(ValueError, match="must be on the grid of the training masks"):
        head.labels(latents[:2], (12, 12), signals=signals[:2, ::2])


def test_arrays_that_do_not_fit_are_refused(case):
    _, latents, masks = case
    for changed, message in (
        ({"latents": latents[:, :5]}, r"latents \(5, 2\) and masks \(60, 21, 4\) do not belong together"),
        ({"latents": latents[:, :60, :1]}, r"latents \(60, 1\) and masks"),
        ({"masks": masks[:60] + 1}, r"whole numbers from 0 to 2"),
        ({"masks": masks[:60].astype(float)}, r"whole numbers from 0 to 2"),
        ({"val_masks": masks[60:, 0]}, r"masks \(8, 4\) must be \[n, \*grid\]"),
    ):
        with pytest.raises(ValueError, match=message):
            _fitted(case, **changed)


def test_dice_is_that_of_sets():
    rng = np.random.default_rng(0)
    found, masks = rng.integers(0, 3, (2, 4, 6, 5))
    found[0], masks[0] = np.minimum(found[0], 1), np.minimum(masks[0], 1)  # neither has the second
    masks[1] = np.minimum(masks[1], 1)  # one of them has
    overlap = segmentation.dice(found, masks, classes=3)
    for n in range(4):
        for k in (1, 2):
            a, b = ({tuple(at) for at in np.argwhere(some[n] == k)} for some in (found, masks))
            if a or b:
                assert overlap[n, k - 1] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
            else:
                assert np.isnan(overlap[n, k - 1])
    assert np.isnan(overlap[0, 1])
    assert overlap[1, 1] == 0


def test_the_loss_is_cross_entropy_and_dice():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    labels = np.array([2, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = -np.log(p[[0, 1], labels]).mean()
    overlap = [(2 * p[1, 1] + 1) / (p[:, 1].sum() + 2), (2 * p[0, 2] + 1) / (p[:, 2].sum() + 2)]
    assert segmentation.segmentation_loss(jnp.asarray(logits), jnp.asarray(labels)) == pytest.approx(
        entropy + 1 - np.mean(overlap)
    )
    sure = 50 * np.eye(3)[labels]
    assert segmentation.segmentation_loss(jnp.asarray(sure), jnp.asarray(labels)) == pytest.approx(0, abs=1e-6)
