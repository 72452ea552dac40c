import numpy as np
import pytest

from medfuncta_jax.codec import fit_codec

pytest.importorskip("constriction", reason="the extra compress is not installed")


@pytest.fixture(scope="module")
def latents():
    """Entries of very different size, one of them constant."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 200)) * np.geomspace(1e-3, 1e2, 200) + np.linspace(-5, 5, 200)
    values[:, 7] = 0.25
    return values.astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 12])
def test_what_is_decoded_is_what_was_quantised(latents, bits):
    codec = fit_codec(latents[:300], bits=bits)
    for latent in latents[300:310]:
        np.testing.assert_array_equal(codec.decode(codec.encode(latent)), codec.dequantise(codec.quantise(latent)))


@pytest.mark.parametrize("bits", [3, 8])
def test_the_error_is_half_a_bin_at_most_within_the_spread(latents, bits):
    codec = fit_codec(latents[:300], bits=bits, spread=4.0)
    inside = np.abs(latents - codec.mean) <= 4 * codec.scale
    error = np.abs(codec.dequantise(codec.quantise(latents)) - latents) / codec.scale
    assert inside.mean() > 0.99
    assert error[inside].max() <= 4.0 / 2**bits + 2e-3  # float32 rounds where the mean is large
    far = codec.mean + 100 * codec.scale
    np.testing.assert_array_equal(codec.quantise(far), 2**bits - 1)


def test_codes_are_as_long_as_their_information(latents):
    """Within the coder's own words of four bytes; and less than the bins' plain numbers."""
    codec = fit_codec(latents[:300], bits=6)
    information, lengths = [], []
    for latent in latents[300:]:
        information.append(-np.log2(codec.probabilities[codec.quantise(latent)]).sum())
        lengths.append(8 * len(codec.encode(latent)))
    assert np.mean(information) - 1 < np.mean(lengths) < np.mean(information) + 64
    assert np.mean(lengths) < 0.95 * 6 * 200


def test_few_latents_code_what_they_have_not_seen(latents):
    codec = fit_codec(latents[:2], bits=8)
    assert codec.probabilities.min() > 0
    np.testing.assert_array_equal(codec.decode(codec.encode(latents[9])), codec.dequantise(codec.quantise(latents[9])))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4), {"bits": 4}, "at least 2 signals"),
        ((4,), {"bits": 4}, r"latents \[n, P\]"),
        ((4, 4), {"bits": 0}, "bits must be 1 to 16"),
        ((4, 4), {"bits": 17}, "bits must be 1 to 16"),
        ((4, 4), {"bits": 4, "spread": 0.0}, "spread above 0"),
    ],
)
def test_faults_are_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        fit_codec(np.zeros(shape), **options)


def test_a_torn_code_is_refused(latents):
    codec = fit_codec(latents, bits=4)
    with pytest.raises(ValueError, match="buffer size"):
        codec.decode(codec.encode(latents[0])[:-1])
