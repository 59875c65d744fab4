"""Run every command of the gallery and write docs/gallery.md with the results.

    python scripts/make_gallery.py                  # all entries
    python scripts/make_gallery.py heads lens       # only these; other pictures are not changed

The commands run in out/gallery, and their trained models stay there. Screenshots of pages need Chromium on
PATH. Entries of smollm2 are skipped if the model can be neither found nor fetched.
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
from lama.checkpoints import find
from lama.errors import LamaError

ROOT = Path(__file__).parent.parent
WORK, PAGE, FOLDER = ROOT / "out" / "gallery", ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

GENESIS = '"In the beginning God created the heaven and the earth. And the earth was without form, and void"'
MOSES = '"And Moses spake unto the LORD, and the LORD said unto"'
DAVID = '"And David spake unto the LORD, and the LORD said unto"'
ANSWER = '--answer " Moses" --against " David"'
SMOLLM2 = "-m smollm2 --dtype float32"
TWICE = '"The Blorfin met a Quazmek near Tirvold. The Blorfin met a Quazmek near Tirvold."'
DURZLEY = '"Mr and Mrs Durzley lived at number five. One morning Mr Dur"'
INDUCTION = "--head 17.3 --head 17.4 --head 17.5 --head 18.6 --head 18.7"


@dataclass(frozen=True)
class Entry:
    """A command, its output files, and their description."""

    name: str
    title: str
    command: str
    """The command as typed; it writes below the working folder."""
    about: str
    files: Sequence[str]
    """Output files for the gallery; a page (.html) becomes a link, and a text (.txt) is shown as it is.

    NAME.txt is what the command of the entry NAME prints.
    """
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
        "One file, no network. Each head has a colour. Point at a token to see only its lines. The other "
        "views show one head as a matrix, all heads at once, and the steps to a weight: query, key, their "
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
        "Each row is a token, darker where it looks. Head 4 looks at God from most later tokens. Head 5 "
        "often looks at the last content word: created, heaven, form.",
        ["attention-layer.png"],
    ),
    Entry(
        "attention-all",
        "All heads",
        f"lama attention -m lama-bpe {GENESIS} --out attention-all.png",
        "A row for each layer, a column for each head.",
        ["attention-all.png"],
    ),
    Entry(
        "lens",
        "Predictions after each layer",
        f"lama lens -m lama-bpe {MOSES} {ANSWER} --out lens.png",
        "The final norm and the unembedding, applied to the residual stream after each layer.",
        ["lens.png"],
    ),
    Entry(
        "patch",
        "Where the name goes",
        f"lama patch -m lama-bpe {MOSES} {DAVID} {ANSWER} --out patch.png",
        "The model reads David, and one position of the residual stream is replaced by that of its run on "
        "Moses. 1 means that it answers as after Moses.",
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
        "induction-head",
        "An induction head of SmolLM2",
        f"lama attention {SMOLLM2} {TWICE} --layer 18 --head 6 --out induction-head.png",
        "In the second sentence, head 18.6 attends to the token after the same token's earlier position. "
        "Elsewhere it attends to the first token.",
        ["induction-head.png"],
    ),
    Entry(
        "smollm2-heads",
        "Scores of SmolLM2's heads",
        f"lama heads {SMOLLM2} --out smollm2-heads.png",
        "The highest induction scores: 18.6 (0.890), 17.3 (0.763), 17.4 (0.706), 17.5 (0.625) and 18.7 "
        "(0.560). The highest previous-token scores: 16.0 (0.888) and 11.1 (0.846).",
        ["smollm2-heads.png"],
    ),
    Entry(
        "induction-ablation",
        "Repetition needs the induction heads",
        f"lama ablate {SMOLLM2} --repeated 100 --mean {INDUCTION} --draws 10",
        "100 random tokens, repeated once; the output of a removed head is its mean. Without the five heads "
        "of the highest induction score, the loss on the second copy rises by 8.0 nats per token, and on the "
        "first not at all. Without five random others of the same layers, it rises by 0.5 nats.",
        ["induction-ablation.txt"],
    ),
    Entry(
        "previous-token-ablation",
        "The induction heads need one previous-token head",
        f"lama ablate {SMOLLM2} --repeated 100 --mean --head 16.0 --head 11.1 --draws 10",
        "Head 16.0 attends to the previous token, one layer before the induction heads. Without it the loss "
        "on the second copy rises by 7.3 nats. Head 11.1 attends to the previous token too, and hardly "
        "matters. Of all heads before layer 17, the five induction heads have the highest K-composition with "
        "16.0, 0.15 to 0.17; with every other head it is below 0.07 (in Python, "
        '`lama.interp.heads.composition(lama.load("smollm2", dtype="float32")[0], "k")`).',
        ["previous-token-ablation.txt"],
    ),
    Entry(
        "every-head-ablation",
        "Repetition without each head",
        f"lama ablate {SMOLLM2} --repeated 25 --mean --out every-head-ablation.png",
        "Every head of SmolLM2 is removed in turn. Without 16.0 the loss on the second copy rises by 5.1 "
        "nats, without the induction head 18.6 by 1.1, and without any other by less than 0.8. No single "
        "head changes the first copy so much.",
        ["every-head-ablation.png"],
    ),
    Entry(
        "invented-name",
        "An invented name, read once",
        f"lama ablate {SMOLLM2} {DURZLEY} --answer z --against ham --mean {INDUCTION} --draws 10",
        "SmolLM2 continues Mr Dur with z, as in Durzley (97.6 % in `lama lens` with `--answer z`), rather "
        "than ham. Without the five induction heads its logit is 2.3 above that of ham instead of 17.5, and "
        "without five others 16.4.",
        ["invented-name.txt"],
    ),
    Entry(
        "cross-attention",
        "Which letter is it writing?",
        "lama attention -m out/reverse abcdefghijabcdef --out cross-attention.html",
        "A decoder is trained to reverse letters. For its first letter it looks at the source's last letter.",
        [],
        before="lama seq2seq reverse --out out/reverse",
        out="out/reverse",
        page="cross-attention.html",
        photographs=[("cross-attention.png", "#view=head")],
    ),
    Entry(
        "training",
        "Attention during a training",
        "lama attention -m out/recorded --recorded --out training.html",
        "The same sentence at 64 steps of a training; the page has a slider. Untrained heads attend to all "
        "tokens equally.",
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
        "Models with only attention, on repeated random tokens. The loss falls when a head of the second "
        "layer finds the token after an earlier copy. One layer never learns it.",
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
    printed = run(entry.command)
    (WORK / printed_file(entry)).write_bytes(printed)
    for file in entry.files:
        copy(WORK / file, FOLDER / gallery_name(file))
    for file, address in entry.photographs:
        if (picture := photograph(WORK / entry.page, address)) is not None:
            (WORK / file).write_bytes(picture)
            copy(WORK / file, FOLDER / file)


def printed_file(entry: Entry) -> str:
    return f"{entry.name}.txt"


def is_available(entry: Entry) -> bool:
    """Whether the entry's model can be found or fetched; prints one line otherwise."""
    if SMOLLM2 not in entry.command:
        return True
    try:
        find("smollm2")
    except LamaError as error:
        print(f"{entry.name} is skipped: {error}", file=sys.stderr)
        return False
    return True


def run(command: str) -> bytes:
    """Run one of lama's commands in the working folder; its output. Raises LamaError if it fails."""
    print(f"$ {command}", file=sys.stderr, flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=WORK, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE)
    if done.returncode:
        raise LamaError(f"a command of the gallery failed with exit code {done.returncode}: {command}")
    return done.stdout


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
        "Pictures of models, each with its command. lama-bpe is the bundled model, smollm2 is",
        "SmolLM2-135M-Instruct; `python scripts/make_gallery.py` runs all commands (with the extra `plots`).",
    ]
    for entry in ENTRIES:
        shown = [file for file, _ in entry.photographs]
        shown += [gallery_name(file) for file in entry.files if not file.endswith(".html")]
        if not all((FOLDER / file).exists() for file in shown):
            continue
        texts = [(FOLDER / file).read_text("utf-8") for file in shown if file.endswith(".txt")]
        shown = [file for file in shown if not file.endswith(".txt")]
        commands = [entry.before, entry.command] if entry.before else [entry.command]
        lines += ["", f"## {entry.title}", "", "```sh", *commands, "```", "", entry.about]
        pages = [gallery_name(file) for file in entry.files if file.endswith(".html")]
        lines += [f"[{page}](gallery/{page}) is the page itself: download it, and open it." for page in pages]
        if shown:
            lines += ["", *(f"![{entry.title}](gallery/{file})" for file in shown)]
        for text in texts:
            lines += ["", "```text", text.rstrip("\n"), "```"]
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> int:
    known = [entry.name for entry in ENTRIES]
    if unknown := [name for name in names if name not in known]:
        print(f"entries must be among {', '.join(known)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        for entry in ENTRIES:
            if (not names or entry.name in names) and is_available(entry):
                make(entry)
        write_atomically(PAGE, page_text().encode())
    except LamaError as error:
        print(f"make_gallery: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
