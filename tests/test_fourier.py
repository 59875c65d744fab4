"""Waves modulo p: what is found in numbers that were made of known frequencies."""

import numpy as np
import pytest

from lama.interp.fourier import (
    centre,
    excluded,
    fourier_basis,
    key_frequencies,
    restricted,
    spectrum,
    sum_spectrum,
    sum_waves,
    tuned,
)

P, KEYS, HEIGHTS = 13, (2, 5), (3.0, 1.0)


def exact_logits() -> np.ndarray:
    """Σ height · cos(2πk (a + b − c) / p): adds without an error, (p, p, p)."""
    a, b, c = np.meshgrid(*[np.arange(P)] * 3, indexing="ij")
    return sum(
        height * np.cos(2 * np.pi * k * (a + b - c) / P) for k, height in zip(KEYS, HEIGHTS, strict=True)
    )


@pytest.mark.parametrize("p", [3, 7, 13])
def test_fourier_basis_is_orthonormal(p):
    basis = fourier_basis(p)
    np.testing.assert_allclose(basis @ basis.T, np.eye(p), atol=1e-12)


@pytest.mark.parametrize("p", [1, 4, 58])
def test_fourier_basis_refuses_an_even_or_single_number(p):
    with pytest.raises(ValueError, match=f"p must be odd and at least 3; got p={p}"):
        fourier_basis(p)


def test_spectrum_finds_the_frequencies_of_a_matrix_and_not_its_mean():
    x = 2 * np.pi * np.arange(P) / P
    shares = spectrum(np.stack([2 * np.cos(3 * x) + 7, np.sin(3 * x), np.sin(6 * x + 0.4)], axis=1))
    np.testing.assert_allclose(shares, np.eye(6)[2] * 5 / 6 + np.eye(6)[5] / 6, atol=1e-12)


def test_sum_spectrum_of_an_exact_adder_is_its_heights_squared():
    noise = np.arange(P)[:, None] * np.ones((P, P))  # the same for all a and b, and for all answers
    shares = sum_spectrum(exact_logits() + noise[None, 0] + noise[:, :, None])
    assert key_frequencies(shares) == [2, 5] and key_frequencies(shares, least=0.2) == [2]
    np.testing.assert_allclose(shares[[1, 4]], [0.9, 0.1], atol=1e-9)


def test_sum_spectrum_does_not_count_waves_of_the_difference():
    a, b, c = np.meshgrid(*[np.arange(P)] * 3, indexing="ij")
    other = np.cos(2 * np.pi * 4 * (a - b - c) / P)
    np.testing.assert_allclose(
        sum_spectrum(exact_logits() + other)[[1, 3, 4]], [9 / 11, 0, 1 / 11], atol=1e-9
    )


def test_restricted_and_excluded_logits_make_up_the_whole():
    noise = np.random.default_rng(0).standard_normal((P, P, P))
    logits = exact_logits() + noise
    np.testing.assert_allclose(
        restricted(logits, KEYS) + excluded(logits, KEYS), logits + logits.mean((0, 1)), atol=1e-9
    )
    np.testing.assert_allclose(restricted(exact_logits(), KEYS), exact_logits(), atol=1e-9)
    np.testing.assert_allclose(excluded(exact_logits(), [5]), restricted(exact_logits(), [2]), atol=1e-9)
    np.testing.assert_allclose(centre(excluded(exact_logits(), KEYS)), 0, atol=1e-9)


def test_no_frequencies_restrict_logits_to_their_mean():
    assert sum_waves(P, []).shape == (0, P * P)
    np.testing.assert_allclose(
        restricted(exact_logits() + np.arange(P), []), np.broadcast_to(np.arange(P), (P, P, P)), atol=1e-9
    )


def test_tuned_finds_each_neurons_frequency_and_what_it_explains():
    x = 2 * np.pi * np.arange(P) / P
    one, wave, other = np.ones(P), np.cos(4 * x), np.sin(6 * x)
    neurons = [
        np.outer(wave, wave) + np.outer(one, wave) + 5,  # all of frequency 4
        2 * np.outer(other, one) + np.outer(one, wave),  # four fifths of frequency 6
        np.outer(wave, other),  # a product of two frequencies: neither's
        np.outer(one, one),  # never changes
    ]
    frequencies, shares = tuned(np.stack(neurons, axis=-1))
    assert frequencies[:2].tolist() == [4, 6]
    np.testing.assert_allclose(shares, [1, 0.8, 0, 0], atol=1e-9)
