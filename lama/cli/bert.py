"""`lama bert`: train an encoder to predict masked tokens. `lama fill`: predict them."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.lines import answer_lines, at_once
from lama.cli.live import LiveLine, heading, state, stopped_by, stopping, tokenizing
from lama.cli.out import own_folder
from lama.cli.settings import add_settings, given
from lama.errors import LamaError, UsageError
from lama.training.encoders import BertSettings

if TYPE_CHECKING:
    from lama.training.masked import BertTraining, MaskedScore

AT_ONCE = 16  # lines of a pipe
FEWEST_LETTERS = 3  # of a word that is hidden for show


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "bert",
        help="train a BERT: an encoder that predicts masked tokens",
        description="Train a BERT-style encoder on a text: it predicts 15 of 100 tokens from the context on both sides. It is evaluated on "
        "held-out text beside the untrained model and n-gram counts, and saved for lama fill. Ctrl-C finishes the step and saves. Exits "
        "with 1 if the model is no better than counting.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("corpus", nargs="*", metavar="CORPUS", help="files, folders, patterns, - for standard input, kjv or tinyshakespeare (default kjv)")
    add("--out", type=Path, metavar="DIR", help="the folder of the model (default out/bert, or out/bert-2)")
    add("--restart", action="store_true", help="replace the model of an earlier lama bert in --out, which is lost")
    machine.add_options(parser)
    add_settings(parser, BertSettings, leave_out=("recompute",))

    parser = verbs.add_parser(
        "fill",
        help="predict the masked tokens of a text with a BERT",
        description="Print the most likely tokens for each [MASK] in the text, with their probabilities; then the text with the most "
        "likely ones. With -, print one line for each line of standard input, the text filled in: an empty one where the line is empty or "
        "cannot be answered, which exits with 1 at the end.",
    )
    parser.set_defaults(run=run_fill)
    add = parser.add_argument
    add("model", metavar="DIR", help="a folder that lama bert has written, or a BERT of the hub such as bert-base-uncased")
    add("text", metavar="TEXT", help='such as "In the [MASK] God created the heaven"; - for lines of standard input')
    add("-n", type=int, default=5, metavar="N", help="tokens shown for each (default 5)")
    add("--json", action="store_true", help="a JSON object for each text, with the tokens and their probabilities")
    machine.add_options(parser)


def run(args: argparse.Namespace) -> int:
    settings = BertSettings(**given(args, BertSettings))
    machine.use(args)
    with own_folder(args.out, Path("out/bert"), "bert", replace=args.restart) as out:
        return train(args, settings, out)


def train(args: argparse.Namespace, settings: BertSettings, out: Path) -> int:
    from lama.checkpoints import save
    from lama.data import open_corpus
    from lama.training.masked import BertTraining

    corpus = open_corpus(args.corpus)
    heading(f"The corpus: {corpus.name}")
    began = time.perf_counter()
    training = BertTraining(settings, corpus, tokenizing)
    print(f"{len(training.learned):,} tokens to learn from, {len(training.heldout):,} held out\n{training.model.describe()}")
    scores = {"untrained": training.evaluate(), **training.baselines}
    heading(f"Training: {settings.steps} steps of {settings.batch_size} x {settings.context_length} tokens, 15 % of them to be guessed")
    with stopping(training) as received:
        last = watch(training)
    if received or last is None:
        last = training.evaluate()
    scores["trained"] = last
    seconds = time.perf_counter() - began
    losses = {name: {"nats_per_token": score.loss, "accuracy": score.accuracy} for name, score in scores.items()}
    notes = {"corpus": corpus.name, "provenance": corpus.provenance, "licence": corpus.licence, "seed": settings.seed}
    save(out, training.model, training.tokenizer, {**notes, "heldout": losses, "seconds": round(seconds, 1)})
    if received:
        return stopped_by(received, f"; the model so far is in {out}")

    heading("Guesses in held-out text")
    show_guesses(training)
    heading("What it learned")
    print(f"{table(scores)}\n\n{seconds:.0f} s in all; saved in {out}. Let it guess:")
    print(f'  lama fill {shlex.quote(str(out))} "In the [MASK] God created the heaven and the earth."')
    best = min(("untrained", *training.baselines), key=lambda name: scores[name].loss)
    if last.loss >= scores[best].loss:
        raise LamaError(
            f"the trained model must beat all others; got {last.loss:.3f} nats per token, {best} {scores[best].loss:.3f}. Raise --steps"
        )
    return 0


def watch(training: "BertTraining") -> "MaskedScore | None":
    """Train with a live line; returns the last score on held-out text."""
    from lama.training.loop import Step

    print("compiling the training step, once", file=sys.stderr)
    last, step = None, 0
    with closing(LiveLine(training.settings.steps, 0)) as line:
        for event in training:
            if isinstance(event, Step):
                step = event.step
                line.step(step, state(event, None, compiled=step > 1))
            else:
                last = event
                line.say(f"step {step}: held-out loss {event.loss:.4f}, {event.accuracy:.1%} guessed")
    return last


def table(scores: "dict[str, MaskedScore]") -> str:
    """The scores side by side."""
    lines = [f"{'masked held-out tokens':<24}" + "".join(f"| {name:>10} " for name in scores)]
    lines.append(f"{'loss, nats per token':<24}" + "".join(f"| {score.loss:>10.3f} " for score in scores.values()))
    lines.append(f"{'guessed at once':<24}" + "".join(f"| {score.accuracy:>10.1%} " for score in scores.values()))
    return "\n".join(line.rstrip() for line in lines)


def show_guesses(training: "BertTraining", n: int = 4) -> None:
    """Held-out passages with one word hidden in each."""
    from lama.training.masked import MASK, fill_in

    text = training.tokenizer.decode(training.heldout[: n * 40].tolist())
    lines = [line for line in text.splitlines()[1:-1] if len(line.split()) > 8][:n]
    for line in lines:
        words = line.split()
        hidden = max(range(3, len(words) - 1), key=lambda i: (len(words[i]) > FEWEST_LETTERS, -abs(i - len(words) // 2)))
        masked = " ".join([*words[:hidden], MASK, *words[hidden + 1 :]])
        if len(training.tokenizer.encode(masked)) <= training.model.config.context_length:
            (best,) = fill_in(training.model, training.tokenizer, masked, 3)
            print(f"{masked}\n  {words[hidden]!r}; guessed: {guesses(best)}")


def guesses(best: list[tuple[str, float]]) -> str:
    return ", ".join(f"{token.strip() or repr(token)} {chance:.0%}" for token, chance in best)


def run_fill(args: argparse.Namespace) -> int:
    if args.n < 1:
        raise UsageError(f"n must be at least 1; got {args.n}")
    machine.use(args)
    from lama.checkpoints import load_kind
    from lama.training.masked import MaskTokenizer, fill_in

    model, tokenizer = load_kind("bert", args.model, MaskTokenizer)
    if args.n > (most := model.config.vocab_size - 2):  # without [PAD] and [MASK]
        raise UsageError(f"n must be at most {most}, the tokens that the model can predict; got {args.n}")

    def answers(texts: list[str]) -> Iterator[tuple[str, str]]:
        """For each text, what is shown beside it, and what it is with its masks filled in."""
        for text in texts:
            found = fill_in(model, tokenizer, text, args.n)
            filled = filled_in(text, [best[0][0] for best in found])
            if args.json:
                masks = [[{"token": token, "probability": round(chance, 6)} for token, chance in best] for best in found]
                yield "", json.dumps({"text": filled, "masks": masks}, ensure_ascii=False)
            else:
                yield "".join(f"{guesses(best)}\n" for best in found), filled

    if args.text == "-":
        return answer_lines(lambda texts: (filled for _, filled in answers(texts)), at_once(AT_ONCE))
    for table, filled in answers([args.text]):
        print(f"{table}{filled}")
    return 0


def filled_in(text: str, tokens: list[str]) -> str:
    """The text with a token in place of each [MASK]; the space before one may be the token's own."""
    from lama.training.masked import MASK

    filled, *rest = text.split(MASK)
    for token, part in zip(tokens, rest, strict=False):
        if token.startswith(" "):
            filled = filled.removesuffix(" ")
            token = token if filled else token[1:]
        filled += token + part
    return filled
