"""How a model adds modulo an odd p: it turns a and b into waves of a few frequencies. Source: Nanda et al. 2023.

A frequency k = 1 ... (p − 1) / 2 stands for cos(2πk·x / p) and sin(2πk·x / p). Arrays are numpy's, (p, p, ...) over all pairs (a, b).
"""

from collections.abc import Sequence

import numpy as np


def fourier_basis(p: int) -> np.ndarray:
    """Orthonormal waves over 0 ... p − 1, (p, p), a row each: the constant, then cosine and sine of frequency 1, of 2, ...

    Raises ValueError for an even p, whose last frequency has no sine.
    """
    if p < 3 or p % 2 == 0:
        raise ValueError(f"p must be odd and at least 3; got p={p}")
    angles = 2 * np.pi / p * np.outer(np.arange(1, p // 2 + 1), np.arange(p))  # (frequencies, p)
    waves = np.stack([np.cos(angles), np.sin(angles)], 1).reshape(p - 1, p)
    return np.concatenate([np.full((1, p), p**-0.5), waves * (2 / p) ** 0.5])


def spectrum(matrix: np.ndarray) -> np.ndarray:
    """Which share of a matrix (p, d), its mean over the rows taken away, is in waves of each frequency: ((p − 1) / 2,)."""
    return _shares((fourier_basis(len(matrix)) @ matrix)[1:])


def sum_spectrum(logits: np.ndarray) -> np.ndarray:
    """Which share of the logits' variance is in waves of a + b of each frequency: (p, p, p) -> ((p − 1) / 2,).

    The variance is what is left without each answer's mean over all pairs and each pair's mean over all answers.
    """
    centred = centre(logits)
    p = len(logits)
    energy = ((sum_waves(p, range(1, p // 2 + 1)) @ centred.reshape(p * p, -1)) ** 2).sum(1)
    shares: np.ndarray = energy.reshape(-1, 2).sum(1) / (centred**2).sum()
    return shares


def centre(logits: np.ndarray) -> np.ndarray:
    """(p, p, n) without each answer's mean over all pairs, nor each pair's over all answers, which no softmax sees."""
    logits = logits - logits.mean((0, 1))
    centred: np.ndarray = logits - logits.mean(2, keepdims=True)
    return centred


def sum_waves(p: int, frequencies: Sequence[int]) -> np.ndarray:
    """Orthonormal waves of a + b, two for each frequency: (2 · frequencies, p²)."""
    rows = [row for k in frequencies for row in (2 * k - 1, 2 * k)]
    sums = np.add.outer(np.arange(p), np.arange(p)) % p
    waves: np.ndarray = fourier_basis(p)[rows][:, sums.reshape(-1)] / p**0.5
    return waves


def waves_of(logits: np.ndarray, frequencies: Sequence[int]) -> np.ndarray:
    """The part of the logits (p, p, n) that is in waves of a + b of these frequencies."""
    p = len(logits)
    waves = sum_waves(p, frequencies)
    return (waves.T @ (waves @ logits.reshape(p * p, -1))).reshape(logits.shape)


def restricted(logits: np.ndarray, frequencies: Sequence[int]) -> np.ndarray:
    """The logits (p, p, n) that are left of these if all but the waves of these frequencies is replaced by its mean over the pairs."""
    return waves_of(logits, frequencies) + logits.mean((0, 1))


def excluded(logits: np.ndarray, frequencies: Sequence[int]) -> np.ndarray:
    """The logits (p, p, n) without the waves of these frequencies."""
    return logits - waves_of(logits, frequencies)


def key_frequencies(shares: np.ndarray, least: float = 0.01) -> list[int]:
    """The frequencies with at least this share of a spectrum, the largest first."""
    order = np.argsort(-shares, kind="stable")
    return [int(i) + 1 for i in order if shares[i] >= least]


def tuned(neurons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each neuron, activations (p, p, n), the frequency that explains most of it, and the share of its variance that it explains.

    A frequency explains what its waves of a, of b, and their products make up. A neuron that never changes has the share 0.
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


def _shares(waves: np.ndarray) -> np.ndarray:
    """The energies of cosines and sines (2 · frequencies, d), together by frequency, as shares of all."""
    energy = (waves**2).sum(1).reshape(-1, 2).sum(1)
    shares: np.ndarray = energy / energy.sum()
    return shares
