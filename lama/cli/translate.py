"""Answer with an encoder-decoder of lama seq2seq.

Print the target that a model of lama seq2seq writes for each text. With -, print one line for each line of
standard input. It is empty for an empty line, and for one that cannot be answered: then the exit code is 1.
"""

import argparse
from collections.abc import Iterator

from lama.cli import AddVerb, machine
from lama.cli.lines import answer_lines, at_once
from lama.errors import UsageError

BATCH = 16  # lines of standard input at a time


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("translate", run, __doc__)
    parser.add_model("a folder that lama seq2seq has written")
    parser.add("text TEXT", "the source; - for the lines of standard input")
    parser.add("--beam N", "width of the beam search; 1 is greedy", 4)
    parser.add("--alpha X", "length penalty; a larger one favours longer targets, 0 is none", 0.6)
    machine.add_options(parser)
    parser.add("-v, --verbose", "print all targets of the beam with their scores; with -, separated by tabs")


def run(args: argparse.Namespace) -> int:
    if args.beam < 1 or not 0 <= args.alpha < float("inf"):
        found = f"beam={args.beam}, alpha={args.alpha}"
        raise UsageError(f"beam must be at least 1 and alpha at least 0; got {found}")
    if not args.text.strip():
        raise UsageError("TEXT must not be empty; give some text, or - for standard input")
    machine.use(args)
    from lama.checkpoints import load_kind
    from lama.data.pairs import encode_source
    from lama.generation.seq2seq import Searcher
    from lama.tokenizers import PairTokenizer

    model, tokenizer = load_kind("transformer", args.model, PairTokenizer)
    searcher = Searcher(model)

    def answers(texts: list[str]) -> Iterator[list[str]]:
        sources = [encode_source(text, tokenizer) for text in texts]
        for found in searcher.beam(sources, args.beam, args.alpha):
            targets = [tokenizer.decode(h.tokens) for h in found]
            if args.verbose:
                yield [f"{h.score(args.alpha):.4f}  {t}" for h, t in zip(found, targets, strict=True)]
            else:
                yield targets[:1]

    if args.text == "-":
        return answer_lines(lambda texts: map("\t".join, answers(texts)), at_once(BATCH))
    for targets in answers([args.text]):
        print(*targets, sep="\n", flush=True)
    return 0
