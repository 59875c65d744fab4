"""BERT in plain numpy (float64), written from the paper and google-research/bert; shares no code with lama.

Weights come by lama's names; `config` has the fields of lama's config. Source: Devlin et al. 2018; Vaswani et
al. 2017.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def encoder(w: Weights, config: Any, tokens: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    """(B, T) -> (B, T, d_model)."""
    w = {name.removeprefix("encoder."): value.astype(np.float64) for name, value in w.items()}
    x = w["embed.weight"][tokens] + w["pos_embed.weight"][: tokens.shape[1]]
    if config.segments:
        x = x + w["segment_embed.weight"][np.zeros_like(tokens) if segments is None else segments]
    if config.norm == "post":
        x = norm(w, "ln_embed", x, config)
    there = tokens != config.pad  # (B, T)
    for i in range(config.n_layers):
        b = f"blocks.{i}"
        if config.norm == "post":
            x = norm(w, f"{b}.ln1", x + attention(w, f"{b}.attn", config, x, there), config)
            x = norm(w, f"{b}.ln2", x + mlp(w, f"{b}.mlp", config, x), config)
        else:
            x = x + attention(w, f"{b}.attn", config, norm(w, f"{b}.ln1", x, config), there)
            x = x + mlp(w, f"{b}.mlp", config, norm(w, f"{b}.ln2", x, config))
    return norm(w, "ln_final", x, config) if config.norm == "pre" else x


def masked_logits(
    w: Weights, config: Any, tokens: np.ndarray, segments: np.ndarray | None = None
) -> np.ndarray:
    """(B, T) -> (B, T, vocab_size): a score for every token that may belong at each position."""
    h = ACTIVATIONS[config.activation](linear(w, "dense", encoder(w, config, tokens, segments)))
    return norm(w, "ln_head", h, config) @ w["encoder.embed.weight"].T + w["unembed_bias"]


def class_logits(w: Weights, config: Any, tokens: np.ndarray) -> np.ndarray:
    """(B, T) -> (B, classes)."""
    rows = []
    for x, row in zip(encoder(w, config, tokens), tokens, strict=True):
        rows.append(x[0] if config.pooling == "first" else x[row != config.pad].mean(0))
    return linear(w, "head", np.stack(rows))


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """x Wᵀ + b, with W stored as (out, in)."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(w: Weights, name: str, x: np.ndarray, config: Any) -> np.ndarray:
    """Mean 0 and variance 1 over the last axis, then scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_epsilon) * w[
        f"{name}.weight"
    ] + w.get(f"{name}.bias", 0)


def attention(w: Weights, name: str, config: Any, x: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Every position looks at all positions of its row that are there."""
    B, T, d = x.shape
    q, k, v = (
        # (B, n_heads, T, d_head).
        part.reshape(B, T, config.n_heads, d // config.n_heads).transpose(0, 2, 1, 3)
        for part in np.split(linear(w, f"{name}.qkv", x), 3, axis=-1)
    )
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(d // config.n_heads)  # (B, n_heads, T, T)
    scores = np.where(there[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    z = weights / weights.sum(-1, keepdims=True) @ v  # (B, n_heads, T, d_head)
    return linear(w, f"{name}.out", z.transpose(0, 2, 1, 3).reshape(B, T, d))


def mlp(w: Weights, name: str, config: Any, x: np.ndarray) -> np.ndarray:
    """Up, activation, down: each position on its own."""
    return linear(w, f"{name}.down", ACTIVATIONS[config.activation](linear(w, f"{name}.up", x)))
