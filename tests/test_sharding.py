import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from medfuncta_jax import sharding
from medfuncta_jax.settings import SettingsError

ROOT = Path(__file__).parents[1]
EIGHT_AGAINST_ONE = """
    import dataclasses, functools, sys, jax, numpy as np, jax.numpy as jnp
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    import medfuncta_jax as mf
    from experiments.tools.scaling import collectives
    from medfuncta_jax import meta_step, sharding
    from medfuncta_jax.checkpoint import Checkpoints

    field = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=10.0, omega_last=30.0), 2, 1)
    settings = mf.Settings.from_dict({
        "data": {"source": "any"},
        "inner": {"steps": 2, "step_size": 0.5, "learned_step_size": "per_latent", "selection_ratio": 0.5},
        "train": {"steps": 20, "batch_size": 16, "learning_rate": 1e-3, "micro_batch": 8},
    })
    noisy = dataclasses.replace(settings, train=dataclasses.replace(settings.train, micro_batch=0, latent_noise=0.1))
    signals = np.random.default_rng(0).uniform(size=(5, 16, 36, 1))
    coords = jnp.asarray(mf.grid((6, 6)))
    assert jax.local_device_count() == 8

    def start(mesh, key=0):
        state = meta_step.init(field, settings, jax.random.key(key), dtype=jnp.float64)
        return sharding.place(mesh, state, sharding.layout(field, state, mesh))

    def run(devices, shards, settings=settings, updates=5):
        mesh = sharding.data_mesh(devices, modulation_shards=shards)
        sharding.check_batch_size(mesh, 16, "train.batch_size")
        state, key = start(mesh), sharding.replicate(mesh, jax.random.key(1))
        update = functools.partial(meta_step.update, meta_step.Training(field, settings, (6, 6), mesh=mesh))
        batch = sharding.split_batch(mesh, signals[0])
        update = jax.jit(update, donate_argnums=0).lower(state, batch, key).compile()
        if len(devices) == 8 and not settings.train.latent_noise:
            sums = [one for one in collectives(update.as_text(), 8) if one.kind == "all-reduce" and one.bytes > 64]
            groups = [tuple(range(8))] if shards == 1 else [tuple(range(0, 8, shards)), tuple(range(8))]
            assert sorted(one.group for one in sums) == sorted(groups), "one sum an update, of loss and gradient"
        for batch in signals[:updates]:
            batch = sharding.split_batch(mesh, batch)
            assert len(batch.sharding.device_set) == len(devices)
            state, metrics = update(state, batch, key)
        if settings.train.latent_noise:
            return state, metrics
        params = sharding.replicate(mesh, state.trainable.field)
        fit = mf.fit_latent(field, params, batch, coords=coords, steps=3)
        assert len(fit.latents.sharding.device_set) == len(devices)
        return state, metrics, fit

    def assert_close(some, others):
        # Adam divides by the root of a second moment, so rounding of tiny gradients shows a little.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-11), *jax.device_get((some, others))
        )

    everything = jax.devices()
    one, eight, split = run(everything[:1], 1), run(everything, 1), run(everything, 2)
    assert_close(eight, one)
    assert_close(split, one)
    assert_close(*(run(everything[:n], shards, noisy, updates=1) for n, shards in ((1, 1), (8, 2))))

    # Each device holds half of the modulation weights, and of both moments of each.
    kernels = [leaf for leaf in jax.tree.leaves(split[0]) if leaf.shape == (6, 16)]
    assert len(kernels) == 2 * 3
    for leaf in jax.tree.leaves(split[0]):
        part = (3, 16) if leaf.shape == (6, 16) else leaf.shape
        assert {shard.data.shape for shard in leaf.addressable_shards} == {part}

    # What some devices saved, any other number goes on with.
    for name, saved, (devices, shards) in (("a", split, (1, 1)), ("b", split, (6, 3)), ("c", one, (8, 2))):
        like = start(sharding.data_mesh(everything[:devices], modulation_shards=shards), key=7)
        with Checkpoints(f"{sys.argv[1]}/{name}") as checkpoints:
            checkpoints.save(5, saved[0], val_psnr=None, about={})
            checkpoints.wait()
            restored, _ = checkpoints.restore(5, like)
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((restored, saved[0])))
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert a.sharding == b.sharding
    print("equal")
"""


def test_eight_devices_give_the_result_of_one(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_AGAINST_ONE), str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
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
    assert batch.sharding.spec == jax.sharding.PartitionSpec(("data", "model"))
    assert sharding.replicate(mesh, {"a": np.ones(2)})["a"].sharding.is_fully_replicated


def test_devices_that_cannot_share_the_weights_name_the_setting():
    with pytest.raises(SettingsError, match=r"train.modulation_shards = 2 does not divide the 1 devices; try 1"):
        sharding.data_mesh(jax.devices()[:1], modulation_shards=2)
