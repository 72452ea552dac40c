"""MSE, PSNR and SSIM: against scikit-image, at their limits, and as properties."""

import itertools

import jax
import numpy as np
import pytest

from medfuncta_jax import metrics

# Odd and even sides, the shortest side with a whole window, grey and RGB, one to three axes.
SHAPES = ((187, 1), (40, 2), (28, 28, 1), (33, 19, 3), (11, 40, 1), (16, 13, 11, 1), (14, 15, 12, 2))


def pair(shape, *, batch=3, noise=0.1, dtype=np.float64, seed=0):
    """Smooth signals in [0, 1] with a black border, and noisy copies that are clipped to [0, 1]."""
    rng = np.random.default_rng(seed)
    signals = np.cumsum(rng.standard_normal((batch, *shape)), axis=1)
    signals = np.clip((signals - signals.min()) / np.ptp(signals) * 1.5 - 0.25, 0, 1)
    noisy = np.clip(signals + noise * rng.standard_normal(signals.shape), 0, 1)
    return noisy.astype(dtype), signals.astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-6)])
def test_ssim_is_that_of_scikit_image(shape, dtype, tolerance):
    skimage_metrics = pytest.importorskip("skimage.metrics")
    a, b = pair(shape, dtype=dtype)
    expected = [
        skimage_metrics.structural_similarity(
            x.astype(np.float64), y.astype(np.float64), data_range=1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, channel_axis=-1,
        )
        for x, y in zip(a, b, strict=True)
    ]  # fmt: skip
    actual = metrics.ssim(a, b)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_ssim_in_float32_keeps_its_digits_near_one(noise):
    a, b = pair((28, 28, 1), noise=noise)
    exact, single = metrics.ssim(a, b), metrics.ssim(a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(1 - single, 1 - exact, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_ssim_is_symmetric_and_one_for_equal_signals(shape, dtype):
    a, b = pair(shape, dtype=dtype)
    np.testing.assert_array_equal(metrics.ssim(a, b), metrics.ssim(b, a))
    np.testing.assert_array_equal(metrics.ssim(a, a), np.ones(3))


def test_more_noise_is_worse():
    values = [metrics.signal_metrics(*pair((32, 32, 1), noise=noise)) for noise in (0.02, 0.05, 0.1, 0.2)]
    for better, worse in itertools.pairwise(values):
        assert (better["ssim"] > worse["ssim"]).all()
        assert (better["psnr"] > worse["psnr"]).all()
        assert (better["mse"] < worse["mse"]).all()


def test_constant_images():
    dark, light = np.full((1, 16, 16, 1), 0.2), np.full((1, 16, 16, 1), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    np.testing.assert_allclose(metrics.ssim(dark, light), luminance, rtol=1e-12)
    np.testing.assert_allclose(metrics.mse(dark, light), 0.16, rtol=1e-12)
    np.testing.assert_allclose(metrics.ssim(dark, dark), 1)


def test_one_signal_does_not_depend_on_its_batch():
    a, b = pair((20, 24, 3), batch=5)
    whole = metrics.signal_metrics(a, b)
    for i in range(5):
        alone = metrics.signal_metrics(a[i : i + 1], b[i : i + 1])
        for name, value in alone.items():
            np.testing.assert_allclose(value[0], whole[name][i], rtol=1e-13)


def test_chunks_of_the_batch_change_nothing(monkeypatch):
    a, b = pair((20, 24, 1), batch=5)
    one_by_one = [metrics.ssim(a[i : i + 1], b[i : i + 1])[0] for i in range(5)]
    # Programs know this number when they are compiled: those of 5 signals are not before.
    monkeypatch.setattr(metrics, "_VALUES_AT_ONCE", 2 * 20 * 24)  # two whole chunks and a remainder
    np.testing.assert_allclose(metrics.ssim(a, b), one_by_one, rtol=1e-13)


@pytest.mark.parametrize("shape", [(10, 10, 1), (7, 30, 1), (2, 3, 3), (1, 1, 1), (5, 1), (9, 4, 2, 1)], ids=str)
def test_axes_shorter_than_the_window(shape):
    a, b = pair(shape)
    values = np.asarray(metrics.ssim(a, b))
    assert values.shape == (3,)
    assert (np.abs(values) <= 1).all()
    np.testing.assert_array_equal(metrics.ssim(a, a), np.ones(3))


def test_an_axis_of_one_point_does_not_count():
    a, b = pair((20, 24, 1))
    np.testing.assert_allclose(metrics.ssim(a[:, :, :, None], b[:, :, :, None]), metrics.ssim(a, b), rtol=1e-13)


def test_psnr():
    rng = np.random.default_rng(0)
    signals = rng.random((2, 9, 5, 3))
    reconstructions = signals.copy()
    reconstructions[0, 4, 2] += 0.3  # one of 45 points, in every channel
    reconstructions[1, 4, 2, 1] += 0.3
    expected_mse = np.array([0.09 / 45, 0.09 / 135])
    np.testing.assert_allclose(metrics.mse(reconstructions, signals), expected_mse, rtol=1e-12)
    np.testing.assert_allclose(metrics.psnr(reconstructions, signals), -10 * np.log10(expected_mse), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_perfect_reconstruction_has_a_finite_psnr(dtype):
    signals = pair((28, 28, 1), dtype=dtype)[1]
    np.testing.assert_allclose(metrics.psnr(signals, signals), metrics.PSNR_CAP, rtol=1e-6)


def test_channels_that_were_not_recorded_do_not_count():
    rng = np.random.default_rng(0)
    signals, images = rng.random((2, 4, 40, 3))
    recorded = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 0, 1]])
    found = metrics.signal_metrics(images, signals, recorded)
    for i, channels in enumerate(recorded.astype(bool)):
        alone = metrics.signal_metrics(images[[i]][..., channels], signals[[i]][..., channels])
        for name, value in alone.items():
            np.testing.assert_allclose(found[name][i], value[0], rtol=1e-10)
    np.testing.assert_array_equal(metrics.psnr(images.clip(0, 1), signals, recorded), found["psnr"])
    np.testing.assert_array_equal(metrics.mse(images.clip(0, 1), signals, recorded), found["mse"])


def test_signal_metrics_clips_the_reconstruction_only():
    reconstructions, signals = pair((28, 28, 1))
    raw = np.where(reconstructions == 1, 1.7, np.where(reconstructions == 0, -0.4, reconstructions))
    assert (raw != reconstructions).any()
    values = metrics.signal_metrics(raw, signals)
    assert set(values) == {"mse", "psnr", "ssim"}
    for name, value in values.items():
        np.testing.assert_array_equal(value, getattr(metrics, name)(reconstructions, signals))
    assert (metrics.mse(raw, signals) > values["mse"]).all()


def test_not_a_number_stays_in_its_signal():
    reconstructions, signals = pair((28, 28, 1))
    reconstructions[1, 14, 14] = np.nan
    for value in metrics.signal_metrics(reconstructions, signals).values():
        np.testing.assert_array_equal(np.isnan(value), [False, True, False])


def test_float32_stays_float32_and_half_precision_is_widened():
    a, b = pair((16, 16, 1))
    for dtype in (np.float16, np.float32):
        values = metrics.signal_metrics(a.astype(dtype), b.astype(dtype))
        assert {value.dtype for value in values.values()} == {np.dtype(np.float32)}
    # In half precision the squares of an error of 1e-3 would already be lost.
    np.testing.assert_allclose(metrics.mse(a.astype(np.float16), b.astype(np.float16)), metrics.mse(a, b), rtol=1e-2)


def test_an_empty_batch_has_no_figures():
    empty = np.zeros((0, 16, 16, 1))
    assert {value.shape for value in metrics.signal_metrics(empty, empty).values()} == {(0,)}


def test_differentiable():
    """SSIM can be a loss: its gradient is finite everywhere, and zero at its maximum."""
    a, b = pair((16, 16, 1))
    slopes = jax.grad(lambda x: metrics.ssim(x, b).sum())(a)
    step = 1e-6 * np.sign(slopes)
    rise = (metrics.ssim(a + step, b).sum() - metrics.ssim(a - step, b).sum()) / 2
    np.testing.assert_allclose(rise, np.sum(np.asarray(slopes) * step), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: metrics.ssim(x, b).sum())(b), 0, atol=1e-12)


@pytest.mark.parametrize("compare", [metrics.mse, metrics.psnr, metrics.ssim, metrics.signal_metrics])
def test_what_cannot_be_compared_is_refused(compare):
    image = np.zeros((2, 16, 16, 1))
    with pytest.raises(ValueError, match="one shape"):
        compare(image, image[:1])
    with pytest.raises(ValueError, match="floating"):
        compare(image.astype(np.uint8), image)
    with pytest.raises(ValueError, match="with points and channels"):
        compare(image[:, :0], image[:, :0])
    with pytest.raises(ValueError, match="with points and channels"):
        compare(image[0, 0], image[0, 0])


def test_ssim_of_more_than_three_axes_is_refused():
    with pytest.raises(ValueError, match="one to three grid axes"):
        metrics.ssim(np.zeros((1, 2, 2, 2, 2, 1)), np.zeros((1, 2, 2, 2, 2, 1)))


def test_summary_has_mean_deviation_and_the_bootstrap_interval():
    """Against a bootstrap of its own draws: percentiles of 20,000 means differ by their Monte Carlo error only."""
    rng = np.random.default_rng(3)
    values = {"psnr": rng.normal(30, 4, 60), "skewed": rng.exponential(1e-3, 60)}
    found = metrics.summary(values, resamples=20_000, seed=0)
    for name, value in values.items():
        np.testing.assert_allclose(found[name], value.mean(), rtol=1e-12)
        np.testing.assert_allclose(found["std"][name], np.sqrt(np.mean((value - value.mean()) ** 2)), rtol=1e-12)
        means = [value[rng.integers(60, size=60)].mean() for _ in range(20_000)]
        error = value.std() / np.sqrt(60)  # of the mean; each percentile is within 0.02 of it, one standard deviation
        np.testing.assert_allclose(found["interval"][name], np.quantile(means, [0.025, 0.975]), atol=0.1 * error)
        assert found["interval"][name][0] < value.mean() < found["interval"][name][1]


def test_summary_is_seeded_and_does_not_depend_on_its_batches(monkeypatch):
    values = {"mse": np.random.default_rng(0).random(40)}
    whole = metrics.summary(values, resamples=999, seed=1)
    assert whole == metrics.summary(values, resamples=999, seed=1)
    assert whole != metrics.summary(values, resamples=999, seed=2)
    monkeypatch.setattr(metrics, "_VALUES_AT_ONCE", 40 * 7)
    assert whole == metrics.summary(values, resamples=999, seed=1)


def test_summary_of_equal_values_and_of_a_single_signal():
    for count in (1, 5):
        found = metrics.summary({"ssim": np.full(count, 0.5)}, resamples=100, seed=0)
        assert found == {"ssim": 0.5, "std": {"ssim": 0.0}, "interval": {"ssim": [0.5, 0.5]}}
