"""Planning for a GPU that is not here: the text of a compiled program counted, and programs compiled where JAX can."""

import importlib.util
import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import medfuncta_jax as mf
from experiments.plan import programs, roofline
from experiments.plan.__main__ import shape_of
from experiments.plan.targets import TARGETS
from experiments.runtime.run_directory import RunError
from experiments.tools.cases import CASES, settings_of
from medfuncta_jax.methods import METHODS
from medfuncta_jax.product import Products
from medfuncta_jax.settings import Settings

PLUGINS = [name for name in ("xla_cuda13", "xla_cuda12") if importlib.util.find_spec(f"jax_plugins.{name}")] if (
    importlib.util.find_spec("jax_plugins")
) else []  # fmt: skip
needs_plugin = pytest.mark.skipif(not PLUGINS, reason="JAX's CUDA plugin, which compiles without a GPU, is not here")

# Three turns of a loop whose body multiplies [100, 20] by [20, 30] in full float32; then a product in bfloat16.
PROGRAM = """
HloModule jit_f, is_scheduled=true

%fused_dot (parameter_0: f32[100,20], parameter_1: f32[20,30]) -> f32[100,30] {
  %parameter_0 = f32[100,20]{1,0} parameter(0)
  %parameter_1 = f32[20,30]{1,0} parameter(1)
  ROOT %dot.1 = f32[100,30]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
}

%body (arg: (s32[], f32[100,20], f32[20,30])) -> (s32[], f32[100,20], f32[20,30]) {
  %arg = (s32[], f32[100,20]{1,0}, f32[20,30]{1,0}) parameter(0)
  %x = f32[100,20]{1,0} get-tuple-element(%arg), index=1
  %k = f32[20,30]{1,0} get-tuple-element(%arg), index=2
  %gemm_fusion.1 = f32[100,30]{1,0} fusion(%x, %k), kind=kCustom, calls=%fused_dot
  ROOT %out = (s32[], f32[100,20]{1,0}, f32[20,30]{1,0}) tuple(%x, %x, %k)
}

ENTRY %main (a: f32[100,20], b: f32[20,30]) -> f32[100,30] {
  %a = f32[100,20]{1,0} parameter(0)
  %b = f32[20,30]{1,0} parameter(1)
  %start = (s32[], f32[100,20]{1,0}, f32[20,30]{1,0}) tuple(%a, %a, %b)
  %while.1 = (s32[], f32[100,20]{1,0}, f32[20,30]{1,0}) while(%start), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %h = bf16[100,20]{1,0} get-tuple-element(%while.1), index=1
  %w = bf16[20,30]{1,0} get-tuple-element(%while.1), index=2
  ROOT %cublas.1 = (f32[100,30]{1,0}, s8[64]{0}) custom-call(%h, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},"precision_config":{"operand_precision":["DEFAULT","DEFAULT"]}}}
}
"""  # noqa: E501


def test_bytes_and_products_are_counted_by_precision_and_turns_of_loops():
    total, by_label = roofline.cost(PROGRAM, TARGETS["h200"])
    product = 2 * 100 * 20 * 30
    assert dict(total.flop) == {"float32": 3 * product, "bfloat16": product}
    assert roofline.products_by_precision(PROGRAM) == dict(total.flop)
    assert by_label["gemm_fusion"].launches == 3
    assert by_label["gemm_fusion"].moved == 3 * 4 * (100 * 20 + 20 * 30 + 100 * 30)
    assert by_label["cublas"].moved == 2 * (100 * 20 + 20 * 30) + 4 * 100 * 30 + 64
    slow = replace(TARGETS["h200"], reached_bandwidth=1e30)
    expected = 3 * product / slow.flops["float32"] + product / slow.flops["bfloat16"] + 4 * roofline.LAUNCH_SECONDS
    assert roofline.cost(PROGRAM, slow)[0].seconds == pytest.approx(expected)


def test_the_shape_of_signals_follows_from_the_config():
    for case in CASES.values():
        assert shape_of(settings_of(case, [], None)) == (case.grid, case.channels), case.config
    folder = Settings.from_dict({"data": {"source": "nibabel_slices", "size": 48}})
    assert shape_of(folder) == ((48, 48), 1)
    records = {"source": "ecg", "format": "leads", "leads": ("I", "V1"), "seconds": 2.5}
    assert shape_of(Settings.from_dict({"data": records})) == ((250,), 2)
    assert shape_of(Settings.from_dict({"data": records | {"layout": "signals"}})) == ((250,), 1)
    with pytest.raises(RunError, match="give --grid"):
        shape_of(Settings.from_dict({"data": {"source": "files_of_tomorrow"}}))


def test_without_the_plugin_the_error_says_what_to_install(monkeypatch):
    def absent(*_, **__):
        raise NotImplementedError("platform cuda")

    monkeypatch.setattr(programs.topologies, "get_topology_desc", absent)
    with pytest.raises(RunError, match=r"medfuncta_jax\[plan\]"):
        programs.compile_for(TARGETS["a100"], jnp.sin, jnp.zeros(3))


@needs_plugin
@pytest.mark.parametrize(("products", "target"), [("float32", "h200"), ("tensorfloat32", "a100"), ("bfloat16", "h100")])
def test_the_compiled_program_multiplies_as_asked_for_and_only_in_hidden_layers(products, target):
    small = ["model.layers=5", "model.width=64", "model.latent_dim=32", "inner.steps=2", f"model.products={products}"]
    case = CASES["chest_xray"]
    settings = settings_of(case, small, 2)
    field = METHODS[settings.train.method].check(settings, (32, 32), 1)
    with jax.enable_x64(False):
        update = programs.update(TARGETS[target], field, settings, (32, 32))
        fit = programs.fit(TARGETS[target], field, settings, (32, 32))
    for found in (update, fit):
        flop = roofline.products_by_precision(found.text)
        # The gradient of a product in bfloat16 multiplies a cotangent that is not rounded, in TF32.
        assert set(flop) - {"tensorfloat32"} == {"float32", products} - {"tensorfloat32"}
        assert products == "float32" or flop["float32"] < flop[products]
        assert products != "float32" or "tensorfloat32" not in flop
        assert found.seconds > 0
        assert found.bytes > 0
    # Two of the four modulated layers read points through a product; all products of a step are of one size.
    rows, width = 2 * 32 * 32, 64
    assert roofline.products_by_precision(fit.text)[products] >= 20 * 2 * 2 * 2 * rows * width**2


@needs_plugin
def test_metrics_are_full_float32_on_a_gpu():
    images = jax.ShapeDtypeStruct((32, 32, 1), jnp.float32)
    with jax.enable_x64(False):
        program = programs.compile_for(TARGETS["h200"], mf.metrics.ssim, images, images)
    assert "tf32" not in program.as_text().lower()


def test_every_target_has_rates_for_every_precision():
    for target in TARGETS.values():
        assert set(target.flops) == set(typing.get_args(Products))
        assert target.flops["float32"] < target.flops["tensorfloat32"] < target.flops["bfloat16"]
        assert 0.8 < target.reached_bandwidth / target.bandwidth < 0.9
