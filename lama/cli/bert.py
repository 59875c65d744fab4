"""Train a BERT: an encoder that predicts masked tokens.

Train a BERT-style encoder on a text, as `lama train --model bert` does. 15 % of the tokens are masked,
and it learns to predict them from the context on both sides. `lama fill` uses it.
"""

import argparse
import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine, training
from lama.cli.lines import answer_lines, at_once
from lama.cli.live import heading
from lama.cli.settings import add_settings
from lama.errors import LamaError, UsageError, check_least
from lama.tables import metric_table

if TYPE_CHECKING:
    from lama.training.masked import BertSession
    from lama.training.session import Evaluation

AT_ONCE = 16  # lines of a pipe that are answered together
FEWEST_LETTERS = 3  # of a word that is masked in a sample


def add_parser(add_verb: AddVerb) -> None:
    parser = add_verb("bert", training.run, __doc__)
    parser.set_defaults(model="bert")
    corpus = "files, folders, patterns, - for standard input, kjv or tinyshakespeare (default kjv)"
    parser.add("corpus CORPUS", corpus, nargs="*")
    training.add_options(parser, "out/bert")
    add_settings(parser, "bert")

    parser = add_verb("fill", run_fill, run_fill.__doc__)
    parser.add_model("a folder that lama bert has written, or a BERT of the hub such as bert-base-uncased")
    parser.add("text TEXT", 'such as "In the [MASK] God created the heaven"; - for lines of standard input')
    parser.add("-n N", "tokens shown for each", 5)
    parser.add("--json", "a JSON object for each text, with tokens and probabilities")
    machine.add_options(parser)


def introduce(session: "BertSession", args: argparse.Namespace) -> None:
    from lama.models.registry import describe

    heading(f"The corpus: {session.tokens.corpus['name']}")
    print(f"{len(session.tokens.train):,} tokens for training, {len(session.tokens.validation):,} held out")
    print(describe(session.model))
    session.measure_start()


def conclude(session: "BertSession", last: "Evaluation | None") -> None:
    """Print predictions and scores. Raises LamaError for a model that is no better than a baseline."""
    session.load_best()
    trained, out = session.measure(), session.folder.path
    heading("Predictions in held-out text")
    show_predictions(session)
    heading("Result")
    losses = {"untrained": session.untrained, **session.baselines, "trained": trained["validation_loss"]}
    shares = session.shares | {"trained": trained["accuracy"]}
    accuracies = [shares[name] for name in losses]
    rows = ("loss, nats per token", losses.values(), ".3f"), ("accuracy", accuracies, ".1%")
    print(metric_table("masked held-out tokens", losses, *rows))
    print(f"\n{session.seconds:.0f} s in all; saved in {out}. Use it:")
    print(f'  lama fill -m {shlex.quote(str(out))} "In the [MASK] God created the heaven and the earth."')
    best = min(("untrained", *session.baselines), key=losses.__getitem__)
    if losses["trained"] >= losses[best]:
        got = f"{losses['trained']:.3f} nats per token, {best} {losses[best]:.3f}"
        rule = "the trained model must beat the untrained one and the baselines"
        raise LamaError(f"{rule}; got {got}. Raise --steps")


def show_predictions(session: "BertSession", n: int = 4) -> None:
    from lama.data.masked import MASK
    from lama.generation.fill_mask import fill_in

    model, tokenizer = session.model, session.tokenizer
    text = tokenizer.decode(session.tokens.validation[: n * 40].tolist())
    lines = [line for line in text.splitlines()[1:-1] if len(line.split()) > 8][:n]
    for line in lines:
        words = line.split()
        middle = len(words) // 2
        places = sorted(range(3, len(words) - 1), key=lambda i: abs(i - middle))
        masked = next((i for i in places if len(words[i]) > FEWEST_LETTERS), places[0])
        shown = " ".join([*words[:masked], MASK, *words[masked + 1 :]])
        if len(tokenizer.encode(shown)) <= model.config.context_length:
            (best,) = fill_in(model, tokenizer, shown, 3)
            print(f"{shown}\n  {words[masked]!r}; predicted: {predictions(best)}")


def predictions(best: list[tuple[str, float]]) -> str:
    return ", ".join(f"{token.strip() or repr(token)} {chance:.0%}" for token, chance in best)


def run_fill(args: argparse.Namespace) -> int:
    """Predict the masked tokens of a text with a BERT.

    Print the most likely tokens for each [MASK] in the text, with their probabilities; then the text with the
    most likely ones. With -, print the filled text for each line of standard input. It is empty for an empty
    line, and for one that cannot be filled: then the exit code is 1.
    """
    check_least("n", args.n, 1)
    machine.use(args)
    from lama.checkpoints import load_kind
    from lama.generation.fill_mask import fill_in
    from lama.tokenizers import BytePairTokenizer, WordPieceTokenizer

    model, tokenizer = load_kind("bert", args.model, (BytePairTokenizer, WordPieceTokenizer))
    if args.n > (most := model.config.vocab_size - 2):  # without [PAD] and [MASK]
        raise UsageError(f"n must be at most {most}, the tokens that the model can predict; got {args.n}")

    def answers(texts: list[str]) -> Iterator[tuple[str, str]]:
        for text in texts:
            found = fill_in(model, tokenizer, text, args.n)
            filled = filled_in(text, [best[0][0] for best in found])
            if args.json:
                masks = [[{"token": t, "probability": round(p, 6)} for t, p in best] for best in found]
                yield "", json.dumps({"text": filled, "masks": masks}, ensure_ascii=False)
            else:
                yield "".join(f"{predictions(best)}\n" for best in found), filled

    if args.text == "-":
        return answer_lines(lambda texts: (filled for _, filled in answers(texts)), at_once(AT_ONCE))
    for found, filled in answers([args.text]):
        print(f"{found}{filled}")
    return 0


def filled_in(text: str, tokens: list[str]) -> str:
    """The text with a token in place of each [MASK]; the space before one may be the token's own."""
    from lama.data.masked import MASK

    filled, *rest = text.split(MASK)
    for token, part in zip(tokens, rest, strict=False):
        if token.startswith(" "):
            filled = filled.removesuffix(" ")
            token = token if filled else token[1:]
        filled += token + part
    return filled
