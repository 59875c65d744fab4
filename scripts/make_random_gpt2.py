"""Write a random GPT-2 checkpoint in Hugging Face's format, for benchmarks and tests, without PyTorch.

python scripts/make_random_gpt2.py /tmp/random-124m
python scripts/make_random_gpt2.py /tmp/small --n-layer 2 --n-embd 64 --n-head 4 --vocab-size 300
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from reference.random_gpt2 import make_config, make_weights, write_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a random GPT-2 checkpoint (the default shape is the 124M model's)."
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    for name in ("vocab-size", "n-positions", "n-embd", "n-layer", "n-head", "n-inner"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    out, seed = options.pop("out"), options.pop("seed")
    config = make_config(**options)
    write_folder(out, config, make_weights(config, seed))
    print(out / "model.safetensors")


if __name__ == "__main__":
    main()
