"""Batches of any size drop nothing, share one program, and equal what is done signal by signal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import batched, metrics, sharding

MODEL = mf.ModelSettings(layers=3, width=8, latent_dim=4, omega_first=10.0, omega_last=20.0)
ROWS = [8, 1, 3, 0, 2, 6, 7]


@pytest.fixture(scope="module")
def field():
    return mf.Field(MODEL, coord_dims=2, channels=1)


@pytest.fixture(scope="module")
def params(field):
    return field.init(jax.random.key(0), jnp.float64)


@pytest.fixture(scope="module")
def signals():
    return np.random.default_rng(0).uniform(size=(9, 5, 4, 1))


class Split:
    """Signals that are read as they are asked for."""

    def __init__(self, signals, events=None):
        self._signals, self._events = signals, [] if events is None else events

    def __len__(self):
        return len(self._signals)

    def signals(self, rows):
        self._events.append(("read", rows.tolist()))
        return self._signals[rows]


def rules(batch_size, steps=3, **options):
    return mf.FitSettings(steps=steps, batch_size=batch_size, **options)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 100])
def test_any_batch_size_equals_one_fit_of_all(field, params, signals, batch_size):
    counts = []
    fitted = mf.fit_signals(
        field, params, signals, rows=ROWS, fit=rules(batch_size, safeguard=False), step_size=0.1,
        after_batch=lambda batch: counts.append(len(batch.psnr)),
    )  # fmt: skip
    assert sum(counts) == 7
    assert max(counts) == min(batch_size, 7)
    alone = mf.fit_latent(field, params, signals[ROWS], steps=3, step_size=0.1)
    assert fitted.latents.dtype == np.float64
    np.testing.assert_allclose(fitted.latents, alone.latents, rtol=1e-9, atol=1e-13)
    values = np.clip(mf.reconstruct(field, params, alone.latents, mf.grid((5, 4))), 0, 1)
    np.testing.assert_allclose(fitted.psnr, metrics.psnr(values, signals[ROWS].reshape(values.shape)), rtol=1e-9)


def test_all_batches_share_one_program(field, params, signals):
    before = batched.fit_batch._cache_size()
    for count in (9, 8):  # the last batch is of one signal, and of three
        mf.fit_signals(field, params, signals[:count], fit=rules(4, steps=4))
    assert batched.fit_batch._cache_size() == before + 1


def test_what_is_stored_in_half_precision_is_what_is_measured(field, signals):
    params = field.init(jax.random.key(0), jnp.float32)
    params = mf.rescale_latent(field, params, 30.0)  # so that rounding shows
    signals = signals.astype(np.float32)
    whole, half = (mf.fit_signals(field, params, signals, fit=rules(4), dtype=dtype) for dtype in (None, "float16"))
    assert (whole.latents.dtype, half.latents.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(half.latents, whole.latents.astype(np.float16))
    values = np.clip(mf.decode_latents(field, params, half.latents, (5, 4)), 0, 1)
    np.testing.assert_allclose(half.psnr, metrics.psnr(values, signals), rtol=1e-5)


def test_devices_share_a_batch(field, params, signals):
    fitted = mf.fit_signals(field, params, signals, fit=rules(4), mesh=sharding.data_mesh())
    alone = mf.fit_signals(field, params, signals, fit=rules(100))
    np.testing.assert_allclose(fitted.latents, alone.latents, rtol=1e-9, atol=1e-13)


def test_hidden_points_do_not_count_whatever_they_hold(field, params, signals):
    weights = np.random.default_rng(1).integers(0, 2, (7, 5, 4)).astype(float)
    weights[:, 0, 0] = 1
    options = {"rows": ROWS, "weights": weights, "fit": rules(3)}
    fitted = mf.fit_signals(field, params, signals, **options)
    hidden = signals.copy()
    hidden[ROWS] = np.where(weights[..., None] > 0, signals[ROWS], np.nan)
    np.testing.assert_array_equal(mf.fit_signals(field, params, hidden, **options).latents, fitted.latents)
    assert not np.array_equal(fitted.latents, mf.fit_signals(field, params, signals, rows=ROWS, fit=rules(3)).latents)


def test_channels_that_were_not_recorded_take_no_part():
    """Neither in the fit nor in its PSNR, with and without weights of points."""

    class Leads(Split):
        def recorded(self, rows):
            return recorded[rows]

    field = mf.Field(MODEL, coord_dims=1, channels=3)
    params = field.init(jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(0)
    signals = rng.uniform(size=(5, 30, 3))
    recorded = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 1]], np.float32)
    other = np.where(recorded[:, None] > 0, signals, rng.uniform(size=signals.shape))
    other[1, :, 1] = np.nan
    for weights in (None, rng.uniform(size=(5, 30))):
        options = {"weights": weights, "fit": rules(2)}
        one, two = (mf.fit_signals(field, params, Leads(some), **options) for some in (signals, other))
        np.testing.assert_array_equal(one.latents, two.latents)
        np.testing.assert_array_equal(one.psnr, two.psnr)
        of_values = np.broadcast_to(recorded[:, None] * (1 if weights is None else weights[..., None]), signals.shape)
        alone = mf.fit_latent(field, params, signals, weights=of_values, steps=3, safeguard=True)
        np.testing.assert_allclose(one.latents, alone.latents, rtol=1e-9, atol=1e-13)
        values = np.clip(mf.reconstruct(field, params, one.latents, mf.grid((30,))), 0, 1)
        np.testing.assert_allclose(one.psnr, metrics.psnr(values, signals, recorded), rtol=1e-9)
    only_missing = np.zeros(signals.shape)
    only_missing[..., 1] = 1
    with pytest.raises(ValueError, match="weights of signal 1 are all 0"):
        mf.fit_signals(field, params, Leads(signals), weights=only_missing)


def test_the_rescaled_rule_of_a_run(field, params, signals):
    values = {"data": {"source": "any"}, "inner": {"selection_ratio": 0.3}, "train": {"channel_loss": "sum"}, "seed": 4}
    settings = mf.Settings.from_dict({**values, "fit": {"context": "rescaled", "steps": 2, "safeguard": False}})
    fitted = mf.fit_signals(field, params, signals, **mf.fit_options(settings))
    alone = mf.fit_latent(
        field, params, signals, steps=2, channel_loss="sum", rescale_ratio=0.3, key=jax.random.key(4)
    )  # fmt: skip
    np.testing.assert_allclose(fitted.latents, alone.latents, rtol=1e-9, atol=1e-13)


def test_the_next_batch_is_read_before_one_is_waited_for(field, params, signals):
    events = []
    mf.fit_signals(
        field, params, Split(signals[:8], events), fit=rules(3),
        after_batch=lambda batch: events.append(("done", len(batch.psnr))),
    )  # fmt: skip
    # The last one is filled up, so that one shape is compiled.
    assert events == [
        ("read", [0, 1, 2]), ("read", [3, 4, 5]), ("done", 3), ("read", [6, 7, 7]), ("done", 3), ("done", 2)
    ]  # fmt: skip


def test_batches_before_an_interrupt_are_kept(field, params, signals):
    class Interrupted(Split):
        def signals(self, rows):
            if 6 in rows:
                raise KeyboardInterrupt
            return super().signals(rows)

    kept = []
    with pytest.raises(KeyboardInterrupt):
        kept.extend(batch.latents for batch in mf.fit_batches(field, params, Interrupted(signals), fit=rules(2)))
    whole = mf.fit_signals(field, params, signals, fit=rules(2))
    # The third batch was under way, and is done again by whoever goes on.
    np.testing.assert_array_equal(np.concatenate(kept), whole.latents[:4])
    rest = mf.fit_signals(field, params, signals, rows=np.arange(4, 9), fit=rules(2))
    np.testing.assert_array_equal(np.concatenate([*kept, rest.latents]), whole.latents)


@pytest.mark.parametrize("batch_size", [2, 7, 100])
def test_decoding_in_batches_equals_one_of_all(field, params, batch_size):
    latents = np.random.default_rng(2).normal(size=(9, 4))
    expected = np.asarray(mf.reconstruct(field, params, latents[ROWS], mf.grid((6, 3)))).reshape(7, 6, 3, 1)
    for where in ((6, 3), mf.grid((6, 3)).reshape(6, 3, 2)):
        values = mf.decode_latents(field, params, latents, where, rows=ROWS, batch_size=batch_size)
        np.testing.assert_allclose(values, expected, rtol=1e-10)
    at_points = mf.decode_latents(field, params, latents[ROWS], mf.grid((6, 3)), batch_size=batch_size)
    np.testing.assert_allclose(at_points, expected.reshape(7, 18, 1), rtol=1e-10)
    sizes = [len(batch) for batch in mf.decode_batches(field, params, latents, (6, 3), batch_size=batch_size)]
    assert sizes == {2: [2, 2, 2, 2, 1], 7: [7, 2], 100: [9]}[batch_size]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signals": np.zeros((0, 5, 4, 1))}, "at least one signal"),
        ({"rows": [0.5]}, "rows must be whole numbers, got float64"),
        ({"signals": np.zeros((3, 5, 4, 2))}, r"signals \(3, 5, 4, 2\) must end in the field's 1 channel"),
        ({"signals": np.full((3, 5, 4, 1), np.nan), "rows": [2, 1]}, "signal 2 holds values that are not finite"),
        ({"weights": np.ones((2, 5, 4))}, r"weights \(2, 5, 4\) must be \[9, N\]"),
        ({"weights": np.zeros((9, 5, 4))}, "weights of signal 0 are all 0"),
        ({"fit": rules(0)}, "fit.batch_size must be at least 1, got 0"),
    ],
)
def test_faults_name_the_argument(field, params, signals, change, message):
    given = {"signals": signals, "fit": rules(4)} | change
    with pytest.raises(ValueError, match=message):
        mf.fit_signals(field, params, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": np.zeros((0, 4))}, "at least one signal"),
        ({"latents": np.zeros((2, 3))}, r"latents \(2, 3\) must be"),
        ({"where": (5,)}, r"where must be 2 sizes of a grid, or coordinates, got \(5,\)"),
        ({"where": 5}, "where must be 2 sizes of a grid, or coordinates, got 5"),
        ({"where": np.zeros((3, 1))}, r"coords \(3, 1\) must be \[N, 2\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_faults_of_decoding(field, params, change, message):
    given = {"latents": np.zeros((2, 4)), "where": (5, 4)} | change
    with pytest.raises(ValueError, match=message):
        mf.decode_latents(field, params, **given)
