"""Build the wheel and try it in an empty folder: all files that lama needs are in it.

    python scripts/check_wheel.py

The wheel is installed beside the packages of this environment, and is imported before a clone's own code.
Building it needs hatchling, which pip fetches. Exits with 1 for the first command that fails.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENESIS = "In the beginning God created the heaven and the earth."
COMMANDS: Sequence[Sequence[str]] = (
    ("-c", "import lama; print(lama.__file__)"),
    ("-m", "lama", "--version"),
    ("-m", "lama", "generate", "-m", "lama-bpe", "--offline", "-p", "And God said", "-n", "8"),
    ("-m", "lama", "attention", "-m", "lama-bpe", GENESIS, "--out", "attention.html"),
    ("-m", "lama", "course", "--no-open"),
)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lama-wheel-") as temporary:
        folder = Path(temporary)
        wheels, site, empty = folder / "wheels", folder / "site", folder / "empty"
        empty.mkdir()
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
        (wheel,) = wheels.glob("lama-*.whl")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
        env = {**os.environ, "PYTHONPATH": str(site)}
        for words in COMMANDS:
            done = subprocess.run(
                [sys.executable, *words], cwd=empty, env=env, capture_output=True, text=True
            )
            if done.returncode:
                print(f"! {' '.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
                return 1
            print(
                f"  {' '.join(words[1:3])}: {(done.stdout or done.stderr).strip().splitlines()[-1][:100]}",
                flush=True,
            )
            if words[0] == "-c" and not done.stdout.startswith(str(site)):
                print(f"! the wheel's own lama must be imported; got {done.stdout}")
                return 1
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, works in an empty folder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
