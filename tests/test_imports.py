"""Imports point one way, and `import medfuncta_jax` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each module may import those before it.
ORDER = (
    "atomic", "nifti", "settings", "units", "coordinates", "arrays", "sine", "product", "latent_grid", "siren",
    "point_field", "passes", "basis", "field", "chunks", "context", "augmentation", "inner_steps",
    "operators", "measurements", "prior", "conjugate_steps", "fit", "signal_metric", "conditioning", "linear_code",
    "training_state", "sharding",
    "outer_loss", "latent_loss", "meta_step", "baselines", "methods", "checkpoint", "latent_file", "latent_store",
    "codec", "metrics", "batched", "lpips", "mlp_classifier", "flow", "number_regression", "local_detail",
    "segmentation", "latent_operator", "datasets", "prepare", "console",
)  # fmt: skip
HEAVY = (
    "tensorflow",
    "torch",
    "grain",
    "ml_collections",
    "tensorflow_datasets",
    "orbax",
    "clu",
    "matplotlib",
    "sklearn",
    "keras",
)


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module_of(file):
    return file.relative_to(ROOT / "medfuncta_jax").with_suffix("").parts[0]


def test_imports_point_one_way():
    files = sorted((ROOT / "medfuncta_jax").rglob("*.py"))
    assert {module_of(file) for file in files} - {"__init__"} == set(ORDER)
    for file in files:
        if file.parent.name == "medfuncta_jax" and file.stem == "__init__":
            continue
        place = ORDER.index(module_of(file))
        for name in imported(file):
            assert not name.startswith(("experiments", "configs")), f"{file} imports {name}"
            assert name not in ("absl.flags", "absl.app", "ml_collections"), f"{file} imports {name}"
            parts = name.split(".")
            if parts[0] == "medfuncta_jax" and len(parts) > 1 and parts[1] in ORDER:
                assert ORDER.index(parts[1]) <= place, f"{file} imports {name}"


def test_import_is_light():
    code = f"import sys, medfuncta_jax, medfuncta_jax.datasets; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
