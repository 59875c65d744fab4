"""Run every command of the gallery and write docs/gallery.md with the results.

    python scripts/make_gallery.py                  # all entries
    python scripts/make_gallery.py heads lens       # only these; other pictures are not changed

The commands run in out/gallery, and their trained models stay there. Screenshots of pages need Chromium on
PATH.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lama.atomic import write_atomically
from lama.errors import LamaError

ROOT = Path(__file__).parent.parent
WORK, PAGE, FOLDER = ROOT / "out" / "gallery", ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

GENESIS = '"In the beginning God created the heaven and the earth. And the earth was without form, and void"'
MOSES = '"And Moses spake unto the LORD, and the LORD said unto"'
DAVID = '"And David spake unto the LORD, and the LORD said unto"'
ANSWER = '--answer " Moses" --against " David"'


@dataclass(frozen=True)
class Entry:
    """A command, its output files, and their description."""

    name: str
    title: str
    command: str
    """The command as typed; it writes below the working folder."""
    about: str
    files: Sequence[str]
    """Output files for the gallery; a page (.html) becomes a link."""
    before: str = ""
    """A command to run first, if `out` does not exist yet."""
    out: str = ""
    page: str = ""
    photographs: Sequence[tuple[str, str]] = ()
    """Screenshots of the page: (file, fragment of the address)."""


ENTRIES = (
    Entry(
        "attention-page",
        "Attention, as a page",
        f"lama attention -m lama-bpe {GENESIS} --out attention.html",
        "One file, no network. Each head has a colour; pointing at a token leaves only its lines. The other "
        "views: one head as a matrix, all heads at once, and the steps of a weight: query, key, their "
        "product, softmax.",
        ["attention.html"],
        page="attention.html",
        photographs=[
            ("attention-page.png", "#view=head&kind=0&layer=3&query=15&pin=query"),
            ("attention-page-neuron.png", "#view=neuron&kind=0&layer=3&head=4&query=15"),
        ],
    ),
    Entry(
        "attention-layer",
        "A layer's heads",
        f"lama attention -m lama-bpe {GENESIS} --layer 3 --out attention-layer.png",
        "Each row is a token, darker where it looks: head 0 at the full stop of the sentence before, head 4 "
        "at the noun before: beginning, heaven, earth.",
        ["attention-layer.png"],
    ),
    Entry(
        "attention-all",
        "All heads",
        f"lama attention -m lama-bpe {GENESIS} --out attention-all.png",
        "Layer by layer downwards, head by head across.",
        ["attention-all.png"],
    ),
    Entry(
        "lens",
        "Predictions after each layer",
        f"lama lens -m lama-bpe {MOSES} {ANSWER} --out lens.png",
        "The final norm and the unembedding, applied to the stream after each layer.",
        ["lens.png"],
    ),
    Entry(
        "patch",
        "Where the name goes",
        f"lama patch -m lama-bpe {MOSES} {DAVID} {ANSWER} --out patch.png",
        "The model reads David; one position of the stream is taken from its run on Moses. 1: it answers as "
        "if it had read Moses.",
        ["patch.png"],
    ),
    Entry(
        "ablate",
        "The loss without each head",
        f"lama ablate -m lama-bpe {MOSES} {ANSWER} --out ablate.png",
        "Every head in turn, its output set to 0.",
        ["ablate.png"],
    ),
    Entry(
        "heads",
        "Scores of each head",
        "lama heads -m lama-bpe --out heads.png",
        "On repeated random tokens: each head's attention to the token before, to the same token's earlier "
        "position, and to the token after that; and the copying of its weights.",
        ["heads.png"],
    ),
    Entry(
        "cross-attention",
        "Which letter is it writing?",
        "lama attention -m out/reverse abcdefghijabcdef --out cross-attention.html",
        "A decoder trained to reverse letters: for its first letter it looks at the source's last.",
        [],
        before="lama seq2seq reverse --out out/reverse",
        out="out/reverse",
        page="cross-attention.html",
        photographs=[("cross-attention.png", "#view=head")],
    ),
    Entry(
        "training",
        "While it learns",
        "lama attention -m out/recorded --recorded --out training.html",
        "The same sentence at 64 moments of a training; the page has a slider. Untrained heads look at all "
        "tokens alike.",
        [],
        before='lama train --record "In the beginning God created the heaven" --out out/recorded',
        out="out/recorded",
        page="training.html",
        photographs=[("training-begin.png", "#frame=0"), ("training-end.png", "")],
    ),
    Entry(
        "induction",
        "Two layers that learn to repeat",
        "lama experiment induction",
        "Attention alone, on repeated random tokens: the loss falls when a head of the second layer finds "
        "the token after an earlier copy. One layer never learns it.",
        ["out/experiments/induction/curves.png"],
    ),
    Entry(
        "grokking",
        "Grokking",
        "lama experiment grokking",
        "Addition modulo 59. The model memorises the training pairs early and generalises much later.",
        ["out/experiments/grokking/curves.png"],
    ),
)


def make(entry: Entry) -> None:
    """Run an entry's commands and copy their output into docs/gallery. Raises LamaError."""
    if entry.before and not (WORK / entry.out).exists():
        run(entry.before)
    run(entry.command)
    for file in entry.files:
        copy(WORK / file, FOLDER / gallery_name(file))
    for file, address in entry.photographs:
        if (picture := photograph(WORK / entry.page, address)) is not None:
            (WORK / file).write_bytes(picture)
            copy(WORK / file, FOLDER / file)


def run(command: str) -> None:
    """Run one of lama's commands in the working folder. Raises LamaError if it fails."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=WORK, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise LamaError(f"a command of the gallery failed with exit code {done.returncode}: {command}")


def copy(source: Path, target: Path) -> None:
    """Copy a file; a PNG is compressed."""
    content = source.read_bytes()
    if source.suffix == ".png":
        from PIL import Image  # comes with matplotlib

        packed = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").save(packed, "PNG", optimize=True)
        content = packed.getvalue()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)
    print(f"{target.relative_to(ROOT)}: {len(content) / 1e3:,.0f} kB", file=sys.stderr)


def gallery_name(file: str) -> str:
    """A file's name in docs/gallery; with the experiment's name before it, as in grokking-curves.png."""
    return "-".join(Path(file).parts[-2:])


def photograph(page: Path, address: str) -> bytes | None:
    """A screenshot of the page, or None without a browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no Chromium on PATH: the page's pictures are not changed", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,860"]
        flags += [f"--user-data-dir={folder}", "--virtual-time-budget=6000", f"--screenshot={picture}"]
        subprocess.run(
            [browser, *flags, f"{page.as_uri()}{address}"], check=True, capture_output=True, timeout=120
        )
        return picture.read_bytes()


def page_text() -> str:
    """The text of docs/gallery.md: the entries whose pictures exist."""
    lines = [
        "# Gallery",
        "",
        "Pictures of models by lama, each with its command. lama-bpe is the bundled model; `python",
        "scripts/make_gallery.py` runs all commands (with the extra `plots`).",
    ]
    for entry in ENTRIES:
        shown = [file for file, _ in entry.photographs]
        shown += [gallery_name(file) for file in entry.files if not file.endswith(".html")]
        if not all((FOLDER / file).exists() for file in shown):
            continue
        commands = [entry.before, entry.command] if entry.before else [entry.command]
        lines += ["", f"## {entry.title}", "", "```sh", *commands, "```", "", entry.about]
        pages = [gallery_name(file) for file in entry.files if file.endswith(".html")]
        lines += [f"[{page}](gallery/{page}) is the page itself: download it, and open it." for page in pages]
        lines += ["", *(f"![{entry.title}](gallery/{file})" for file in shown)]
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> int:
    known = [entry.name for entry in ENTRIES]
    if unknown := [name for name in names if name not in known]:
        print(f"entries must be among {', '.join(known)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        for entry in ENTRIES:
            if not names or entry.name in names:
                make(entry)
        write_atomically(PAGE, page_text().encode())
    except LamaError as error:
        print(f"make_gallery: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
