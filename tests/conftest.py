"""Shared fixtures. Mathematics is tested in float64, so the whole suite runs with x64 enabled."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in a shell's background; what it starts would be deaf too
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_enable_x64", True)
# Compiling is two thirds of the suite's time, here and in the commands that tests start: programs are optimised less,
# and fusions made the older way, which takes half as long. XLA ends the process at a flag that it does not know.
jax.config.update("jax_disable_most_optimizations", True)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if jax.__version_info__[:2] == (0, 10):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = ("ecg_1d", "image_2d", "image_2d_plain", "volume_3d")


# Files of few but long tests: they start first, so that no worker waits at the end for another one's file.
LONG = (
    "test_processes.py", "test_ablation.py", "test_main.py", "test_configs.py", "test_baselines.py", "test_sharding.py",
    "test_scaling.py", "test_classify.py", "test_golden.py", "test_meta_step.py", "test_outer_loss.py",
    "test_methods.py", "test_siren.py", "test_slurm.py", "test_modality_table.py", "test_documents.py",
    "test_as_shipped.py", "test_reference.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    variants: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some"):
            variants.setdefault((item.path, item.originalname), []).append(item)
    for each in variants.values():
        count = each[0].get_closest_marker("some").args[0]
        assert 0 < count < len(each), f"{each[0].nodeid} has {len(each)} variants, of which {count} are to run always"
        always = set(np.linspace(0, len(each) - 1, count).round().astype(int))
        for place, item in enumerate(each):
            if place not in always:
                item.add_marker(pytest.mark.slow)


class Golden:
    """One golden file: the case's settings, its arrays, and the parameters by layer name."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.case = json.loads(str(self.arrays["config"]))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def layers(self, group: str) -> dict[str, np.ndarray]:
        prefix = f"{group}/"
        return {name.removeprefix(prefix): value for name, value in self.arrays.items() if name.startswith(prefix)}


@pytest.fixture(scope="session", params=GOLDEN_CASES)
def golden(request) -> Golden:
    return Golden(request.param)
