import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from medfuncta_jax import sharding
from medfuncta_jax.settings import SettingsError

EIGHT_AGAINST_ONE = """
    import jax, numpy as np, jax.numpy as jnp
    jax.config.update("jax_enable_x64", True)
    import medfuncta_jax as mf
    from medfuncta_jax import meta_step, sharding

    field = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=10.0, omega_last=30.0), 2, 1)
    settings = mf.Settings.from_dict({
        "data": {"source": "any"},
        "inner": {"steps": 3, "step_size": 0.5, "learned_step_size": "per_latent", "selection_ratio": 0.5},
        "train": {"steps": 20, "batch_size": 16, "learning_rate": 1e-3, "micro_batch": 8},
    })
    signals = np.random.default_rng(0).uniform(size=(5, 16, 36, 1))
    coords = jnp.asarray(mf.grid((6, 6)))
    assert jax.local_device_count() == 8

    def run(devices):
        mesh = sharding.data_mesh(devices)
        sharding.check_batch_size(mesh, 16, "train.batch_size")
        state = sharding.replicate(mesh, meta_step.init_state(field, settings, jax.random.key(0), jnp.float64))
        update = jax.jit(
            meta_step.make_update(field, settings, sharding.replicate(mesh, coords), mesh), donate_argnums=0
        )
        key = sharding.replicate(mesh, jax.random.key(1))
        if len(devices) == 8:
            text = update.lower(state, sharding.split_batch(mesh, signals[0]), key).compile().as_text()
            assert text.count(" all-reduce(") == 1, "one sum an update, of loss and gradient"
        for batch in signals:
            batch = sharding.split_batch(mesh, batch)
            assert len(batch.sharding.device_set) == len(devices)
            state, metrics = update(state, batch, key)
        fit = mf.fit_latent(field, state.trainable.field, batch, coords=coords)
        assert len(fit.latents.sharding.device_set) == len(devices)
        return jax.device_get((state, metrics, fit))

    eight, one = run(jax.devices()), run(jax.devices()[:1])
    # Adam divides by the root of a second moment, so rounding of tiny gradients shows a little.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-11), eight, one)
    print("equal")
"""


def test_eight_devices_give_the_result_of_one():
    program = textwrap.dedent(EIGHT_AGAINST_ONE)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"


def test_a_batch_that_cannot_be_split_names_the_setting():
    class Mesh:
        size = 8

    with pytest.raises(SettingsError, match=r"train.batch_size = 20 cannot be split over 8 devices; try 16"):
        sharding.check_batch_size(Mesh(), 20, "train.batch_size")  # type: ignore[arg-type]
    sharding.check_batch_size(Mesh(), 24, "train.batch_size")  # type: ignore[arg-type]


def test_shardings_on_one_device():
    mesh = sharding.data_mesh(jax.devices()[:1])
    batch = sharding.split_batch(mesh, np.ones((4, 3)))
    assert batch.sharding.spec == jax.sharding.PartitionSpec("data")
    assert sharding.replicate(mesh, {"a": np.ones(2)})["a"].sharding.is_fully_replicated
