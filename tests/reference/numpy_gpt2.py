"""GPT-2 in plain numpy: the specification that lama's models are held against. It shares no code with lama.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names as in Hugging Face's
files.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]  # without the `transformer.` prefix
_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def logits(weights: Weights, config: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """(B, T) token ids -> (B, T, vocab_size) scores of the token that follows each."""
    x = hidden(weights, config, tokens)  # (B, T, n_embd)
    return x @ weights["wte.weight" if config.get("tie_word_embeddings", True) else "lm_head.weight"].T


def hidden(weights: Weights, config: Mapping[str, Any], tokens: np.ndarray) -> np.ndarray:
    """(B, T) token ids -> (B, T, n_embd), the residual stream after the last norm."""
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][: tokens.shape[1]]
    for i in range(config["n_layer"]):
        w = {
            name.removeprefix(f"h.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"h.{i}.")
        }
        scale = (
            1 / math.sqrt(config["n_embd"] // config["n_head"])
            if config.get("scale_attn_weights", True)
            else 1.0
        )
        scale /= i + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1
        x = x + attention(w, config["n_head"], norm(w, "ln_1", x, config), scale)
        x = x + mlp(w, config["activation_function"], norm(w, "ln_2", x, config))
    return norm(weights, "ln_f", x, config)


def norm(w: Weights, name: str, x: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Mean 0 and variance 1 over the last axis, then scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"])
    return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def conv1d(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """x W + b, with W stored as (in, out)."""
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w: Weights, n_head: int, x: np.ndarray, scale: float) -> np.ndarray:
    """Causal self-attention with `n_head` heads side by side, their scores q · k times `scale`."""
    B, T, d = x.shape
    q, k, v = (
        part.reshape(B, T, n_head, d // n_head).transpose(0, 2, 1, 3)  # (B, n_head, T, d_head)
        for part in np.split(conv1d(w, "attn.c_attn", x), 3, axis=-1)
    )
    scores = q @ k.transpose(0, 1, 3, 2) * scale  # (B, n_head, T, T)
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    z = weights / weights.sum(-1, keepdims=True) @ v  # (B, n_head, T, d_head)
    return conv1d(w, "attn.c_proj", z.transpose(0, 2, 1, 3).reshape(B, T, d))


def mlp(w: Weights, activation: str, x: np.ndarray) -> np.ndarray:
    """Up, activation, down: each position on its own."""
    return conv1d(w, "mlp.c_proj", ACTIVATIONS[activation](conv1d(w, "mlp.c_fc", x)))
