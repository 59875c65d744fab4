"""Run every command of the gallery and write docs/gallery.md with what came of it.

python scripts/make_gallery.py                  # all
python scripts/make_gallery.py heads lens       # these again; the others' pictures stay as they are

The commands run in out/gallery, where what they train stays for the next time. Pages are photographed in Chromium, where there is one on
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

from lama.checkpoints.atomic import atomic_write
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
    """A command, what it writes, and what is to be seen."""

    name: str
    title: str
    command: str
    """As it is typed; the files that it writes are below the working folder."""
    about: str
    files: Sequence[str]
    """What it writes that the gallery keeps, a page (.html) as a link."""
    before: str = ""
    """A command that it needs, run where `out` is not there yet."""
    out: str = ""
    page: str = ""
    photographs: Sequence[tuple[str, str]] = ()
    """Of that page: (file, what the address says)."""


ENTRIES = (
    Entry(
        "attention-page",
        "Attention, as a page",
        f"lama attention lama-bpe {GENESIS} --out attention.html",
        "One file, no network. Each head has a colour; pointing at a token leaves only its lines. The other views: one head as a matrix, "
        "all heads at once, and where a weight comes from: query, key, their product, softmax.",
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
        f"lama attention lama-bpe {GENESIS} --layer 3 --out attention-layer.png",
        "Each row is a token, and darker where it looks: head 0 back to the full stop that ended the sentence before, head 4 to the noun "
        "before: beginning, heaven, earth.",
        ["attention-layer.png"],
    ),
    Entry(
        "attention-all",
        "All heads",
        f"lama attention lama-bpe {GENESIS} --out attention-all.png",
        "Layer by layer downwards, head by head across.",
        ["attention-all.png"],
    ),
    Entry(
        "lens",
        "What it would say after each layer",
        f"lama lens lama-bpe {MOSES} {ANSWER} --out lens.png",
        "The stream after each layer, given to the final norm and the unembedding.",
        ["lens.png"],
    ),
    Entry(
        "patch",
        "Where the name goes",
        f"lama patch lama-bpe {MOSES} {DAVID} {ANSWER} --out patch.png",
        "The model reads David; one place of the stream is taken from its run on Moses. 1: it answers as if it had read Moses.",
        ["patch.png"],
    ),
    Entry(
        "ablate",
        "What is lost without a head",
        f"lama ablate lama-bpe {MOSES} {ANSWER} --out ablate.png",
        "Every head in turn, its output set to 0.",
        ["ablate.png"],
    ),
    Entry(
        "heads",
        "What each head does",
        "lama heads lama-bpe --out heads.png",
        "On random tokens that come twice: how much each head looks at the token before, at the same token's earlier place, and at what "
        "came after that; and what its weights copy.",
        ["heads.png"],
    ),
    Entry(
        "cross-attention",
        "Which letter is it writing?",
        "lama attention out/reverse abcdefghijabcdef --out cross-attention.html",
        "A decoder that was trained to write letters backwards, writing: for its first letter it looks at the source's last.",
        [],
        before="lama seq2seq reverse --out out/reverse",
        out="out/reverse",
        page="cross-attention.html",
        photographs=[("cross-attention.png", "#view=head")],
    ),
    Entry(
        "training",
        "While it learns",
        "lama attention out/recorded --recorded --out training.html",
        "The same sentence at 64 moments of a training; the page has a slider. Untrained heads look at everything alike.",
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
        "Attention alone, on random tokens that come again: the loss falls when a head of the second layer finds what came after the "
        "token's earlier place, and one layer never gets there.",
        ["out/experiments/induction/curves.png"],
    ),
    Entry(
        "grokking",
        "Grokking",
        "lama experiment grokking",
        "Addition modulo 59. The training pairs are known by heart early; the others are understood long after.",
        ["out/experiments/grokking/curves.png"],
    ),
)


def make(entry: Entry) -> None:
    """Run its commands and put what they wrote into docs/gallery. Raises LamaError."""
    if entry.before and not (WORK / entry.out).exists():
        run(entry.before)
    run(entry.command)
    for file in entry.files:
        keep(WORK / file, FOLDER / kept_name(file))
    for file, address in entry.photographs:
        if (picture := photograph(WORK / entry.page, address)) is not None:
            (WORK / file).write_bytes(picture)
            keep(WORK / file, FOLDER / file)


def run(command: str) -> None:
    """A command of lama's, in the working folder. Raises LamaError where it fails."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=WORK, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise LamaError(f"every command of the gallery must succeed; got exit code {done.returncode} of: {command}")


def keep(source: Path, target: Path) -> None:
    """Copy a file, a picture in PNG packed as tightly as its pixels allow."""
    content = source.read_bytes()
    if source.suffix == ".png":
        from PIL import Image  # comes with matplotlib

        packed = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").save(packed, "PNG", optimize=True)
        content = packed.getvalue()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(content)
    print(f"{target.relative_to(ROOT)}: {len(content) / 1e3:,.0f} kB", file=sys.stderr)


def kept_name(file: str) -> str:
    """In docs/gallery; of a file in an experiment's folder with that folder's name before it: grokking-curves.png."""
    return "-".join(Path(file).parts[-2:])


def photograph(page: Path, address: str) -> bytes | None:
    """The page as a browser draws it; None where there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no Chromium on PATH: the page's pictures stay as they are", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}", "--window-size=1000,860"]
        flags += ["--virtual-time-budget=6000", f"--screenshot={picture}", f"{page.as_uri()}{address}"]
        subprocess.run([browser, *flags], check=True, capture_output=True, timeout=120)
        return picture.read_bytes()


def page_text() -> str:
    """docs/gallery.md: the entries whose pictures are there."""
    lines = [
        "# Gallery",
        "",
        "What lama shows of models, each picture with its command. lama-bpe is the model that ships; `python scripts/make_gallery.py`",
        "runs all of them again (with the extra `plots`).",
    ]
    for entry in ENTRIES:
        shown = [file for file, _ in entry.photographs] + [kept_name(file) for file in entry.files if not file.endswith(".html")]
        if not all((FOLDER / file).exists() for file in shown):
            continue
        commands = [entry.before, entry.command] if entry.before else [entry.command]
        lines += ["", f"## {entry.title}", "", "```sh", *commands, "```", "", entry.about]
        pages = [kept_name(file) for file in entry.files if file.endswith(".html")]
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
        with atomic_write(PAGE) as file:
            file.write(page_text().encode())
    except LamaError as error:
        print(f"make_gallery: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
