"""Answers to the course's exercises check themselves: `check("softmax", my_softmax)`.

Answers are compared with lama's own code or with a formula, on numbers that the exercise does not show.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import numpy as np

from lama.errors import UsageError, did_you_mean

Judge = Callable[..., bool]
RNG = 7


@dataclass(frozen=True)
class Verdict:
    """The result of an exercise, to be shown below a cell."""

    is_right: bool | None
    """None before there is an answer."""
    message: str

    def __repr__(self) -> str:
        return f"{'…' if self.is_right is None else '✓' if self.is_right else '✗'} {self.message}"

    def _repr_html_(self) -> str:
        colour = "#888888" if self.is_right is None else "#2c9a5b" if self.is_right else "#d4691a"
        return f'<p style="color:{colour}"><b>{escape(repr(self))}</b></p>'


def check(exercise: str, answer: object) -> Verdict:
    """Compare an answer, a value or a function, with the right one. Raises UsageError for an unknown name.

    An answer of `...`, or a function that returns `...` or None, is not an answer yet. An error in the
    reader's function is reported and not raised.
    """
    if exercise not in EXERCISES:
        raise UsageError(f"there is no exercise {exercise!r}{did_you_mean(exercise, EXERCISES)}")
    judge, hint = EXERCISES[exercise]
    if answer is ... or answer is None:
        return Verdict(None, "not answered yet")
    from lama.runtime.device import open_device

    open_device()  # without a model, nothing has chosen the device yet
    try:
        return Verdict(True, "right") if judge(answer) else Verdict(False, f"not yet. {hint}")
    except _Unanswered:
        return Verdict(None, "not answered yet")
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}. {hint}")


class _Unanswered(Exception):
    """A function returned nothing."""


def _call(function: object, *arguments: object) -> object:
    if not callable(function):
        raise TypeError("the answer must be a function")
    found: object = function(*arguments)
    if found is None or found is ...:
        raise _Unanswered
    return found


def _close(found: object, wanted: object) -> bool:
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return a.shape == b.shape and bool(np.allclose(a, b, atol=1e-5))


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(RNG).normal(size=shape)


def _merge(f: object) -> bool:
    cases = (([1, 2, 1, 2, 3], (1, 2), [9, 9, 3]), ([5, 5, 5], (5, 5), [9, 5]), ([4, 1], (1, 4), [4, 1]))
    return all(list(_call(f, list(ids), pair, 9)) == wanted for ids, pair, wanted in cases)  # type: ignore[call-overload]


def _entropy(n: object) -> bool:
    from lama.tokenizers import gpt2_tokenizer

    return n == len(gpt2_tokenizer().encode("entropy"))


def _wave(f: object) -> bool:
    from lama.embeddings import sinusoids

    table = sinusoids(9, 6)
    return all(_close(_call(f, p, i, 6), table[p, i]) for p in (0, 3, 8) for i in range(6))


def _softmax(f: object) -> bool:
    for x in (_numbers(5), np.array([1000.0, 1001.0])):
        e = np.exp(x - x.max())
        if not _close(_call(f, x), e / e.sum()):
            return False
    return True


def _causal_attention(f: object) -> bool:
    from tinygrad import Tensor

    from lama.attention import attention
    from lama.masks import Causal

    q, k, v = _numbers(3, 6, 4).astype(np.float32)
    found = _call(f, q, k, v)
    wanted = attention(Tensor(q)[None], Tensor(k)[None], Tensor(v)[None], Causal()).numpy()[0]
    return _close(found, wanted)


def _layernorm(f: object) -> bool:
    from tinygrad import Tensor

    from lama.ops import layernorm

    x = _numbers(3, 8).astype(np.float32) * 5 + 2
    return _close(_call(f, x), layernorm(Tensor(x), None, None, 1e-5).numpy())


def _block_size(f: object) -> bool:
    from tinygrad.nn.state import get_parameters

    from lama.models.gpt import GPTConfig, make_block

    sizes = (16, 24)
    wanted = [
        sum(p.numel() for p in get_parameters(make_block(GPTConfig(d_model=d, n_heads=4), 0))) for d in sizes
    ]
    return [_call(f, d) for d in sizes] == wanted


def _loss(f: object) -> bool:
    x = _numbers(7) * 3
    return all(_close(_call(f, x, i), np.log(np.exp(x).sum()) - x[i]) for i in (0, 4))


def _nucleus(f: object) -> bool:
    cases = (
        ([0.5, 0.3, 0.15, 0.05], 0.7, {0, 1}),
        ([0.05, 0.15, 0.8], 0.5, {2}),
        ([0.4, 0.1, 0.5], 0.95, {0, 1, 2}),
    )
    return all(set(_call(f, np.array(p), share)) == wanted for p, share, wanted in cases)  # type: ignore[call-overload]


def _previous(f: object) -> bool:
    from lama.interp.heads import previous_token_score

    e = np.exp(_numbers(6, 6)) * np.tri(6)
    pattern = e / e.sum(-1, keepdims=True)
    return _close(_call(f, pattern), previous_token_score(pattern))


def _previous_head(head: object) -> bool:
    from lama.checkpoints import load_causal
    from lama.interp.heads import head_scores

    scores = head_scores(load_causal("lama-bpe")[0], 30, 2).previous_token
    return tuple(head) == np.unravel_index(scores.argmax(), scores.shape)  # type: ignore[arg-type]


def _mask(f: object) -> bool:
    return np.array_equal(np.asarray(_call(f, 5, True)), np.tri(5, dtype=bool)) and np.array_equal(
        np.asarray(_call(f, 4, False)), np.ones((4, 4), bool)
    )


def _waves(f: object) -> bool:
    p, k = 59, 5
    return all(int(np.argmax([float(_call(f, a, b, c, k, p)) for c in range(p)])) == (a + b) % p  # type: ignore[arg-type]
               for a, b in ((3, 4), (40, 30)))  # fmt: skip


EXERCISES: dict[str, tuple[Judge, str]] = {
    "merge": (_merge, "Overlapping pairs count once: [5, 5, 5] becomes [9, 5]."),
    "entropy": (_entropy, "Look at the list of tokens above, or ask gpt2.encode."),
    "wave": (_wave, "The exponent is 2j/d with j the number of the pair: i // 2. Even numbers are sines."),
    "angle": (lambda x: _close(x, 7.0), "The angle is the position times the frequency."),
    "softmax": (_softmax, "Exponentials of the scores minus the largest, divided by their sum."),
    "causal_attention": (
        _causal_attention,
        "Divide by √d, hide keys after the query, then softmax each row.",
    ),
    "layernorm": (_layernorm, "Each row: minus its mean, divided by the root of (variance + ε)."),
    "block_size": (_block_size, "Matrices 4d² + 8d², biases 4d + 5d, norms 4d."),
    "guessing": (lambda f: all(_close(_call(f, v), math.log(v)) for v in (2, 65)), "Each has 1/V; take −ln."),
    "loss": (_loss, "ln Σ exp(logits) − logits[target]."),
    "nucleus": (
        _nucleus,
        "From the most likely on, until their sum reaches the share; return their numbers.",
    ),
    "passes": (lambda f: all(_call(f, n) == n * (n + 1) // 2 for n in (1, 10)), "1 + 2 + ... + n."),
    "previous": (_previous, "Mean of the entries just below the diagonal, over rows 1 to T − 1."),
    "previous_head": (_previous_head, "Look for the largest number in the first table: (layer, head)."),
    "mask": (_mask, "True where a query may look: the lower triangle, or everywhere."),
    "masked": (lambda n: n == 120, "15 % of 1,000 are chosen, and 80 % of these become [MASK]."),
    "waves": (_waves, "cos(2π k (a + b − c) / p) is largest where c = a + b."),
    "uniform": (
        lambda x: abs(float(x) - math.log(59)) < 0.01,
        "A uniform prediction over 59 numbers has the loss ln 59.",
    ),
    "operations": (
        lambda f: all(_call(f, n) in (2 * n**3, n**2 * (2 * n - 1)) for n in (2, 100)),
        "n² numbers, n multiplications and n additions each.",
    ),
    "intensity": (
        lambda x: _close(x, 0.5),
        "One float32 weight is 4 bytes, and gives a multiplication and an addition.",
    ),
}
"""The judge of each exercise, and the hint after a wrong answer."""
