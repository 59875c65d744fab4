"""Small tasks for an encoder-decoder; their training settings are in `lama.training.settings.pairs`."""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lama.data.pairs import Pair, read_pairs
from lama.errors import UsageError, did_you_mean, quoted


@dataclass(frozen=True)
class PairTask:
    """Pairs, their split, and the scores that a trained model reaches."""

    about: str
    make: Callable[[], list[Pair]]
    """All pairs, the same at every call."""
    tokenizer: str = "characters"
    """`characters` or `words`."""
    held_out: float = 0.1
    """Held-out share of the pairs; 0 evaluates on the training pairs."""
    key: Callable[[Pair], str] = lambda pair: pair[0]
    """Pairs with the same key are in the same part of the split."""
    exact: float = 0.99
    """The share of held-out pairs that a trained model answers exactly."""
    fields: Callable[[Pair], list[tuple[range, range]]] | None = None
    """Corresponding ranges of characters in target and source."""
    focus: float = 0.0
    """The share of cross-attention between those ranges that the best head reaches."""


def copies() -> list[Pair]:
    return [(text, text) for text in strings(10, 20_000)]


def reversals() -> list[Pair]:
    return [(text, text[::-1]) for text in strings(16, 50_000)]


def sortings() -> list[Pair]:
    """All strings of six digits of 0, 1 and 2. Source: minGPT's demo."""
    texts = [np.base_repr(n, 3).zfill(6) for n in range(3**6)]
    return [(text, "".join(sorted(text))) for text in texts]


def strings(length: int, n: int) -> list[str]:
    """n distinct random strings of the letters a to j."""
    letters = np.array(list("abcdefghij"))
    drawn = np.random.default_rng(0).integers(len(letters), size=(n + n // 10, length))
    return list(dict.fromkeys("".join(letters[row]) for row in drawn))[:n]


MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def dates() -> list[Pair]:
    """4,000 days of 1974 to 2034: `98-03-21` -> `21/Mar/1998`. Source: M. Zhou's NLP tutorials."""
    first, last = datetime.date(1974, 1, 1).toordinal(), datetime.date(2034, 12, 31).toordinal()
    days = np.random.default_rng(0).permutation(np.arange(first, last + 1))[:4000]
    found = (datetime.date.fromordinal(int(day)) for day in days)
    return [(f"{d:%y-%m-%d}", f"{d.day:02}/{MONTHS[d.month - 1]}/{d.year:04}") for d in found]


def date_fields(pair: Pair) -> list[tuple[range, range]]:
    """The positions of day, month and year in the target and in the source."""
    return [(range(0, 2), range(6, 8)), (range(3, 6), range(3, 5)), (range(7, 11), range(0, 2))]


def backwards(pair: Pair) -> list[tuple[range, range]]:
    """Each position of the target, and the corresponding one of the source, counted from its end."""
    n = len(pair[0])
    return [(range(i, i + 1), range(n - 1 - i, n - i)) for i in range(n)]


BELOW_20 = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
BELOW_20 += " sixteen seventeen eighteen nineteen"
ONES = BELOW_20.split()
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


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
    """The numbers 0 to 9999, from digits to English words and from words to digits."""
    return [pair for n in range(10_000) for pair in ((str(n), in_words(n)), (in_words(n), str(n)))]


def in_digits(pair: Pair) -> str:
    return pair[0] if pair[0].isdigit() else pair[1]


def sentences() -> list[Pair]:
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
    "numbers": PairTask(f"7241 <-> {in_words(7241)}", numbers, "words", 0.2, key=in_digits, exact=0.98),
    "tiny": PairTask("seven English sentences in German, memorised", sentences, "words", 0.0, exact=1.0),
}


def find_task(name: str, tokenizer: str = "words", held_out: float = 0.1) -> PairTask:
    if name in TASKS:
        return TASKS[name]
    if not os.path.isfile(name):
        hint = did_you_mean(name, TASKS)
        raise UsageError(f"a task must be {', '.join(TASKS)}, or a file of pairs; got {quoted(name)}{hint}")
    pairs = read_pairs(Path(name))
    return PairTask(f"the pairs of {name}", lambda: pairs, tokenizer, held_out)
