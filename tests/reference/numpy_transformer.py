"""The encoder-decoder's forward pass in plain numpy: the reference for `lama.models.encoder_decoder`.

Written from Vaswani et al. 2017 alone and sharing no code with lama. Parameters come under lama's names;
their dtype is the precision of everything: float64 for exact answers.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]


def logits(w: Weights, config: Mapping[str, Any], source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(B, S), (B, T) token ids -> (B, T, vocab_size): row t scores what follows target[:, : t + 1]."""
    seen = source != config["pad"]  # (B, S)
    memory = encode(w, config, source, seen)
    n = target.shape[1]
    causal = np.arange(n)[:, None] >= np.arange(n)  # (T, T): query, key
    own = causal[None] & (target != config["pad"])[:, None, :]  # (B, T, T)
    x = embed(w, target)
    for i in range(config["n_decoder_layers"]):
        b = block(w, f"decoder.blocks.{i}.")
        x = sublayer(x, b, "ln1", config, lambda h, b=b: attend(b, "attn", config, h, h, own))
        x = sublayer(
            x,
            b,
            "ln_cross",
            config,
            lambda h, b=b: attend(b, "cross_attn", config, h, memory, seen[:, None, :]),
        )
        x = sublayer(x, b, "ln2", config, lambda h, b=b: feed_forward(b, h))
    return last_norm(w, "decoder", config, x) @ w["embed.weight"].T


def encode(w: Weights, config: Mapping[str, Any], source: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(B, S) token ids -> (B, S, d_model)."""
    x = embed(w, source)
    for i in range(config["n_encoder_layers"]):
        b = block(w, f"encoder.blocks.{i}.")
        x = sublayer(x, b, "ln1", config, lambda h, b=b: attend(b, "attn", config, h, h, seen[:, None, :]))
        x = sublayer(x, b, "ln2", config, lambda h, b=b: feed_forward(b, h))
    return last_norm(w, "encoder", config, x)


def embed(w: Weights, tokens: np.ndarray) -> np.ndarray:
    """√d times the tokens' rows, plus sines and cosines of the position (section 3.5)."""
    d = w["embed.weight"].shape[1]
    positions = np.empty((tokens.shape[1], d))
    for p in range(tokens.shape[1]):
        for j in range(d):
            angle = p / 10000 ** (2 * (j // 2) / d)
            positions[p, j] = math.cos(angle) if j % 2 else math.sin(angle)
    return w["embed.weight"][tokens] * math.sqrt(d) + positions


def block(w: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def sublayer(x: np.ndarray, b: Weights, norm: str, config: Mapping[str, Any], f: Any) -> np.ndarray:
    if config["norm"] == "pre":
        return x + f(layer_norm(b, norm, config, x))
    return layer_norm(b, norm, config, x + f(x))


def last_norm(w: Weights, stack: str, config: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    return layer_norm(w, f"{stack}.ln_final", config, x) if config["norm"] == "pre" else x


def layer_norm(b: Weights, name: str, config: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + config["norm_epsilon"]) * b[f"{name}.weight"] + b[f"{name}.bias"]


def attend(
    b: Weights, name: str, config: Mapping[str, Any], x: np.ndarray, read: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """Queries from x (B, T, d), keys and values from `read` (B, S, d); seen (B, 1 or T, S)."""
    d, h = x.shape[-1], config["n_heads"]
    weight, bias = b[f"{name}.qkv.weight"], b[f"{name}.qkv.bias"]
    q = x @ weight[:d].T + bias[:d]
    k = read @ weight[d : 2 * d].T + bias[d : 2 * d]
    v = read @ weight[2 * d :].T + bias[2 * d :]
    heads = []
    for part in np.split(np.arange(d), h):
        scores = np.einsum("btd,bsd->bts", q[..., part], k[..., part]) / math.sqrt(d // h)
        scores = np.where(seen, scores, -np.inf)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(e / e.sum(-1, keepdims=True) @ v[..., part])
    return np.concatenate(heads, -1) @ b[f"{name}.out.weight"].T + b[f"{name}.out.bias"]


def feed_forward(b: Weights, x: np.ndarray) -> np.ndarray:
    """max(0, x W₁ + b₁) W₂ + b₂."""
    return (
        np.maximum(x @ b["mlp.up.weight"].T + b["mlp.up.bias"], 0) @ b["mlp.down.weight"].T
        + b["mlp.down.bias"]
    )
