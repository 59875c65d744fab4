"""`lama translate`: the target that an encoder-decoder writes for a source."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lama.cli import machine
from lama.cli.lines import answer_lines, at_once
from lama.errors import UsageError

BATCH = 16  # lines of standard input at a time


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "translate",
        help="answer with an encoder-decoder of lama seq2seq",
        description="Print the target that a model of lama seq2seq writes for each text. With -, one line for each line of standard input: "
        "an empty one where it is empty or cannot be answered, which exits with 1 at the end.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", type=Path, metavar="DIR", help="the folder of lama seq2seq")
    add("text", metavar="TEXT", help="the source; - for the lines of standard input")
    add("--beam", type=int, default=4, metavar="N", help="targets that are followed at a time; 1 is greedy (default 4)")
    add("--alpha", type=float, default=0.6, metavar="X", help="how much long targets are favoured (default 0.6; 0: not at all)")
    machine.add_options(parser)
    add("-v", "--verbose", action="store_true", help="print all targets of the beam with their scores, with - separated by tabs")


def run(args: argparse.Namespace) -> int:
    if args.beam < 1 or not 0 <= args.alpha < float("inf"):
        raise UsageError(f"beam must be at least 1 and alpha at least 0; got beam={args.beam}, alpha={args.alpha}")
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
        """The targets that are shown for each text, the best first."""
        for hypotheses in searcher.beam([encode_source(text, tokenizer) for text in texts], args.beam, args.alpha):
            shown = hypotheses if args.verbose else hypotheses[:1]
            yield [f"{f'{h.score(args.alpha):.4f}  ' * args.verbose}{tokenizer.decode(h.tokens)}" for h in shown]

    if args.text == "-":
        return answer_lines(lambda texts: map("\t".join, answers(texts)), at_once(BATCH))
    for targets in answers([args.text]):
        print(*targets, sep="\n", flush=True)
    return 0
