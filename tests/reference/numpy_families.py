"""A Llama and a GPT-NeoX in plain numpy, float64, without a cache. They share no code with lama.

Names are lama's: w["blocks.0.attn.qkv.weight"] has the rows of q, then k, then v.
Source: Touvron et al. 2023, section 2.2; Black et al. 2022, section 2.1.
"""

import math

import numpy as np

Arrays = dict[str, np.ndarray]


def rotated(x: np.ndarray, theta: float, width: int) -> np.ndarray:
    """(..., T, d): the first `width` numbers of each head are rotated by their position."""
    half = width // 2
    angles = np.arange(x.shape[-2])[:, None] / theta ** (np.arange(half) / half)
    a, b, rest = x[..., :half], x[..., half:width], x[..., width:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles), rest], -1
    )


def heads(x: np.ndarray, d: int) -> np.ndarray:
    """(T, n d) -> (n, T, d)."""
    return x.reshape(len(x), -1, d).transpose(1, 0, 2)


def attention(x: np.ndarray, w: Arrays, at: str, c: dict) -> np.ndarray:
    """(T, d_model) -> (T, d_model), causal; each head of keys serves as many heads of queries."""
    d, theta, width = c["d_head"], c["theta"], c["rotated"]
    joined = x @ w[f"{at}.qkv.weight"].T + w.get(f"{at}.qkv.bias", 0)
    ends = np.cumsum([c["n_heads"] * d, c["n_kv_heads"] * d])
    q, k, v = (heads(part, d) for part in np.split(joined, ends, axis=-1))
    q, k = rotated(q, theta, width), rotated(k, theta, width)
    n = c["n_heads"] // c["n_kv_heads"]
    scores = q @ k.repeat(n, 0).transpose(0, 2, 1) / math.sqrt(d)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    pattern = np.exp(scores - scores.max(-1, keepdims=True))
    z = pattern / pattern.sum(-1, keepdims=True) @ v.repeat(n, 0)
    return z.transpose(1, 0, 2).reshape(len(x), -1) @ w[f"{at}.out.weight"].T + w.get(f"{at}.out.bias", 0)


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def llama(tokens: np.ndarray, w: Arrays, c: dict) -> np.ndarray:
    """The logits after each of T tokens; tied embeddings."""
    x = w["embed.weight"][tokens]
    for i in range(c["n_layers"]):
        at = f"blocks.{i}"
        x = x + attention(rms(x, w[f"{at}.ln1.weight"]), w, f"{at}.attn", c)
        y = rms(x, w[f"{at}.ln2.weight"])
        gate = y @ w[f"{at}.mlp.gate.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * (y @ w[f"{at}.mlp.up.weight"].T)
        x = x + hidden @ w[f"{at}.mlp.down.weight"].T
    return rms(x, w["ln_final.weight"]) @ w["embed.weight"].T


def gpt_neox(tokens: np.ndarray, w: Arrays, c: dict) -> np.ndarray:
    """The logits after each of T tokens; attention and MLP of a block read the same x."""
    x = w["embed.weight"][tokens]
    for i in range(c["n_layers"]):
        at = f"blocks.{i}"
        one, two = (layer_norm(x, w[f"{at}.{n}.weight"], w[f"{at}.{n}.bias"]) for n in ("ln1", "ln2"))
        hidden = two @ w[f"{at}.mlp.up.weight"].T + w[f"{at}.mlp.up.bias"]
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        mlp = hidden @ w[f"{at}.mlp.down.weight"].T + w[f"{at}.mlp.down.bias"]
        x = x + attention(one, w, f"{at}.attn", c) + mlp
    return layer_norm(x, w["ln_final.weight"], w["ln_final.bias"]) @ w["unembed.weight"].T
