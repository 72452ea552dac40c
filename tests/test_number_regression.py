"""Regression against closed forms, and on numbers that no line gives."""

import jax
import numpy as np
import pytest

from medfuncta_jax.number_regression import fit_number_mlp, fit_ridge
from medfuncta_jax.settings import MlpSettings


def linear(n, seed, width=5, noise=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) * [1e-3, 1, 10, 1, 1][:width] + 3
    return x, 40 + (x - 3) @ ([5000, 2, -0.5, 0, 1][:width]) + noise * rng.normal(size=n)


def test_ridge_is_the_solution_of_its_normal_equations():
    x, y = linear(60, 0, noise=1.0)
    fit = fit_ridge(x, y, *linear(20, 1), penalties=(0.3,))
    standard = (x - x.mean(0)) / x.std(0)
    weights = np.linalg.solve(
        standard.T @ standard + 0.3 * 60 * np.eye(5), standard.T @ ((y - y.mean()) / y.std())
    )  # fmt: skip
    np.testing.assert_allclose(fit.predict(x), y.mean() + y.std() * (standard @ weights), rtol=1e-10)


def test_the_penalty_that_is_best_on_validation_is_taken():
    x, y = linear(60, 0)
    val, test = linear(30, 1), linear(30, 2)
    fit = fit_ridge(x, y, *val, penalties=(100.0, 1e-6, 1.0))
    assert fit.chosen == 1e-6
    assert fit.val_error == pytest.approx(np.mean((fit.predict(val[0]) - val[1]) ** 2))
    np.testing.assert_allclose(fit.predict(test[0]), test[1], atol=1e-3)
    wide = np.random.default_rng(0).normal(size=(10, 400))  # more features than signals
    assert np.isfinite(fit_ridge(wide, np.arange(10.0), wide, np.arange(10.0), penalties=(1.0,)).predict(wide)).all()


def test_the_mlp_learns_what_no_line_gives():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (400, 2))
    y = 50 + 20 * np.abs(x[:, 0])
    settings = MlpSettings(hidden=(32,), epochs=60, batch_size=32, learning_rate=1e-2, dropout=0.0)
    errors = []
    fit = fit_number_mlp(
        x[:300], y[:300], x[300:350], y[300:350], key=jax.random.key(0), settings=settings, after_epoch=errors.append
    )
    line = fit_ridge(x[:300], y[:300], x[300:350], y[300:350], penalties=(1e-3,))
    error, of_line = (np.mean((one.predict(x[350:]) - y[350:]) ** 2) for one in (fit, line))
    assert error < 0.1 * of_line
    assert len(errors) == 60
    assert fit.chosen == np.argmin(errors) + 1
    assert fit.val_error == pytest.approx(np.mean((fit.predict(x[300:350]) - y[300:350]) ** 2), rel=1e-3)
    assert fit.parameters == 2 * 32 + 32 + 32 + 1


@pytest.mark.parametrize(
    "arrays",
    [
        (np.ones((3, 2)), np.ones(2), np.ones((1, 2)), np.ones(1)),
        (np.ones((3, 2)), np.ones(3), np.ones((1, 3)), np.ones(1)),
        (np.ones((3, 2)), np.array([1, np.nan, 2]), np.ones((1, 2)), np.ones(1)),
    ],
)
def test_arrays_that_do_not_belong_together(arrays):
    with pytest.raises(ValueError, match=r"must be|must have"):
        fit_ridge(*arrays, penalties=(1.0,))
