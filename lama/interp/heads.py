"""Scores of attention heads: their patterns on repeated random tokens, copying, and composition.

Sources: TransformerLens, head_detector.py; Olsson et al. 2022, "In-context Learning and Induction Heads".
"""

from dataclasses import dataclass

import numpy as np

from lama.errors import LamaError
from lama.interp import MEASURES
from lama.interp.circuits import check_layers, embedding_matrix, head_weights, is_linear, unembedding_matrix
from lama.interp.record import run_with_cache
from lama.models.gpt import GPT
from lama.shapes import Array

COMPOSITIONS = ("q", "k", "v")


def match(pattern: Array, target: Array, measure: str = "mass") -> Array:
    """Agreement (...) of patterns A (..., T, S) with a target D (..., T, S) of zeros and ones.

    mass: share of attention on the ones, over queries that have one
    mul:  share over all queries: Σ A∘D / Σ A
    abs:  1 − Σ|A − D| / T, from −1 to 1; attention to zeros counts against the pattern

    mul and abs are TransformerLens's. Raises ValueError for another measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}; got {measure!r}")
    if measure == "abs":
        return np.asarray(1 - np.abs(pattern - target).sum((-1, -2)) / pattern.shape[-2])
    queries = target.any(-1, keepdims=True) if measure == "mass" else np.ones(1)
    whole = (pattern * queries).sum((-1, -2))
    hit = (pattern * target).sum((-1, -2))
    return np.divide(hit, whole, out=np.zeros(hit.shape), where=whole > 0)


def previous_token_score(pattern: Array, measure: str = "mass") -> Array:
    """Share of attention in patterns (..., T, T) on the token before the query: (...)."""
    return match(pattern, np.eye(pattern.shape[-1], k=-1), measure)


def duplicate_token_score(pattern: Array, tokens: Array, measure: str = "mass") -> Array:
    """Share of attention in patterns (..., T, T) of tokens (T,) on earlier equal tokens: (...)."""
    return match(pattern, _duplicates(tokens), measure)


def induction_score(pattern: Array, tokens: Array, measure: str = "mass") -> Array:
    """Share of attention in patterns (..., T, T) of tokens (T,) on tokens after an equal one: (...)."""
    after = np.roll(_duplicates(tokens), 1, axis=1)
    after[:, 0] = 0
    return match(pattern, np.tril(after), measure)


def _duplicates(tokens: Array) -> Array:
    """Ones (T, T) where the key is an earlier token equal to the query."""
    return np.tril(tokens[:, None] == tokens[None, :], k=-1).astype(float)


def copying_score(model: GPT) -> Array:
    """Σλ / Σ|λ| over the eigenvalues λ of each head's full OV circuit W_E W_V W_O W_U: (n_layers, H).

    1: attention to a token always makes that token likelier; −1: always less likely. Only d_head eigenvalues
    are not zero, those of W_O W_U W_E W_V. Source: Elhage et al. 2021. Raises LamaError as `check_linear`.
    """
    heads = head_weights(model)
    around = unembedding_matrix(model) @ embedding_matrix(model)  # (d_model, d_model)
    circuits = (heads.output @ around @ heads.value).astype(np.float64)
    values = np.linalg.eigvals(circuits)  # (n_layers, H, d_head)
    size = np.abs(values).sum(-1)
    return np.divide(values.sum(-1).real, size, out=np.zeros(size.shape), where=size > 0)


def composition(model: GPT, kind: str) -> Array:
    """How much a head reads of an earlier head's output: (n_layers, H, n_layers, H), the earlier one first.

    ‖A B‖ / (‖A‖ ‖B‖) in Frobenius norms, with A = W_V W_O of the first head and B of the later one, by
    `kind`: "q" W_Q W_Kᵀ, "k" its transpose, "v" W_V W_O. Two random heads have about 1 / √d_model. The score
    is 0 unless the second head is in a later layer. Source: Elhage et al. 2021. Raises ValueError for another
    kind, LamaError as `check_linear` does, and for q and k if scores are not their products.
    """
    if kind not in COMPOSITIONS:
        raise ValueError(f"kind must be one of {', '.join(COMPOSITIONS)}; got {kind!r}")
    if kind != "v" and model.config.similarity == "additive":
        rule = "q- and k-composition need scores that are products of q and k"
        raise LamaError(f"{rule}; got similarity=additive")
    heads = head_weights(model)
    output = heads.output.swapaxes(-1, -2)
    # B = left @ rightᵀ, both (n_layers, H, d_model, d_head)
    sides = {"q": (heads.query, heads.key), "k": (heads.key, heads.query), "v": (heads.value, output)}
    left, right = sides[kind]
    written, moved = _gram(output), _gram(heads.value)
    first = np.sqrt(np.einsum("lhij,lhji->lh", written, moved))  # ‖A‖
    second = np.sqrt(np.einsum("lhij,lhji->lh", _gram(left), _gram(right)))
    scores = np.zeros((*first.shape, *second.shape))
    for early in range(len(first)):
        for late in range(early + 1, len(second)):
            between = heads.output[early][:, None] @ left[late][None]  # (H, H, d_head, d_head)
            inner = moved[early][:, None] @ between @ _gram(right)[late][None]
            norms = first[early][:, None] * second[late][None]
            squares = np.maximum((inner * between).sum((-1, -2)), 0)
            out = np.zeros(norms.shape)
            scores[early, :, late] = np.divide(np.sqrt(squares), norms, out=out, where=norms > 0)
    return scores


def _gram(weight: Array) -> Array:
    """WᵀW, which gives the norm of a product with W."""
    return weight.swapaxes(-1, -2) @ weight


@dataclass(frozen=True)
class HeadScores:
    """Scores of all heads, each (n_layers, H)."""

    previous_token: Array
    duplicate_token: Array
    induction: Array
    copying: Array | None
    """None if heads' outputs do not add up in the residual stream."""


def head_scores(
    model: GPT,
    length: int = 50,
    n: int = 4,
    begin: int | None = None,
    seed: int = 0,
    measure: str = "mass",
    vocab_size: int | None = None,
) -> HeadScores:
    """Mean scores of all heads over `n` rows [begin] r r of `length` random tokens r.

    Tokens are below `vocab_size`, by default the model's. Raises ValueError if [begin] r r do not fit the
    context, LamaError for a model without layers.
    """
    check_layers(model)
    known = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    tokens = repeated_tokens(n, length, known, begin, seed)
    _, cache = run_with_cache(model, tokens, "blocks.*.attn.pattern")
    patterns = cache.layers("attn.pattern")  # (n_layers, n, H, T, T)
    duplicate, induction = (
        np.mean([score(patterns[:, i], row, measure) for i, row in enumerate(tokens)], axis=0)
        for score in (duplicate_token_score, induction_score)
    )
    previous = previous_token_score(patterns, measure).mean(1)
    return HeadScores(previous, duplicate, induction, copying_score(model) if is_linear(model) else None)


def repeated_tokens(n: int, length: int, vocab_size: int, begin: int | None = None, seed: int = 0) -> Array:
    """n rows [begin] r r of `length` random tokens r, distinct if the vocabulary suffices: (n, T) int32."""
    rng = np.random.default_rng(seed)
    known = np.setdiff1d(np.arange(vocab_size), [] if begin is None else [begin])
    r = np.stack([rng.choice(known, length, replace=length > len(known)) for _ in range(n)])
    start = np.full((n, 0 if begin is None else 1), begin or 0)
    return np.concatenate([start, r, r], axis=1).astype(np.int32)
