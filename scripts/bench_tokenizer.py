"""Compare training and encoding of lama's BPE with Hugging Face's `tokenizers` and rustbpe, on one text.

    python scripts/bench_tokenizer.py [--corpus FILE] [--size 8000] [--rounds 5]

Each round trains every library in turn and encodes the whole text with the result. Prints a Markdown table,
and all figures as one line of JSON. A library that is not installed is left out. All get the text as one
string and split it with GPT-2's pattern, so all should need the same number of tokens. `tokenizers` and
rustbpe are Rust, lama's trainer is plain Python. tiktoken does not train: it is lama's encoding engine.
"""

import argparse
import gc
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from lama import __version__
from lama.data import open_corpus
from lama.tokenizers.bpe import GPT2_PATTERN as LAMA_PATTERN

Encode = Callable[[str], Sequence[int]]
# OpenAI's own spelling.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_lama(text: str, size: int) -> Encode:
    from lama.tokenizers import train_bpe

    return train_bpe(text, size, special_tokens=()).encode


def engine_alone(text: str, size: int) -> Encode:
    """tiktoken with lama's merges: the limit of lama's encoding speed."""
    import tiktoken

    from lama.tokenizers import train_bpe

    tokenizer = train_bpe(text, size, special_tokens=())
    ranks = {tokenizer.decode_bytes([i]): i for i in range(size)}
    found = tiktoken.Encoding("bench", pat_str=LAMA_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return found.encode_ordinary


def train_tokenizers(text: str, size: int) -> Encode:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return lambda text: tokenizer.encode(text).ids


def train_rustbpe(text: str, size: int) -> Encode:
    import rustbpe  # type: ignore[import-not-found]

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter([text]), size, pattern=GPT2_PATTERN)
    return tokenizer.encode


LIBRARIES = {
    "lama": train_lama,
    "tiktoken": engine_alone,
    "tokenizers": train_tokenizers,
    "rustbpe": train_rustbpe,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, metavar="FILE", help="a UTF-8 text file (default: the King James Bible)"
    )
    parser.add_argument("--size", type=int, default=8000, help="entries in the vocabulary (default 8000)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    corpus = open_corpus([str(args.corpus)] if args.corpus else [])
    n_bytes = len(corpus.text.encode())

    versions = {"lama": __version__}
    for library in [library for library in LIBRARIES if library != "lama"]:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            print(f"{library} is not installed; left out", file=sys.stderr)
    trained: dict[str, list[float]] = {library: [] for library in versions}
    encoded: dict[str, list[float]] = {library: [] for library in versions}
    tokens = {}
    for i in range(args.rounds):
        for library in versions:
            gc.collect()
            began = time.perf_counter()
            encode = LIBRARIES[library](corpus.text, args.size)
            trained[library].append(time.perf_counter() - began)
            began = time.perf_counter()
            tokens[library] = len(encode(corpus.text))
            encoded[library].append(time.perf_counter() - began)
            times = f"{trained[library][-1]:.2f} s, {encoded[library][-1]:.2f} s"
            print(f"round {i + 1}: {library} {times}", file=sys.stderr, flush=True)

    print(f"{corpus.name}, {n_bytes / 1e6:.2f} MB, {args.size:,} entries; {args.rounds} rounds", end="")
    print(", median (best); ratios of the best\n")
    print("| library | train, s | time / lama's | encode, MB/s | speed / lama's | bytes per token |")
    print("|---|---|---|---|---|---|")
    results = {}
    for library, version in versions.items():
        learn, speed = trained[library], [n_bytes / 1e6 / seconds for seconds in encoded[library]]
        training = f"{median(learn):.2f} ({min(learn):.2f}) | {min(learn) / min(trained['lama']):.2f}"
        if library == "tiktoken":
            training = "lama trains |"
        relative = min(encoded["lama"]) / min(encoded[library])
        encoding, density = (
            f"{median(speed):.1f} ({max(speed):.1f}) | {relative:.2f}",
            n_bytes / tokens[library],
        )
        print(f"| {library} {version} | {training} | {encoding} | {density:.3f} |")
        results[library] = {
            "version": version,
            "train_s": learn,
            "encode_mb_s": speed,
            "bytes_per_token": density,
        }
    about = {"corpus": corpus.name, "bytes": n_bytes, "size": args.size}
    print("\n" + json.dumps(about | {"libraries": results}))


if __name__ == "__main__":
    main()
