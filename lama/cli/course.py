"""Open the course in JupyterLab: how a transformer works, with a model that runs while you read.

Write the notebooks into a folder and open them. Notebooks that exist are kept, with your answers.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from lama.cli import AddVerb
from lama.errors import LamaError, note


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("course", run, __doc__)
    parser.add("--out DIR", "folder of the notebooks", "lama-course")
    parser.add("--list", "only print the notebooks' titles")
    parser.add("--no-open", "only write the notebooks")


def run(args: argparse.Namespace) -> int:
    from lama.atomic import write_atomically
    from lama.course import notebooks, read_notebook, title, to_ipynb

    if args.list:
        print("\n".join(f"{path.stem:<16}{title(path)}" for path in notebooks()))
        return 0
    if not args.no_open and importlib.util.find_spec("jupyterlab") is None:
        advice = "pip install 'lama[notebook]', or --no-open writes the notebooks only"
        raise LamaError(f"lama course opens JupyterLab, which is not installed; {advice}")
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for path in notebooks():
        file = folder / f"{path.stem}.ipynb"
        if file.exists():
            note(f"{file} is kept as it is")
        else:
            write_atomically(file, to_ipynb(read_notebook(path)).encode())
    print(f"{len(notebooks())} notebooks in {folder}", flush=True)
    if args.no_open:
        return 0
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(folder)])
