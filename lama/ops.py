"""All of lama's maths in plain tinygrad: layers and models are made of these functions.

Most functions first call the function of the same name in `lama.kernels`. It computes the same result faster,
or returns None if it does not support the case. The rest of the function is the reference with which tests
compare the kernel. With LAMA_REFERENCE=1 no kernel is used. To materialise or realise a tensor is to write it
to memory.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor, dtypes

from lama import kernels
from lama.kernels.dropout import threshold
from lama.kernels.matmul import reduced_precision
from lama.kernels.optimizer import Run
from lama.kernels.quantized import BLOCK, CANDIDATES, GROUP, Quantized, row_sizes, side_by_side
from lama.shapes import Array

HIDDEN = -3.4e38  # the score of a hidden key; finite, so that a row of hidden keys is uniform and not NaN
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: consecutive sites of dropout start far apart
FloatArray = NDArray[np.float32]


def matmul(
    a: Tensor,
    b: Tensor | Quantized,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """a · b + bias over the last two axes: (..., M, K) · (..., K, N) + (N,) -> (..., M, N).

    a and b may be transposed first. Either both have the same leading axes, or b has none. The result has a's
    dtype. b in half precision is converted to float32 as it is read. If b is bfloat16, a is rounded to it,
    which some processors multiply faster; sums stay float32. A quantised b has the axes (N, K) and needs
    `transpose_b`; if `b.rounds`, `round_activations` is applied to a. Raises ValueError if the inner sizes
    differ.
    """
    inner = a.shape[-2 if transpose_a else -1], b.shape[-1 if transpose_b else -2]
    if inner[0] != inner[1]:
        raise ValueError(f"the inner sizes of a product must agree; got {a.shape} and {b.shape}")
    if isinstance(b, Quantized) and (transpose_a or not transpose_b):
        raise ValueError("a quantised b needs transpose_b, and an a that is not transposed")
    if (y := kernels.matmul(a, b, transpose_a, transpose_b, bias)) is not None:
        return y
    if isinstance(b, Quantized):
        return matmul(round_activations(a) if b.rounds else a, dequantize(b), transpose_a, transpose_b, bias)
    low = reduced_precision()  # bfloat16 in mixed precision, else None
    if low is None and b.dtype == dtypes.bfloat16:
        a = a.cast(b.dtype).contiguous().cast(a.dtype)  # without contiguous the casts would cancel
    a, b = a.cast(low or a.dtype), b.cast(low or a.dtype)
    a = a.transpose(-2, -1) if transpose_a else a
    b = b.transpose(-2, -1) if transpose_b else b
    y = a.matmul(b, dtype=None if low is None else dtypes.float32)
    # Materialised: else this output's gradient would be computed once for the bias, again for the weight.
    return y if bias is None else (y + bias).contiguous_backward()


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, materialised, so that the operations that read it do not each compute it again."""
    if (total := kernels.add(x, y)) is not None:
        return total
    return (x + y).contiguous()


def gelu(x: Tensor) -> Tensor:
    """x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2. Source: Hendrycks & Gimpel 2016, section 2."""
    if (y := kernels.gelu(x)) is not None:
        return y
    return x.gelu()


def gated(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) · up, materialised. Source: Shazeer 2020."""
    if (y := kernels.gated(gate, up, activation.__name__)) is not None:
        return y
    return (activation(gate) * up).contiguous()


def softmax(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) over the last axis, in float32."""
    if (y := kernels.softmax(x)) is not None:
        return y
    return x.float().softmax(-1)


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x − mean) / √(variance + ε) · weight + bias over the last axis; weight and bias (d,), x (..., d).

    Source: Ba et al. 2016, eq. 4; biased variance. The statistics are float32, the result has x's dtype.
    """
    if weight is not None and (y := kernels.layernorm(x, weight, bias, epsilon)) is not None:
        return y
    y = x.float().layernorm(eps=epsilon).cast(x.dtype)
    y = y if weight is None else y * weight
    # Materialised: the product that follows would normalise again for each of its outputs.
    return (y if bias is None else y + bias).contiguous()


def rmsnorm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """x / √(mean(x²) + ε) · weight over the last axis; weight (d,), x (..., d).

    The mean is float32, the result has x's dtype. Source: Zhang & Sennrich 2019, eq. 4.
    """
    if weight is not None and (y := kernels.rmsnorm(x, weight, epsilon)) is not None:
        return y
    wide = x.float()
    y = (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).cast(x.dtype)
    return (y if weight is None else y * weight).contiguous()


def rotate(x: Tensor, table: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding of queries or keys x (B, H, T, d): the token at position p is rotated by p.

    Row p of `table` (length, 2 r) has r cosines, then r sines. Numbers i and i + r of a head are the two
    coordinates of a point, which is rotated by angle i. Numbers after the first 2 r are unchanged. Tokens are
    at consecutive positions from positions (B,), or at positions (B, T), or, without them, from 0. Source: Su
    et al. 2021, section 3.4.
    """
    if (y := kernels.rotate(x, table, positions)) is not None:
        return y
    r, T = int(table.shape[1]) // 2, int(x.shape[2])
    angles = position_rows(table, T, positions)  # (T, 2 r), or (B, T, 2 r)
    angles = angles if positions is None else angles.unsqueeze(1)
    cos, sin = angles[..., :r], angles[..., r:]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return first.mul(cos).sub(second * sin).cat(second * cos + first * sin, rest, dim=-1).contiguous()


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """Repeat heads of keys or values for all queries: (B, K, S, d) -> (B, n_heads, S, d), n_heads / K times.

    Source: Ainslie et al. 2023 (grouped-query attention).
    """
    B, K, S, d = x.shape
    return x if n_heads == K else x.unsqueeze(2).expand(B, K, n_heads // K, S, d).reshape(B, n_heads, S, d)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    offset: int | None = None,
    padding: Tensor | None = None,
    rate: float = 0.0,
    key: Tensor | None = None,
    site: int = 0,
    window: int = 0,
    starts: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(q kᵀ · scale)) v: (B, H, T, d), (B, K, S, d), (B, K, S, e) -> (B, H, T, e).

    Query head h reads the keys and values of head h // (H / K). The axes H and K may be absent from all. With
    an `offset` of at least 0, attention is causal: query t sees the keys up to offset + t. A `window` limits
    these to the last `window`, and `starts` (B, T) to those from starts[b, t] on. starts[b, t] never
    decreases with t and is at most offset + t. `padding` (B or 1, 1, 1, S), without the axis H (B or 1, 1,
    S), is True for keys that may be seen. A query that sees nothing gets the mean of all values. `rate`,
    `key` and `site` are those of `dropout`. Source: Vaswani et al. 2017, eq. 1.
    """
    z = kernels.attention(q, k, v, scale, offset, padding, rate, key, site, window, starts)
    if z is not None:
        return z
    T, S = int(q.shape[-2]), int(k.shape[-2])
    if q.ndim == 4:
        k, v = repeat_heads(k, int(q.shape[1])), repeat_heads(v, int(q.shape[1]))
    seen = None
    if offset is not None:
        seen = in_sight(Tensor.arange(T).reshape(T, 1) + offset, Tensor.arange(S), window)
        seen = seen if starts is None else seen & from_starts(starts, S, q.ndim)
    if padding is not None:
        seen = padding if seen is None else seen & padding
    pattern = softmax(hide(matmul(q, k, transpose_b=True) * scale, seen))
    return matmul(pattern if key is None else dropout(pattern, rate, key, site), v)


def in_sight(queries: Tensor, keys: Tensor, window: int = 0) -> Tensor:
    """A mask of the positions that a query sees: none after its own, and only the last `window`, if given."""
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


def from_starts(starts: Tensor, n_keys: int, axes: int = 4) -> Tensor:
    """A mask (B, 1, T, S) of the keys from starts[b, t] on; (B, T, S) for scores of three axes."""
    starts = starts.reshape(starts.shape[0], *(1,) * (axes - 3), starts.shape[1], 1)
    return Tensor.arange(n_keys) >= starts


def hide(scores: Tensor, seen: Tensor | None) -> Tensor:
    """Scores in float32, replaced by `HIDDEN` where `seen`, which broadcasts to their shape, is False."""
    scores = scores.float()
    return scores if seen is None else seen.where(scores, HIDDEN)


def attention_in_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Write k and v of new tokens into a cache; return the attention of q (B, H, T, d) to all its keys.

    The other arguments are those of `write_to_cache` and `attention`. Query t sees the keys up to
    positions[b] + t. The result has no gradient.
    """
    z = kernels.attention_in_cache(q, k, v, keys, values, positions, rows, scale, window)
    if z is not None:
        return z
    k, v, seen = write_to_cache(k, v, keys, values, positions, rows, window)
    k, v = repeat_heads(k, int(q.shape[1])), repeat_heads(v, int(q.shape[1]))
    return matmul(softmax(hide(matmul(q, k, transpose_b=True) * scale, seen)), v)


def write_to_cache(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write k and v, (B, K, T, d), into the realised caches `keys` and `values`, (R rows, K, S, d), in place.

    Row b is written to row rows[b] of the cache (b if `rows` is None), from position positions[b] on. Both
    are int32 (B,); positions[b] + T is at most S. Returns all keys and values of these rows, and a mask of
    those that each new token sees, (B, 1, T, S).
    """
    write_rows(keys, k, positions, rows)
    write_rows(values, v, positions, rows)
    # Realised here, so that every layer has the same list of kernels, and tinygrad schedules it only once.
    Tensor.realize(keys, values)
    S, T = int(keys.shape[2]), int(k.shape[2])
    queries = positions.reshape(-1, 1, 1, 1) + Tensor.arange(T).reshape(1, 1, T, 1)
    seen = in_sight(queries, Tensor.arange(S).reshape(1, 1, 1, S), window)  # (B, 1, T, S)
    return (keys, values, seen) if rows is None else (keys[rows], values[rows], seen)


def write_rows(buffer: Tensor, new: Tensor, positions: Tensor, rows: Tensor | None) -> None:
    """Assign `new` (B, H, T, d) to its places in `buffer` (R, H, S, d), as `write_to_cache` describes.

    tinygrad has no scatter: products with one-hot matrices move the tokens. `rows` must be distinct.
    """
    old = buffer if rows is None else buffer[rows]  # (B, H, S, d)
    S, T = int(old.shape[2]), int(new.shape[2])
    place = Tensor.arange(S) - positions.reshape(-1, 1)  # (B, S): which of the T tokens belongs there
    is_new = ((place >= 0) & (place < T)).reshape(-1, 1, S, 1)
    one_hot = (place.unsqueeze(-1) == Tensor.arange(T)).unsqueeze(1)  # (B, 1, S, T)
    moved = one_hot.cast(new.dtype).matmul(new, dtype=dtypes.float32)  # (B, H, S, d)
    written = is_new.where(moved.cast(buffer.dtype), old)
    if rows is not None:
        is_row = (rows.reshape(-1, 1) == Tensor.arange(buffer.shape[0])).float()  # (B, R)
        spread = is_row.transpose().matmul(written.float().flatten(1)).reshape(buffer.shape)
        is_written = (is_row.sum(0) > 0).reshape(-1, 1, 1, 1)
        written = is_written.where(spread.cast(buffer.dtype), buffer)
    buffer.assign(written)


def embedding(weight: Tensor | Quantized, tokens: Tensor) -> Tensor:
    """weight[tokens] in float32: (rows, d), (..., T) ints -> (..., T, d). Tokens without a row give zeros."""
    if (y := kernels.embedding(weight, tokens)) is not None:
        return y
    rows = dequantize(weight, tokens) if isinstance(weight, Quantized) else weight.float()[tokens]
    # tinygrad gives zeros for tokens past the last row, and counts negative ones from the end.
    return (tokens < 0).unsqueeze(-1).where(0, rows)


def position_rows(table: Tensor, n: int, positions: Tensor | None = None) -> Tensor:
    """n rows of `table` (length, d): the first n, (n, d), or with `positions` (B, n, d) in float32.

    The latter are consecutive rows from positions (B,), or the rows at positions (B, n).
    """
    if positions is not None and positions.ndim == 2:
        return embedding(table, positions)
    # Widened first: tinygrad gathers by adding up, which some devices cannot do in bfloat16.
    rows = table[:n] if positions is None else table.float()[positions.reshape(-1, 1) + Tensor.arange(n)]
    return kernels.fusible_rows(rows, table, n, positions)


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """−log softmax(logits)[target] in float32: (..., V), (...) ints -> (...). Large logits are safe.

    With `smoothing` ε, the target distribution is (1 − ε) · one-hot + ε · uniform. Source: Szegedy et al.
    2016, section 7.
    """
    if (losses := kernels.cross_entropy(logits, targets, smoothing)) is not None:
        return losses
    logits = logits.float()
    one_hot = targets.unsqueeze(-1) == Tensor.arange(logits.shape[-1])  # (..., V), never in memory
    picked = one_hot.where(logits, 0).sum(-1)
    expected = picked if smoothing == 0 else (1 - smoothing) * picked + smoothing * logits.mean(-1)
    return logits.logsumexp(-1) - expected


def dropout(x: Tensor, rate: float, key: Tensor, site: int) -> Tensor:
    """x / (1 − rate), but each element is 0 with probability `rate`; float32, at most 2³² elements.

    The mask depends only on `key`, uint32 of shape (2,), and on `site`, an int below 2³². key[0] changes with
    each step. key[1] is the index of x's first row in the step's whole batch. So the parts of a batch drop
    the same elements as the whole. Element i of the flattened batch is kept if mix(mix(i ^ seed) + seed)
    >= rate · 2³², with seed = mix(key[0] + site · 2³²/φ), in 32 bits. Raises ValueError unless 0 <= rate < 1.
    Source: Srivastava et al. 2014, scaled in training; mix is Wellons's lowbias32,
    https://nullprogram.com/blog/2018/07/31/.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1; got rate={rate}")
    if rate == 0:
        return x.float()
    if (y := kernels.dropout(x, rate, key, site)) is not None:
        return y

    def mix(x: Tensor) -> Tensor:
        x = (x ^ x >> 16) * 0x7FEB352D
        x = (x ^ x >> 15) * 0x846CA68B
        return x ^ x >> 16

    n, row = math.prod(map(int, x.shape)), math.prod(map(int, x.shape[1:]))
    seed = mix(key[0:1] + site * GOLDEN % 2**32)
    i = key[1:2] * row + Tensor.arange(n, dtype=dtypes.uint32)
    stays = (mix(mix(i ^ seed) + seed) >= threshold(rate)).reshape(x.shape)
    return stays.where(x.float() * (1 / (1 - rate)), 0)


def square_parts(tensors: Sequence[Tensor]) -> Tensor:
    """Sums of x² over fixed parts of each tensor, added in the order of the tensors: float32 (parts,).

    Their sum is the square of the global norm. Adding the results for single tensors gives the same bits.
    """
    if (sums := kernels.square_parts(tensors)) is not None:
        return sums
    return sum((t.float().square().sum() for t in tensors), Tensor.zeros(1, device=tensors[0].device))


def adamw(
    parameter: Tensor,
    m: Tensor,
    v: Tensor,
    gradient: Tensor,
    scalars: Tensor,
    scale: Tensor,
    beta1: float,
    beta2: float,
    decay: float,
    epsilon: float = 1e-8,
    factor: float = 1.0,
) -> list[Tensor]:
    """Update one parameter and its moments m and v, all of one shape, in place; realise the three results.

    g = gradient · scale, m = β₁ m + (1 − β₁) g, v = β₂ v + (1 − β₂) g², p = p − r · factor · (decay · p +
    (m / c₁) / (√(v / c₂) + ε)) with `scalars` = [r, c₁, c₂] = [rate, 1 − β₁ᵗ, 1 − β₂ᵗ], float32 (3,), and
    `scale` (1,). Realise other readers of the parameter first, or they would see its new values. Source:
    Loshchilov & Hutter 2019, algorithm 2.
    """
    changed = kernels.adamw(parameter, m, v, gradient, scalars, scale, beta1, beta2, decay, epsilon, factor)
    if changed is not None:
        return changed
    rate, correction1, correction2 = scalars[0:1] * factor, scalars[1:2], scalars[2:3]
    g = gradient * scale
    m.assign(beta1 * m + (1 - beta1) * g)
    v.assign(beta2 * v + (1 - beta2) * g.square())
    step = (m / correction1) / ((v / correction2).sqrt() + epsilon)
    parameter.assign((parameter - rate * (step + decay * parameter)).cast(parameter.dtype))
    return [parameter, m, v]


def muon_directions(
    gradients: Sequence[Tensor],
    runs: Sequence[Run],
    momentum: Tensor,
    scale: Tensor,
    beta: float,
    epsilon: float = 1e-7,
) -> list[Tensor]:
    """The directions of Muon's step before `orthogonalise`, and their momentum, updated in place.

    Both are (n, rows, columns): n matrices of one shape, whose places in the gradients are `runs`. With g a
    gradient · scale, m = β m + (1 − β) g; the direction is x / (‖x‖ + ε), x = (1 − β) g + β m (Nesterov).
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    if (found := kernels.muon_directions(gradients, runs, momentum, scale, beta, epsilon)) is not None:
        return found
    _, rows, columns = map(int, momentum.shape)
    parts = [
        gradients[i][first : first + count * rows].reshape(count, rows, columns) for i, first, count in runs
    ]
    g = Tensor.cat(*parts) * scale
    momentum.assign(beta * momentum + (1 - beta) * g)
    x = (1 - beta) * g + beta * momentum
    return [x / (x.square().sum((-2, -1), keepdim=True).sqrt() + epsilon), momentum]


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Move the singular values of x (n, rows, columns), at most 1, close to 1: between 0.7 and 1.2.

    Newton–Schulz: each step is x = (a + b x xᵀ + c (x xᵀ)²) x. A tall x is instead multiplied by such a
    polynomial of xᵀx from the right. Source: Jordan et al. 2024, with their a, b and c.
    """
    rows, columns = map(int, x.shape[-2:])
    x, tall, (a, b, c) = x.contiguous(), rows > columns, (3.4445, -4.7750, 2.0315)
    unit = a * Tensor.eye(min(rows, columns))
    for _ in range(steps):
        gram = matmul(x, x, transpose_a=tall, transpose_b=not tall)
        factor = (unit + b * gram + c * matmul(gram, gram)).contiguous()
        x = matmul(x, factor) if tall else matmul(factor, x)
    return x


def muon_step(
    parameters: Sequence[Tensor],
    runs: Sequence[Run],
    directions: Tensor,
    scalars: Tensor,
    step: float,
    decay: float,
) -> list[Tensor]:
    """Update matrices p in place: p = p − r (step · direction + decay · p), r the first of `scalars`.

    `runs` are the places of the matrices in the parameters. Returns the parameters, to be realised.
    """
    if (changed := kernels.muon_step(parameters, runs, directions, scalars, step, decay)) is not None:
        return changed
    done, rows, columns = 0, int(directions.shape[1]), int(directions.shape[2])
    for i, first, count in runs:
        p, last = parameters[i], first + count * rows
        direction = directions[done : done + count].reshape(count * rows, columns)
        new = p[first:last] - scalars[0:1] * (step * direction + decay * p[first:last])
        p.assign(p[:first].cat(new, p[last:]).cast(p.dtype))
        done += count
    return list(parameters)


# --- numbers of 8 and 4 bits: each group of 32 along a row shares a scale


def round_activations(x: Tensor) -> Tensor:
    """x (..., K), each group rounded to multiples of its largest magnitude / 127: 8 bits.

    Gradients pass unchanged (the straight-through estimator). A product with quantised weights does this
    first, for any number of rows and on any processor, if `Quantized.rounds`. Groups with a scale below 1e-30
    become zeros.
    """
    if (y := kernels.round_activations(x)) is not None:
        return y
    k = int(x.shape[-1])
    groups = x.float().pad((*[None] * (x.ndim - 1), (0, -k % GROUP))).unflatten(-1, (-1, GROUP))
    scales = groups.abs().max(-1, keepdim=True) * (1 / 127)
    integers = (groups * (scales > 1e-30).where(1 / scales, 0)).contiguous().round()
    return x + ((integers * scales).flatten(-2)[..., :k].cast(x.dtype) - x).contiguous().detach()


def dequantize(weight: Quantized, rows: Tensor | None = None) -> Tensor:
    """A quantised matrix in float32, (d_out, d_in), or some of its rows: (...) ints -> (..., d_in)."""
    if rows is None and (w := kernels.dequantize(weight)) is not None:
        return w
    values, scales = weight.in_rows() if rows is None else (x[rows] for x in weight.in_rows())
    if weight.bits == 4:
        values = Tensor.stack(values & 15, values >> 4, dim=-1).flatten(-2).cast(dtypes.int8)
        values = values if weight.has_minima else values - 8
    scales, minima = _scales_and_minima(scales, weight)
    grouped = values.float().unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)
    if minima is not None:
        grouped = grouped + minima.unsqueeze(-1)
    return grouped.flatten(-2)[..., : weight.d_in]


def _scales_and_minima(scales: Tensor, weight: Quantized) -> tuple[Tensor, Tensor | None]:
    """Rows of a weight's scales -> (..., groups) each, float32."""
    if weight.in_blocks:
        blocks = scales.unflatten(-1, (-1, BLOCK))
        factors = blocks[..., :4].contiguous().bitcast(dtypes.float16).float()  # d and dmin
        small = blocks[..., 4:12].float() * factors[..., :1]
        return small.flatten(-2), (blocks[..., 12:].float() * -factors[..., 1:]).flatten(-2)
    scales, groups = scales.float(), weight.groups
    return scales[..., :groups], scales[..., groups:] if weight.has_minima else None


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Round a realised float32 matrix (d_out, d_in) to nearest.

    8 bits: the scale is the group's largest magnitude / 127. 4 bits: the best of several scales that map the
    largest weight to a value from -9 to -6.8, each refitted by least squares. A scale too large for float16
    becomes infinite; the caller must check for that.
    """
    if (quantized := kernels.quantize(weight, bits)) is not None:
        return quantized
    values, scales = side_by_side(*quantize_array(weight.numpy(), bits))
    device, d_in = weight.device, int(weight.shape[1])
    return Quantized(Tensor(values, device=device), Tensor(scales, device=device), d_in)


def quantize_array(weight: FloatArray, bits: int) -> tuple[Array, Array]:
    """`quantize` in numpy: the values and scales of the rows, as files store them."""
    d_out, d_in = weight.shape
    _, groups = row_sizes(d_in, bits)
    padded = np.zeros((d_out, groups * GROUP), np.float32)
    padded[:, :d_in] = weight
    x = padded.reshape(d_out, groups, GROUP)
    if bits == 8:
        least, most, scales = -127, 127, np.abs(x).max(-1) / 127
    else:
        least, most, scales = -8, 7, _best_scales(x)
    with np.errstate(over="ignore"):
        scales = scales.astype(np.float16)
    values = _nearest(x, _inverse(scales), least, most).reshape(d_out, -1).astype(np.int8)
    if bits == 4:
        values = (values[:, ::2] + 8 | values[:, 1::2] + 8 << 4).astype(np.uint8)
    return values, scales


def _best_scales(x: FloatArray) -> FloatArray:
    """(..., GROUP) -> (...). For integers q the best scale is Σxq / Σq²; its error is Σx² - (Σxq)² / Σq²."""
    extreme = np.where(x.max(-1) > -x.min(-1), x.max(-1), x.min(-1))
    best, scales = np.full(extreme.shape, -1, np.float32), np.zeros_like(extreme)
    for steps in CANDIDATES:
        q = _nearest(x, np.float32(-steps) * _inverse(extreme), -8, 7)
        xq, qq = (x * q).sum(-1), np.maximum((q * q).sum(-1), 1)
        better = xq * xq / qq > best
        best, scales = np.where(better, xq * xq / qq, best), np.where(better, xq / qq, scales)
    return scales


def _inverse(x: Array) -> FloatArray:
    """1 / x in float32, and 0 for 0."""
    floats = x.astype(np.float32)
    return np.divide(1, floats, out=np.zeros_like(floats), where=floats != 0)


def _nearest(x: FloatArray, inverse: FloatArray, least: int, most: int) -> FloatArray:
    return np.clip(np.rint(x * inverse[..., None]), least, most)
