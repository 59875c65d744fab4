"""What each head does, as numbers: where it looks on repeated random tokens, what it copies, which heads it reads from.

A pattern has a row for each query. Three things a row may look at have names: the token before (`previous-token`), earlier tokens that
are its own (`duplicate-token`), and the tokens that came after those (`induction`). Source: TransformerLens, head_detector.py; Olsson et
al. 2022, "In-context Learning and Induction Heads".
"""

from dataclasses import dataclass

import numpy as np

from lama.errors import LamaError
from lama.interp.circuits import check_layers, embedding, head_weights, unembedding
from lama.interp.record import run_with_cache
from lama.models.gpt import GPT

MEASURES = ("mass", "mul", "abs")
KINDS = ("q", "k", "v")


def match(pattern: np.ndarray, target: np.ndarray, measure: str = "mass") -> np.ndarray:
    """How well patterns (..., T, S) agree with a target (..., T, S) of zeros and ones: (...).

    mass: the share of attention on the ones, over the queries that have one; of a diagonal, its mean
    mul:  the share over all queries, those without a one too: Σ A∘D / Σ A
    abs:  1 − Σ|A − D| / T, which also counts against a pattern where the target is nothing, from −1 to 1

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


def previous_token_score(pattern: np.ndarray, measure: str = "mass") -> np.ndarray:
    """How much of patterns (..., T, T) is on the token before the query's: (...)."""
    return match(pattern, np.eye(pattern.shape[-1], k=-1), measure)


def duplicate_token_score(pattern: np.ndarray, tokens: np.ndarray, measure: str = "mass") -> np.ndarray:
    """How much of patterns (..., T, T), those of tokens (T,), is on earlier tokens equal to the query's: (...)."""
    return match(pattern, _duplicates(tokens), measure)


def induction_score(pattern: np.ndarray, tokens: np.ndarray, measure: str = "mass") -> np.ndarray:
    """How much of patterns (..., T, T), those of tokens (T,), is on tokens that came after an earlier one equal to the query's: (...)."""
    after = np.roll(_duplicates(tokens), 1, axis=1)
    after[:, 0] = 0
    return match(pattern, np.tril(after), measure)


def _duplicates(tokens: np.ndarray) -> np.ndarray:
    """(T, T): one where the key is an earlier token equal to the query."""
    return np.tril(tokens[:, None] == tokens[None, :], k=-1).astype(float)


def copying_score(model: GPT) -> np.ndarray:
    """Σλ / Σ|λ| over the eigenvalues λ of each head's full OV circuit W_E W_V W_O W_U (vocab_size, vocab_size): (n_layers, H).

    1: to look at a token always makes that token likelier; −1: always less likely. The circuit has only d_head eigenvalues that are not
    zero, those of W_O W_U W_E W_V. Source: Elhage et al. 2021. Raises LamaError for a model with norm=post or without residuals.
    """
    heads = head_weights(model)
    around = unembedding(model) @ embedding(model)  # (d_model, d_model)
    values = np.linalg.eigvals((heads.output @ around @ heads.value).astype(np.float64))  # (n_layers, H, d_head)
    size = np.abs(values).sum(-1)
    return np.divide(values.sum(-1).real, size, out=np.zeros(size.shape), where=size > 0)


def composition(model: GPT, kind: str) -> np.ndarray:
    """How much of what one head writes is read by a later one: [layer, head, later layer, its head], 0 where that is not later.

    ‖A B‖ / (‖A‖ ‖B‖) in Frobenius norms, with A = W_V W_O of the first head and B of the later one, by `kind`: "q" W_Q W_Kᵀ, "k" its
    transpose, "v" W_V W_O. Two random heads have about 1 / √d_model. Source: Elhage et al. 2021.
    Raises ValueError for another kind, LamaError for a model with norm=post, without residuals, or whose scores are no product of q and k.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind != "v" and model.config.similarity == "additive":
        raise LamaError("for q- and k-composition, scores must be products of q and k; got a model with similarity=additive")
    heads = head_weights(model)
    # B = reads @ (then)ᵀ, both (n_layers, H, d_model, d_head)
    reads, then = {
        "q": (heads.query, heads.key),
        "k": (heads.key, heads.query),
        "v": (heads.value, heads.output.swapaxes(-1, -2)),
    }[kind]
    written, moved = _gram(heads.output.swapaxes(-1, -2)), _gram(heads.value)
    first = np.sqrt(np.einsum("lhij,lhji->lh", written, moved))  # ‖A‖
    second = np.sqrt(np.einsum("lhij,lhji->lh", _gram(reads), _gram(then)))
    scores = np.zeros((*first.shape, *second.shape))
    for early in range(len(first)):
        for late in range(early + 1, len(second)):
            between = heads.output[early][:, None] @ reads[late][None]  # (H, H, d_head, d_head)
            inner = moved[early][:, None] @ between @ _gram(then)[late][None]
            norms = first[early][:, None] * second[late][None]
            squares = np.maximum((inner * between).sum((-1, -2)), 0)
            scores[early, :, late] = np.divide(np.sqrt(squares), norms, out=np.zeros(norms.shape), where=norms > 0)
    return scores


def _gram(weight: np.ndarray) -> np.ndarray:
    """WᵀW: all that a norm of a product needs of its outer factors."""
    return weight.swapaxes(-1, -2) @ weight


@dataclass(frozen=True)
class HeadScores:
    """Each score (n_layers, H)."""

    previous_token: np.ndarray
    duplicate_token: np.ndarray
    induction: np.ndarray
    copying: np.ndarray | None
    """None for a model with norm=post or without residuals, whose OV circuits are not all that is between embedding and logits."""


def head_scores(
    model: GPT,
    length: int = 50,
    n: int = 4,
    begin: int | None = None,
    seed: int = 0,
    measure: str = "mass",
    vocab_size: int | None = None,
) -> HeadScores:
    """All heads' scores, on average over `n` times `length` random tokens, repeated once, after `begin` where there is one.

    Tokens are drawn below `vocab_size` (default: all of the model's), which leaves out rows beyond its tokenizer.
    Raises ValueError where 2 · length tokens and `begin` do not fit into the model's context, LamaError for a model without layers.
    """
    check_layers(model)
    tokens = repeated_tokens(n, length, min(vocab_size or model.config.vocab_size, model.config.vocab_size), begin, seed)
    _, cache = run_with_cache(model, tokens, "blocks.*.attn.pattern")
    patterns = cache.layers("attn.pattern")  # (n_layers, n, H, T, T)
    each = [
        (
            previous_token_score(patterns[:, i], measure),
            duplicate_token_score(patterns[:, i], row, measure),
            induction_score(patterns[:, i], row, measure),
        )
        for i, row in enumerate(tokens)
    ]
    previous, duplicate, induction = np.mean(each, axis=0)
    linear = model.config.norm != "post" and model.config.residual
    return HeadScores(previous, duplicate, induction, copying_score(model) if linear else None)


def repeated_tokens(n: int, length: int, vocab_size: int, begin: int | None = None, seed: int = 0) -> np.ndarray:
    """n rows [begin] r r of `length` random tokens r, different ones where the vocabulary has so many: (n, T) int32."""
    rng = np.random.default_rng(seed)
    known = np.setdiff1d(np.arange(vocab_size), [] if begin is None else [begin])
    r = np.stack([rng.choice(known, length, replace=length > len(known)) for _ in range(n)])
    start = np.full((n, 0 if begin is None else 1), begin or 0)
    return np.concatenate([start, r, r], axis=1).astype(np.int32)
