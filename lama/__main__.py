"""`python -m lama`: the same as the `lama` command."""

import sys

from lama.cli import main

if __name__ == "__main__":
    sys.exit(main())
