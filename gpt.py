"""Door: `python gpt.py -p "How can entropy be reversed?"` is `lama generate`."""

import sys

from lama.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
