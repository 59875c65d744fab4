"""The blocks of the documentation: what is run, in which folder, and what a transcript must print.

A fenced block of sh, console or python is run, in the order of its page and in one folder a page. An HTML
comment on the line before a block changes that: `<!-- not run: REASON -->`, `<!-- slow: REASON -->`. `sh` is
handed to a shell as a whole. In `console`, lines that begin with `$ ` are commands and the others their
output, in which `[...]` stands for any lines. All `python` blocks of a page are one program.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages that other commands write, or whose commands measure for minutes: only options are checked.
ONLY_PARSED = ("gallery.md", "benchmarks.md", "chat-tuning.md", "data.md", "lora.md", "recipe.md")
RUN = ("sh", "console", "python")
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?^(?P<fence>```+)(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    kind: str
    text: str
    mark: str
    """The comment before it: `not run: REASON`, `slow: REASON`, or nothing."""

    @property
    def is_run(self) -> bool:
        return self.kind in RUN and not self.mark.startswith(("not run: ", "line: "))

    @property
    def is_slow(self) -> bool:
        return self.mark.startswith("slow: ")

    @property
    def commands(self) -> list[str]:
        """The command lines in it."""
        if self.kind == "console":
            return [line[2:] for line in joined(self.text) if line.startswith("$ ")]
        return joined(self.text) if self.kind == "sh" else []


def joined(text: str) -> list[str]:
    """Lines, those that end in a backslash joined with the next."""
    return re.sub(r"\\\n\s*", "", text).splitlines()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("fence")) + 1
        found.append(Block(page, line, match["kind"], match["text"], match["mark"] or ""))
    return found


def lama_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(line, arguments after `lama`) of every command in the page's blocks, those of indented ones too."""
    lines = [line for block in blocks(page) for line in block.commands]
    lines += [line[4:] for line in page.read_text("utf-8").splitlines() if line.startswith("    lama ")]
    for line in lines:
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>"):
                while words and "=" in words[0]:
                    words = words[1:]  # a variable of the environment
                if words[:1] == ["lama"]:
                    yield line, words[1:]
                words = ["redirected"] if "<" in word or ">" in word else []
            else:
                words.append(word)


def prepare(folder: Path) -> dict[str, str]:
    """Fill a folder with the texts that pages speak of; returns the environment of their commands."""
    from lama.data.packages import bible_verses

    text = "\n".join(verse.text for verse in bible_verses())[:200_000]
    (folder / "my-book.txt").write_text(text, "utf-8")
    (folder / "notes").mkdir()
    (folder / "notes" / "one.md").write_text(text[:20_000], "utf-8")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i} + 1?"},
                {"role": "assistant", "content": f"{i + 1}."},
            ]
        }
        for i in range(40)
    ]
    (folder / "talk.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    for name in ("LICENSE", "scripts", "gpt.py", "transformer.py", "weights"):
        (folder / name).symlink_to(ROOT / name)
    bin = folder / ".bin"
    bin.mkdir()
    for name, words in (("lama", "-m lama"), ("python", "")):
        (bin / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (bin / name).chmod(0o755)
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def run_shell(script: str, folder: Path, env: dict[str, str], seconds: float) -> str:
    """Standard output of a script that must succeed."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script], cwd=folder, env=env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{script}\nexit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def run_block(block: Block, folder: Path, env: dict[str, str], seconds: float) -> None:
    """Run a block of sh or console and compare what a transcript shows."""
    if block.kind == "sh":
        run_shell(block.text, folder, env, seconds)
        return
    for part in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE):
        if part.startswith("$ "):
            command, _, shown = re.sub(r"\\\n\s*", "", part)[2:].partition("\n")
            found = run_shell(command, folder, env, seconds)
            fault = difference(shown, found)
            assert not fault, f"{block.page.name}:{block.line}: {command}\n{fault}\nprinted:\n{found}"


def difference(shown: str, found: str) -> str:
    """The first way in which a transcript is not what a command printed; numbers may differ by 2 %."""
    lines = [line.rstrip() for line in found.strip().splitlines()]
    at, gap = 0, False
    for line in map(str.rstrip, shown.strip().splitlines()):
        if line == "[...]":
            gap = True
            continue
        while gap and at < len(lines) and not alike(line, lines[at]):
            at += 1
        if at == len(lines):
            return f"not printed: {line}"
        if not alike(line, lines[at]):
            return f"shown: {line}\nfound: {lines[at]}"
        at, gap = at + 1, False
    return "" if gap or at == len(lines) else f"not shown: {lines[at]}"


def alike(shown: str, found: str) -> bool:
    """Whether two lines have the same words, and numbers that differ by rounding only."""
    if re.sub(r"\s+", " ", NUMBER.sub("#", shown)) != re.sub(r"\s+", " ", NUMBER.sub("#", found)):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(found), strict=True)
    for a, b in pairs:
        x, y = (float(each.replace(",", "").rstrip(".") or 0) for each in (a, b))
        if abs(x - y) > 0.02 * max(abs(x), abs(y)) + (0.02 if "." in a else 0):
            return False
    return True
