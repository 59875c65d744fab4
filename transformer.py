"""Door: `python transformer.py -v` is `lama train`: train a small GPT from scratch and watch it learn."""

import sys

from lama.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
