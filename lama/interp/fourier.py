"""Fourier analysis of addition modulo an odd p: models represent a and b by waves of a few frequencies.

Frequency k = 1 ... (p − 1) / 2 has the waves cos(2πk·x / p) and sin(2πk·x / p). Arrays (p, p, ...) run over
all pairs (a, b). Source: Nanda et al. 2023.
"""

from collections.abc import Sequence

import numpy as np

from lama.shapes import Array


def fourier_basis(p: int) -> Array:
    """Orthonormal waves over 0 ... p − 1, rows of (p, p): the constant, then cosine and sine by frequency.

    Raises ValueError for an even p, whose last frequency has no sine.
    """
    if p < 3 or p % 2 == 0:
        raise ValueError(f"p must be odd and at least 3; got p={p}")
    angles = 2 * np.pi / p * np.outer(np.arange(1, p // 2 + 1), np.arange(p))  # (frequencies, p)
    waves = np.stack([np.cos(angles), np.sin(angles)], 1).reshape(p - 1, p)
    return np.concatenate([np.full((1, p), p**-0.5), waves * (2 / p) ** 0.5])


def spectrum(matrix: Array) -> Array:
    """Share of each frequency, ((p − 1) / 2,), in the squares of a matrix (p, d) minus its mean row."""
    energy = _energy((fourier_basis(len(matrix)) @ matrix)[1:])
    return energy / energy.sum()


def sum_spectrum(logits: Array) -> Array:
    """Share of each frequency of a + b in the variance of logits: (p, p, p) -> ((p − 1) / 2,).

    The variance is that of the logits after `centre`.
    """
    centred, p = centre(logits), len(logits)
    energy = _energy(sum_waves(p, range(1, p // 2 + 1)) @ centred.reshape(p * p, -1))
    return energy / (centred**2).sum()


def centre(logits: Array) -> Array:
    """Subtract from logits (p, p, n) each answer's mean over the pairs, and each pair's over the answers."""
    logits = logits - logits.mean((0, 1))
    return logits - logits.mean(2, keepdims=True)


def sum_waves(p: int, frequencies: Sequence[int]) -> Array:
    """Orthonormal waves of a + b, two for each frequency: (2 · frequencies, p²)."""
    rows = [row for k in frequencies for row in (2 * k - 1, 2 * k)]
    sums = np.add.outer(np.arange(p), np.arange(p)) % p
    return fourier_basis(p)[rows][:, sums.reshape(-1)] / p**0.5


def waves_of(logits: Array, frequencies: Sequence[int]) -> Array:
    """The part of logits (p, p, n) in waves of a + b with these frequencies."""
    p = len(logits)
    waves = sum_waves(p, frequencies)
    return (waves.T @ (waves @ logits.reshape(p * p, -1))).reshape(logits.shape)


def restricted(logits: Array, frequencies: Sequence[int]) -> Array:
    """Logits (p, p, n): the waves of these frequencies and the mean over pairs."""
    return waves_of(logits, frequencies) + logits.mean((0, 1))


def excluded(logits: Array, frequencies: Sequence[int]) -> Array:
    """Logits (p, p, n) without the waves of these frequencies."""
    return logits - waves_of(logits, frequencies)


def key_frequencies(shares: Array, least: float = 0.01) -> list[int]:
    """Frequencies with at least this share of a spectrum, the largest first."""
    order = np.argsort(-shares, kind="stable")
    return [int(i) + 1 for i in order if shares[i] >= least]


def tuned(neurons: Array) -> tuple[Array, Array]:
    """The frequency that explains most of each neuron (p, p, n), and its share of the variance.

    A frequency explains the waves of a and of b and their products. A constant neuron has the share 0.
    """
    p, _, n = neurons.shape
    basis = fourier_basis(p)
    waves = (basis @ (neurons - neurons.mean((0, 1))).transpose(2, 0, 1) @ basis.T) ** 2  # (n, p, p)
    own = [[0, 2 * k - 1, 2 * k] for k in range(1, p // 2 + 1)]
    energy = np.stack([waves[:, rows][:, :, rows].sum((1, 2)) for rows in own])  # (frequencies, n)
    total = waves.sum((1, 2))
    best = energy.argmax(0)
    shares = np.divide(energy[best, np.arange(n)], total, out=np.zeros(n), where=total > 0)
    return best + 1, shares


def _energy(waves: Array) -> Array:
    """Energy by frequency of cosines and sines (2 · frequencies, d)."""
    return np.asarray((waves**2).sum(1).reshape(-1, 2).sum(1))
