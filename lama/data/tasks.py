"""The tasks that an encoder-decoder is tried on: small, made here, with an answer that is right or wrong.

What learns them is in `lama.training.pair_settings`.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lama.data.pairs import Pair


@dataclass(frozen=True)
class PairTask:
    """Pairs, what they show, and the settings that learn them."""

    about: str
    make: Callable[[], list[Pair]]
    """All pairs, the same at every call."""
    tokenizer: str = "characters"
    """characters or words."""
    held_out: float = 0.1
    """Share of the pairs that is judged by and not trained on; 0 judges by heart what was trained on."""
    key: Callable[[Pair], str] = lambda pair: pair[0]
    """What pairs share that must not be on both sides."""
    exact: float = 0.99
    """The share of held-out pairs that a model learns to answer exactly."""
    fields: Callable[[Pair], list[tuple[range, range]]] | None = None
    """Which places of the target say what which places of the source say: (target's, source's) characters."""
    focus: float = 0.0
    """The share of cross-attention from those places of the target to those of the source that one of its heads reaches."""


def copies() -> list[Pair]:
    return [(text, text) for text in strings("abcdefghij", 10, 20_000)]


def reversals() -> list[Pair]:
    return [(text, text[::-1]) for text in strings("abcdefghij", 16, 50_000)]


def sortings() -> list[Pair]:
    """All strings of six digits of 0, 1 and 2. Source: minGPT's demo."""
    texts = [np.base_repr(n, 3).zfill(6) for n in range(3**6)]
    return [(text, "".join(sorted(text))) for text in texts]


def strings(alphabet: str, length: int, n: int) -> list[str]:
    """n distinct strings, drawn at random."""
    letters = np.array(list(alphabet))
    drawn = np.random.default_rng(0).integers(len(letters), size=(n + n // 10, length))
    return list(dict.fromkeys("".join(letters[row]) for row in drawn))[:n]


MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def dates() -> list[Pair]:
    """4,000 days of 1974 to 2034: `98-03-21` -> `21/Mar/1998`. Source: M. Zhou's NLP tutorials, in the form they have there."""
    first, last = datetime.date(1974, 1, 1).toordinal(), datetime.date(2034, 12, 31).toordinal()
    days = np.random.default_rng(0).permutation(np.arange(first, last + 1))[:4000]
    found = (datetime.date.fromordinal(int(day)) for day in days)
    return [(f"{d:%y-%m-%d}", f"{d.day:02}/{MONTHS[d.month - 1]}/{d.year:04}") for d in found]


def date_fields(pair: Pair) -> list[tuple[range, range]]:
    """Day, month and year: where they stand in the target and in the source."""
    return [(range(0, 2), range(6, 8)), (range(3, 6), range(3, 5)), (range(7, 11), range(0, 2))]


def backwards(pair: Pair) -> list[tuple[range, range]]:
    """Each place of the target: the source's, counted from its end."""
    n = len(pair[0])
    return [(range(i, i + 1), range(n - 1 - i, n - i)) for i in range(n)]


ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(n: int) -> str:
    """`in_words(7241)` is "seven thousand two hundred and forty-one"; for 0 to 999,999."""
    if n >= 1000:
        rest = n % 1000
        between = " " if rest >= 100 else " and "
        return f"{in_words(n // 1000)} thousand{between + in_words(rest) if rest else ''}"
    if n >= 100:
        return f"{ONES[n // 100]} hundred{' and ' + in_words(n % 100) if n % 100 else ''}"
    if n >= 20:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return ONES[n]


def numbers() -> list[Pair]:
    """0 to 9999 in digits and in English words, each way."""
    return [pair for n in range(10_000) for pair in ((str(n), in_words(n)), (in_words(n), str(n)))]


def in_digits(pair: Pair) -> str:
    """The number of a pair of `numbers`."""
    return pair[0] if pair[0].isdigit() else pair[1]


def sentences() -> list[Pair]:
    """Seven sentences in English and in German, to be learned by heart."""
    return [
        ("Good morning, how did you sleep?", "Guten Morgen, wie hast du geschlafen?"),
        ("The cat lies on the warm stove.", "Die Katze liegt auf dem warmen Ofen."),
        ("I have forgotten my keys again.", "Ich habe wieder meine Schlüssel vergessen."),
        ("We go to the lake tomorrow.", "Morgen fahren wir an den See."),
        ("The train to Hamburg is late.", "Der Zug nach Hamburg hat Verspätung."),
        ("Who left the window open?", "Wer hat das Fenster offen gelassen?"),
        ("She reads her brother a story.", "Sie liest ihrem Bruder eine Geschichte vor."),
    ]


TASKS: dict[str, PairTask] = {
    "copy": PairTask("ten letters, the same again", copies, held_out=0.05),
    "reverse": PairTask("sixteen letters, backwards", reversals, held_out=0.02, fields=backwards, focus=0.8),
    "sort": PairTask("six digits of 0, 1 and 2, in order", sortings, held_out=0.25, exact=0.995),
    "dates": PairTask("98-03-21 -> 21/Mar/1998", dates, held_out=0.2, fields=date_fields, focus=0.6),
    "numbers": PairTask("7241 <-> seven thousand two hundred and forty-one", numbers, "words", 0.2, key=in_digits, exact=0.98),
    "tiny": PairTask("seven English sentences in German, by heart", sentences, "words", held_out=0.0, exact=1.0),
}
