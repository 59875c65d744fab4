"""Tokenise a corpus once, for many runs.

Write the tokens of one or more corpora into DIR, with all processors. `lama train --corpus DIR` then reads
them from there, without a copy. A corpus is text, JSON lines or Parquet (the field text), and may be
compressed by gzip or zstd. If the command is killed, the same command continues.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

from lama.cli import AddVerb
from lama.cli.live import progress
from lama.cli.out import own_folder
from lama.errors import UsageError


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("data", run, __doc__)
    add = parser.add
    sources = "text files, files of rows, folders, patterns, - for standard input, kjv or tinyshakespeare"
    add("corpus CORPUS", sources, nargs="+")
    folder = "a new folder, or that of earlier tokens, which are replaced"
    add("--out DIR", folder, type=Path, required=True)
    names = "bytes, character, gpt2, bpe:SIZE (trained on CORPUS), a tokenizer's folder, or a model's name"
    add("--tokenizer NAME", names, "gpt2")
    add("--validation X", "share held out: the end of each file, and rows chosen by their content", 0.1)
    add("--workers N", "processes (default: one for each processor)", type=int)


def run(args: argparse.Namespace) -> int:
    from lama.checkpoints import find, load_tokenizer
    from lama.data import open_corpus, tokenize
    from lama.training.prepare import make_tokenizer

    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers must be at least 1; got {args.workers}")
    if not 0 < args.validation < 1:
        raise UsageError(f"--validation must be a share between 0 and 1; got {args.validation}")
    with own_folder(args.out, None, "data", replace=True) as out:
        corpus = open_corpus(args.corpus, without=out, read=False)
        name = args.tokenizer
        if name in ("bytes", "character", "gpt2") or name.startswith("bpe:") or os.path.isdir(name):
            tokenizer = make_tokenizer(name, corpus)
        else:
            tokenizer = load_tokenizer(find(name).path)
        began = time.perf_counter()
        watch = partial(progress, unit="piece", label="tokenizing")
        tokens = tokenize(corpus, tokenizer, out, args.validation, watch, args.workers, keep_tokenizer=True)
        seconds = time.perf_counter() - began
    parts = f"{len(tokens.train):,} tokens for training, {len(tokens.validation):,} held out"
    size = tokens.n_bytes / 1e6
    print(f"{corpus.name}: {size:,.1f} MB in {seconds:.1f} s, {size / seconds:.1f} MB/s; {parts}")
    print(f"saved in {args.out}. Train a GPT on it: lama train --corpus {args.out}")
    return 0
