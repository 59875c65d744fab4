"""One pre-norm transformer block in plain numpy, forwards and backwards by hand: the gradients that
tinygrad's are held against.

It shares no code with lama. Names are lama's: w["attn.qkv.weight"] is (3d, d), w["mlp.up.bias"] (d_mlp,), and
so on.
"""

import math

import numpy as np

Arrays = dict[str, np.ndarray]
C = math.sqrt(2 / math.pi)


def norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    scale = 1 / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    z = (x - x.mean(-1, keepdims=True)) * scale
    return z * weight + bias, (z, scale, weight)


def norm_back(dy: np.ndarray, kept: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dweight, dbias: what changes the mean or the length of z goes nowhere."""
    z, scale, weight = kept
    dz = dy * weight
    dx = scale * (dz - dz.mean(-1, keepdims=True) - z * (dz * z).mean(-1, keepdims=True))
    return dx, (dy * z).sum((0, 1)), dy.sum((0, 1))


def linear_back(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dweight, dbias of y = x Wᵀ + b."""
    return dy @ weight, np.einsum("bto,bti->oi", dy, x), dy.sum((0, 1))


def heads(x: np.ndarray, n: int) -> np.ndarray:
    """(B, T, d) -> (B, n, T, d / n)."""
    return x.reshape(*x.shape[:2], n, -1).transpose(0, 2, 1, 3)


def joined(x: np.ndarray) -> np.ndarray:
    """(B, n, T, d / n) -> (B, T, d)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def block(
    x: np.ndarray, w: Arrays, n_heads: int, dy: np.ndarray, epsilon: float = 1e-5
) -> tuple[np.ndarray, np.ndarray, Arrays]:
    """y, and for a loss with ∂loss/∂y = dy its gradients in x and in every parameter; x, y, dy (B, T, d),
    causal, tanh GELU.
    """
    T, d = x.shape[1:]
    root = math.sqrt(d // n_heads)

    n1, kept1 = norm(x, w["ln1.weight"], w["ln1.bias"], epsilon)
    q, k, v = (
        heads(part, n_heads)
        for part in np.split(n1 @ w["attn.qkv.weight"].T + w["attn.qkv.bias"], 3, axis=-1)
    )
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(-1, -2) / root, -np.inf)
    pattern = np.exp(scores - scores.max(-1, keepdims=True))
    pattern /= pattern.sum(-1, keepdims=True)
    z = joined(pattern @ v)
    middle = x + z @ w["attn.out.weight"].T + w["attn.out.bias"]

    n2, kept2 = norm(middle, w["ln2.weight"], w["ln2.bias"], epsilon)
    up = n2 @ w["mlp.up.weight"].T + w["mlp.up.bias"]
    tanh = np.tanh(C * (up + 0.044715 * up**3))
    active = up * (1 + tanh) / 2
    y = middle + active @ w["mlp.down.weight"].T + w["mlp.down.bias"]

    g: Arrays = {}
    dactive, g["mlp.down.weight"], g["mlp.down.bias"] = linear_back(dy, active, w["mlp.down.weight"])
    dup = dactive * ((1 + tanh) / 2 + up * (1 - tanh**2) / 2 * C * (1 + 3 * 0.044715 * up**2))
    dn2, g["mlp.up.weight"], g["mlp.up.bias"] = linear_back(dup, n2, w["mlp.up.weight"])
    through, g["ln2.weight"], g["ln2.bias"] = norm_back(dn2, kept2)
    dmiddle = dy + through

    dz, g["attn.out.weight"], g["attn.out.bias"] = linear_back(dmiddle, z, w["attn.out.weight"])
    dz = heads(dz, n_heads)
    dpattern = dz @ v.swapaxes(-1, -2)
    dscores = pattern * (dpattern - (dpattern * pattern).sum(-1, keepdims=True)) / root
    dqkv = np.concatenate(
        [joined(part) for part in (dscores @ k, dscores.swapaxes(-1, -2) @ q, pattern.swapaxes(-1, -2) @ dz)],
        axis=-1,
    )
    dn1, g["attn.qkv.weight"], g["attn.qkv.bias"] = linear_back(dqkv, n1, w["attn.qkv.weight"])
    through, g["ln1.weight"], g["ln1.bias"] = norm_back(dn1, kept1)
    return y, dmiddle + through, g
