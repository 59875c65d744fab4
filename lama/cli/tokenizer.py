"""Train a byte-pair tokenizer.

Train a byte-level BPE of exactly SIZE entries. It writes vocab.json, merges.txt, tokenizer.json and
tokenizer_config.json for Hugging Face's libraries; also base.json (the bytes that occur in the corpus) and
tokens.txt (the corpus as tokens). The same corpus gives the same files.
"""

import argparse
import json
import time
from functools import partial
from itertools import chain
from pathlib import Path

from lama.cli import AddVerb
from lama.cli.live import progress
from lama.cli.out import own_folder

LONGEST = 10  # tokens shown


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("tokenizer", run, __doc__)
    add = parser.add
    sources = "a text file, a folder, a pattern, - for standard input, kjv or tinyshakespeare"
    add("corpus CORPUS", f"{sources} (default kjv, the King James Bible)", nargs="?")
    add("size SIZE", "entries in the vocabulary: 256 bytes, the special tokens, and merges", type=int)
    folder = "a new folder, or that of an earlier tokenizer, which is replaced"
    add("--out DIR", folder, type=Path, required=True)
    add("--special TOKEN", "a special token, can be repeated (default <|endoftext|>)", action="append")


def run(args: argparse.Namespace) -> int:
    from lama.tokenizers.training import END_OF_TEXT, check_vocabulary

    special = args.special or [END_OF_TEXT]
    check_vocabulary(args.size, special)
    with own_folder(args.out, None, "tokenizer", replace=True):
        return train(args, special)


def train(args: argparse.Namespace, special: list[str]) -> int:
    from lama.atomic import atomic_folder, write_files
    from lama.data import encode_pieces, open_corpus
    from lama.tokenizers.training import base_symbols, spelled_out, train_bpe

    corpus = open_corpus([] if args.corpus is None else [args.corpus])
    n_bytes = corpus.n_bytes
    print(f"{corpus.name}: {n_bytes:,} bytes", flush=True)
    began, total = time.perf_counter(), args.size - 256 - len(special)
    watch = partial(progress, total=total, unit="merge", label="merging")
    tokenizer = train_bpe(corpus.pieces(), args.size, special, watch)
    seconds = time.perf_counter() - began

    parts = (encode_pieces(tokenizer, document.pieces()) for document in corpus.documents)
    ids = list(chain.from_iterable(chain.from_iterable(parts)))
    files = {Path(name).name: content for name, content in tokenizer.files.items()}
    vocabulary: dict[str, int] = json.loads(files["vocab.json"])
    base = json.dumps(base_symbols(corpus.pieces(), special), ensure_ascii=False)
    files["base.json"] = f"{base}\n".encode()
    files["tokens.txt"] = spelled_out(ids, vocabulary).encode()
    with atomic_folder(args.out) as folder:
        write_files(folder, files)

    print(f"{args.size:,} entries in {seconds:.1f} s: 256 bytes, {total:,} merges, {len(special)} special")
    tokens = [tokenizer.decode_bytes([i]) for i in range(args.size - len(special))]
    longest = sorted(tokens, key=len, reverse=True)[:LONGEST]
    print(f"longest tokens: {', '.join(repr(token.decode(errors='replace')) for token in longest)}")
    print(f"the corpus is {len(ids):,} tokens, {n_bytes / len(ids):.2f} bytes per token")
    print(f"saved in {args.out}: {', '.join(sorted(files))}")
    return 0
