"""Random damage to files and to command lines: each case loads, or ends in one clear line; nothing else may
happen.

python tests/fuzz.py                        # some hundred cases of every kind, seed 0
python tests/fuzz.py runs -n 2000 --seed 7  # one kind: models, runs, data or commands

Every case is a function of its seed and number. Failures are printed, and end in exit code 1. This is a
script, not a test: the tests' type checker would refuse wrong values before lama's own checks see them.
test_fuzz.py runs it.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from reference.random_gpt2 import write_shards, write_torch

import lama
from lama.checkpoints import export_gguf, open_weights, smollm2
from lama.cli import main, make_parser
from lama.data import open_corpus
from lama.data.labelled import open_labelled
from lama.data.pairs import read_pairs
from lama.errors import LamaError
from lama.evaluation.tasks import TASKS, read_examples
from lama.tokenizers import ByteTokenizer
from lama.training.folder import RunFolder
from lama.training.prepare import resumed_run
from lama.training.settings import read_settings, run_config

EARLIER = Path(__file__).parent / "earlier"
MODELS = ("bytes", "character", "bpe", "exported", "int8", "int4", "pairs", "bert", "classifier")
SECONDS = 20  # the longest that a case may take
LONGEST = 1000  # characters of a message
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 256, 10_000, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308),
    *(
        "",
        " ",
        "x",
        "0",
        "\0",
        "é",
        "🙂",
        "\ud800",
        "a" * 10_000,
        "a\nb",
        "../x",
        "/dev/zero",
        "gpt",
        "bert",
        "int8",
        "F16",
        "BPE",
    ),
    *(
        [],
        [0],
        [[]],
        ["x"],
        [None],
        [2**62, 2**62],
        {},
        {"": None},
        {"type": "x"},
        {"kind": "pairs"},
        "<deep>",
        "<digits>",
        "<infinite>",
    ),
]
Case = Callable[[random.Random], str]  # does one case, and says what it was


class Fault(Exception):
    """A case that neither loads nor ends in one clear line."""


class Late(BaseException):
    """A case that takes too long; not an Exception, so that nothing handles it."""


@contextmanager
def limited(what: str) -> Iterator[None]:
    """A LamaError of one line is fine. Raises Fault for any other error, and where the block takes too
    long.
    """

    def late(number: int, frame: Any) -> None:
        raise Late(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except lama.LamaError as error:
        check_message(str(error), what)
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/lama/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        raise Fault(f"{what}: {type(error).__name__} at {where}: {str(error)[:200]!r}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_message(message: str, what: str) -> None:
    """Raises Fault unless it is one line of at most `LONGEST` characters."""
    if not message or "\n" in message or len(message) > LONGEST:
        raise Fault(f"{what}: a message of {len(message)} characters: {message[:300]!r}")
    message.encode()


# --- damage to a file


def dumps(value: Any) -> bytes:
    text = json.dumps(value).replace('"<deep>"', "[" * 3000 + "]" * 3000).replace('"<digits>"', "9" * 5000)
    return text.replace('"<infinite>"', "1e999").encode("utf-8", "surrogatepass")


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Change, remove or add something at a random place: one near the root is as likely as all deeper
    ones.
    """
    root = json.loads(content)
    new = rng.choice(VALUES)
    owner, key = root, None
    while isinstance(owner, dict | list) and owner:
        key = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        if not isinstance(owner[key], dict | list) or not owner[key] or rng.random() < 0.4:
            break
        owner = owner[key]
    how = rng.random()
    if key is None or how < 0.05:
        return dumps(new)
    if how < 0.7:
        owner[key] = new
    elif how < 0.85:
        del owner[key]
    elif isinstance(owner, dict):
        owner[rng.choice(["", "x", "dtype", "model", "normalizer", "\ud800", "<|endoftext|>"])] = new
    else:
        owner.insert(0, new)
    return dumps(root)


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or another length of it."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice([0, 1, length + 1, 2**31, 2**63, 2**64 - 1])) + content[8:]
    header = damage_json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damage_gguf(content: bytes, rng: random.Random) -> bytes:
    """A GGUF file with other bytes in its header, such as a length, a type, or a number of a key."""
    at = rng.randrange(min(len(content), rng.choice([100, 1000, 10_000])))
    new = struct.pack("<Q", rng.choice([0, 1, 7, 8, 9, 12, 2**31, 2**63, 2**64 - 1]))
    return content[:at] + new[: (n := rng.choice([1, 4, 8]))] + content[at + n :]


def damage_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i : i + rng.choice([0, 1, 1, 2])] = [
        rng.choice([b"", b"\xff\xfe", b"a  b c", b"x" * 100_000, b"\t", b"\xed\xa0\x80 a", lines[-1]])
    ]
    return rng.choice([b"\n", b"\n", b"\r\n"]).join(lines)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    at, n = rng.randrange(len(content) + 1), rng.choice([1, 2, 8, 100])
    junk = bytes(rng.randrange(256) for _ in range(n))
    return rng.choice(
        [
            content[:at],
            content[:at] + content[at + n :],
            content[:at] + junk + content[at:],
            content[:at] + junk + content[at + n :],
            b"",
            b"\0" * 50,
        ]
    )


def damage_file(path: Path, rng: random.Random) -> str:
    """Damage the file; returns how."""
    content = path.read_bytes()
    by_name = {".json": damage_json, ".safetensors": damage_header, ".gguf": damage_gguf}
    how: Callable[[bytes, random.Random], bytes] = rng.choice(
        [by_name.get(path.suffix, damage_lines)] * 5 + [damage_bytes, damage_lines]
    )
    if rng.random() < 0.04:  # not the content but what the file is
        path.unlink()
        if (kind := rng.choice(["missing", "folder", "link", "pipe"])) == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(rng.choice([path.name, "nowhere", "/dev/null"]))
        elif kind == "pipe":
            os.mkfifo(path)
        return f"{path.name}: {kind}"
    with contextlib.suppress(ValueError, KeyError, struct.error):  # of a file that is damaged already
        path.write_bytes(how(content, rng))
    return f"{path.name}: {how.__name__}"


def damaged(base: Path, to: Path, rng: random.Random) -> str:
    """A copy of a folder with damage to one of its files, or two."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(base, to)
    files = sorted(path for path in to.rglob("*") if path.is_file())
    return f"{base.name}, " + ", ".join(
        damage_file(rng.choice(files), rng)
        for _ in range(rng.choice([1, 1, 1, 1, 2]))
        if all(map(Path.is_file, files))
    )


# --- what is damaged


def make_models(work: Path) -> list[Path]:
    """One of every kind: those of an earlier version, a BERT, GPT-2 sharded and of torch, and a GGUF file."""
    tensors = {
        name: tensor.read()
        for name, tensor in open_weights(EARLIER / "exported" / "model.safetensors").items()
    }
    for name, write in (("torch", write_torch), ("sharded", write_shards)):
        shutil.copytree(EARLIER / "exported", work / name, ignore=shutil.ignore_patterns("*.safetensors"))
        write(work / name, tensors)
    write_bert(work / "wordpiece")
    (work / "gguf").mkdir()
    small = lama.GPT(lama.GPTConfig(256, context_length=8, d_model=8, n_layers=2, n_heads=2))
    export_gguf(work / "gguf" / "model.gguf", small, ByteTokenizer(), "small")
    found = [
        *(EARLIER / name for name in MODELS),
        *(work / name for name in ("torch", "sharded", "wordpiece", "gguf")),
    ]
    for folder in found:
        lama.load(folder)  # undamaged, they do
    return found


def write_bert(folder: Path) -> None:
    """A tiny BERT in Hugging Face's format, with a vocab.txt."""
    from safetensors.numpy import save_file

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##a", "##b", "the", "god"]
    d, rng = 4, np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (len(vocabulary), d),
        "embeddings.position_embeddings.weight": (8, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        **{
            f"encoder.layer.0.attention.{part}.weight": (d, d)
            for part in ("self.query", "self.key", "self.value", "output.dense")
        },
        **{
            f"encoder.layer.0.attention.{part}.bias": (d,)
            for part in ("self.query", "self.key", "self.value", "output.dense")
        },
        **{
            f"encoder.layer.0.{part}.{kind}": shape
            for part, n, m in (("intermediate.dense", 8, d), ("output.dense", d, 8))
            for kind, shape in (("weight", (n, m)), ("bias", (n,)))
        },
        **{
            f"{part}.LayerNorm.{kind}": (d,)
            for part in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output")
            for kind in ("weight", "bias")
        },
    }
    tensors = {f"bert.{name}": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tensors |= {
        "cls.predictions.bias": np.zeros(len(vocabulary), np.float32),
        "cls.predictions.transform.dense.weight": np.eye(d, dtype=np.float32),
    }
    tensors |= {
        f"cls.predictions.transform.{name}": np.ones(d, np.float32)
        for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 8,
        "hidden_size": d,
        "num_hidden_layers": 1,
    }
    config |= {
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')


def fuzz_models(work: Path) -> Case:
    models = make_models(work)

    def case(rng: random.Random) -> str:
        folder = work / "case"
        what = damaged(rng.choice(models), folder, rng)
        with limited(what):
            _, tokenizer = lama.load(folder, offline=True)
            tokenizer.decode(tokenizer.encode("a"))
        return what

    return case


def fuzz_runs(work: Path) -> Case:
    shutil.copy(EARLIER / "corpus.txt", work)

    def case(rng: random.Random) -> str:
        what = damaged(EARLIER / "run", work / "run", rng)
        with limited(what):
            resumed_run(RunFolder(work / "run"), {})
        return what

    return case


HELLASWAG = (
    b'{"ind": 1, "activity_label": "x", "ctx_a": "A man", "ctx_b": "he", "ctx": "A man he", "endings": '
    b'["a", "b", "c", "d"], "label": 1}\n'
) * 3
DATA: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "corpus.txt": (b"In the beginning\r\n" * 5, lambda path: open_corpus([str(path)]).text),
    "labels.tsv": (b"good\tbright day\nbad\tdark night\n" * 20, lambda path: open_labelled(str(path))),
    "labels.csv": (
        b'text,label\n"bright, day",good\ndark night,bad\n' * 20,
        lambda path: open_labelled(str(path)),
    ),
    "pairs.tsv": (b"one\tuno\ntwo\tdos\n" * 20, read_pairs),
    "hellaswag.jsonl": (HELLASWAG, lambda path: read_examples(TASKS["hellaswag"], path)),
    "lambada.jsonl": (
        b'{"text": "in my palm is a clear stone"}\n' * 3,
        lambda path: read_examples(TASKS["lambada"], path),
    ),
    "settings.toml": (
        b'corpus = ["kjv"]\nsteps = 5\nlearning_rate = 0.1\nbias = true\n',
        lambda path: run_config(read_settings(str(path))),
    ),
}


def fuzz_data(work: Path) -> Case:
    def case(rng: random.Random) -> str:
        name = rng.choice(sorted(DATA))
        content, read = DATA[name]
        damage = (
            damage_json
            if name.endswith("jsonl") and rng.random() < 0.6
            else rng.choice([damage_lines, damage_bytes])
        )
        lines = content.splitlines(keepends=True)
        one_line = damage is damage_json
        (work / name).write_bytes(
            b"".join([damage(lines[0], rng), b"\n", *lines[1:]]) if one_line else damage(content, rng)
        )
        what = f"{name}, {damage.__name__}"
        with limited(what):
            read(work / name)
        return what

    return case


# --- command lines

WORDS = [
    "",
    "-",
    "--",
    "x",
    "é",
    "\udce9",
    "-1",
    "0",
    "1",
    "2",
    "1.5",
    "nan",
    "inf",
    "1e999",
    "9" * 30,
    "9" * 5000,
    "a" * 300,
    "a/b",
    "/",
    "/dev/null",
    ".",
]
RIGHT: dict[Any, list[str]] = {int: ["1", "2", "3"], float: ["0.5", "1"]}
SHORT = {
    "steps": "2",
    "d_model": "8",
    "n_layers": "1",
    "n_heads": "2",
    "pretraining": "2",
    "context_length": "8",
}  # so that it is soon over
LENGTHY = {"verb", "experiment", "doctor", "course", "completion"}  # long, or without a file


def verbs() -> dict[str, argparse.ArgumentParser]:
    """All parsers that run something, by their words: `classify train`."""
    found: dict[str, argparse.ArgumentParser] = {}
    for verb, parser in make_parser().verbs.items():
        actions = getattr(parser, "verbs", {})
        found |= {f"{verb} {action}": each for action, each in actions.items()} or {verb: parser}
    return found


def random_command(
    parsers: dict[str, argparse.ArgumentParser], here: list[str], rng: random.Random
) -> list[str]:
    """A verb with some of its options and positional arguments: most of them are right, some wrong, missing
    or one too many.
    """
    verb = rng.choice([verb for verb in parsers if verb not in LENGTHY])
    argv, actions = (
        verb.split(),
        [
            action
            for action in parsers[verb]._actions
            if not isinstance(action, argparse._HelpAction) and action.dest != "traceback"
        ],
    )
    wrong = rng.choice([0.0, 0.05, 0.3])
    for action in actions:
        short = action.dest in SHORT
        needed = action.required or not action.option_strings
        if not short and (rng.random() < wrong if needed else rng.random() > 0.12):
            continue
        if action.option_strings:
            argv.append(rng.choice(action.option_strings))
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            continue
        right = (
            [SHORT[action.dest]]
            if short
            else [str(choice) for choice in action.choices or ()] or RIGHT.get(action.type, here)
        )
        argv.append(rng.choice(WORDS if rng.random() < wrong else right))
    return argv + [rng.choice(WORDS)] * (rng.random() < wrong)


def refuse() -> Path:
    raise LamaError("nothing is fetched here")


def fuzz_commands(work: Path) -> Case:
    for name in ("bpe", "bert", "classifier", "pairs", "run"):
        shutil.copytree(EARLIER / name, work / name)
    shutil.copy(EARLIER / "corpus.txt", work)
    smollm2.place, smollm2.fetch = lambda: work / "none", refuse
    parsers, here = verbs(), ["bpe", "bert", "classifier", "pairs", "run", "corpus.txt", "new", "0", "1", "3"]

    def case(rng: random.Random) -> str:
        argv = random_command(parsers, here, rng)
        what = str([word[:40] for word in argv])
        sys.stdin = io.TextIOWrapper(io.BytesIO(rng.choice([b"", b"a\n", b"\xff\n", b"And God said\n" * 3])))
        with (
            limited(what),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            try:
                code: Any = main(argv)
            except SystemExit as exit:
                code = exit.code
        last = (err.getvalue().splitlines() or [""])[-1]
        if code not in (0, 1, 2) or "Traceback" in err.getvalue() or (code and not last.startswith("lama: ")):
            raise Fault(f"{what}: exit code {code}, {err.getvalue()[-300:]!r}")
        if code:
            check_message(last, what)
        return what

    return case


# --- all of it

KINDS: dict[str, tuple[Callable[[Path], Case], int]] = {
    "models": (fuzz_models, 300),
    "runs": (fuzz_runs, 60),
    "data": (fuzz_data, 400),
    "commands": (fuzz_commands, 150),
}


def run(kind: str, n: int, seed: int) -> int:
    """Do `n` cases of a kind; print the failures, and return their number."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        case = KINDS[kind][0](Path(folder))
        for number in range(n):
            try:
                case(random.Random(f"{seed} {number}"))
            except Fault as fault:
                failures += 1
                print(f"{kind}, seed {seed}, case {number}: {fault}", flush=True)
        os.chdir(EARLIER)
    print(f"{kind}: {n} cases, {failures} failures, seed {seed}", flush=True)
    return failures


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", nargs="*", default=list(KINDS), help=f"{', '.join(KINDS)} (default all)")
    parser.add_argument("-n", type=int, default=0, help="cases of each kind (default: some hundred)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(sum(run(kind, given.n or KINDS[kind][1], given.seed) for kind in given.kind) > 0)
