"""`lama classify`: train a text classifier, judge it, and let it tell what a text is."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.lines import at_once, in_batches, input_lines
from lama.cli.live import LiveLine, heading, state, stopped_by, stopping
from lama.cli.out import check_folder
from lama.cli.settings import add_settings, given
from lama.errors import LamaError
from lama.training.encoders import PRESETS, ClassifierSettings

if TYPE_CHECKING:
    from lama.training.classify import ClassifierTraining, Judgement, Predictor

DATA = "testament, names, shakespeare-milton, or a file: lines of label, tab, text; or .csv with the columns text and label"
AT_ONCE = 64  # lines of a pipe


def add_parser(verbs: "argparse._SubParsersAction[Any]") -> None:
    parser = verbs.add_parser(
        "classify",
        help="train a text classifier, judge it, use it",
        description="A transformer encoder that tells which class a text is of.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))

    train = actions.add_parser(
        "train",
        help="train a classifier",
        description="Train a classifier on four fifths of the texts, the encoder first guessing masked tokens in them, and judge it by the "
        "last fifth beside the most frequent class and naive Bayes. Settings have defaults that suit the data set. Ctrl-C ends the step "
        "and saves the best so far. Exits with 1 if the model is no better than the untrained one or the most frequent class.",
    )
    train.set_defaults(run=run_train)
    train.add_argument("data", metavar="DATA", help=DATA)
    train.add_argument("--out", type=Path, metavar="DIR", help="the folder of the model (default out/ and the data set's name)")
    add_settings(train, ClassifierSettings, leave_out=("recompute",))

    judge = actions.add_parser(
        "eval",
        help="judge a classifier",
        description="Accuracy and confusion matrix: on the fifth of its own data set that it has not learned from, or on all of a FILE.",
    )
    judge.set_defaults(run=run_eval)
    judge.add_argument("model", metavar="DIR", help="a folder that lama classify train has written")
    judge.add_argument("file", nargs="?", metavar="FILE", help="lines of label, tab, text; or .csv with the columns text and label")

    predict = actions.add_parser(
        "predict",
        help="tell what a text is",
        description="For each text its class, the probability, and the text, with tabs between.",
    )
    predict.set_defaults(run=run_predict)
    predict.add_argument("model", metavar="DIR", help="a folder that lama classify train has written")
    predict.add_argument("text", nargs="+", metavar="TEXT", help="one or more texts; - for the lines of standard input")
    predict.add_argument("--json", action="store_true", help="a JSON object for each text, with the probability of every class")
    parser.verbs = actions.choices
    for each in (train, judge, predict):
        machine.add_options(each)
        each.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")


def run_train(args: argparse.Namespace) -> int:
    settings = ClassifierSettings(**PRESETS.get(args.data, {}) | given(args, ClassifierSettings))
    out = args.out or Path("out") / Path(args.data).stem
    check_folder(out, ("config.json",), "a model of lama's")
    machine.use(args)
    from lama.checkpoints import save
    from lama.data.labelled import open_labelled, split_labelled
    from lama.data.naive_bayes import best_naive_bayes
    from lama.training.classify import ClassifierTraining, judge, judged

    data = open_labelled(args.data)
    learned, kept = split_labelled(data.examples)
    missing = set(data.labels) - {example.label for example in learned}
    if missing:
        raise LamaError(f"each label must be among the texts to learn from; got none for {', '.join(sorted(missing))}. Give more examples")
    heading(f"The data: {data.name}")
    for label in data.labels:
        print(f"{sum(example.label == label for example in data.examples):>8,} {label}, such as {_first(data.examples, label)!r}")
    print(f"{len(learned):,} to learn from, {len(kept):,} held out to judge by")
    began = time.perf_counter()
    bayes = best_naive_bayes(learned)
    training = ClassifierTraining(settings, learned, data.labels)
    print(training.model.describe())
    majority = max(data.labels, key=lambda label: sum(example.label == label for example in learned))
    results = {
        "untrained": judged(training.predictor, kept),
        "majority": judge(data.labels, kept, [majority] * len(kept)),
        "naive Bayes": judge(data.labels, kept, bayes([example.text for example in kept])),
    }
    heading(f"Training: {settings.pretraining} steps of guessing masked tokens, {settings.steps} of classifying")
    with stopping(training) as received:
        watch(training)
    results["trained"] = judged(training.predictor, kept)
    seconds = time.perf_counter() - began
    about = {"data": args.data, "provenance": data.provenance, "licence": data.licence, "seed": settings.seed, "seconds": round(seconds, 1)}
    accuracies = {name: result.accuracy for name, result in results.items()}
    confusion = results["trained"].confusion.tolist()
    save(out, training.model, training.tokenizer, {**about, "heldout_accuracy": accuracies, "heldout_confusion": confusion})
    if received:
        return stopped_by(received, f"; the model so far is in {out}")

    heading(f"What it makes of the {len(kept):,} texts that it has not seen")
    print(f"{results['trained'].table()}\n\n{table(results)}")
    print(f"(naive Bayes: {bayes.features}, α = {bayes.alpha:g}, chosen on a tenth of the texts to learn from)")
    print(f"\n{seconds:.0f} s in all; saved in {out}. Ask it:\n  lama classify predict {out} {json.dumps(kept[0].text[:60])}")
    best = max("untrained", "majority", key=accuracies.__getitem__)
    if accuracies["trained"] <= accuracies[best]:
        raise LamaError(
            f"the trained model must beat the {best} one; got {accuracies['trained']:.1%}, and {accuracies[best]:.1%}. Raise --steps"
        )
    return 0


def _first(examples: Any, label: str) -> str:
    return str(next(example.text for example in examples if example.label == label))[:60]


def watch(training: "ClassifierTraining") -> None:
    """Train with a live line for each of the two parts."""
    from lama.training.loop import Step

    print("compiling the training step, once", file=sys.stderr)
    s = training.settings
    line, loss = LiveLine(s.pretraining or s.steps, 0), 0.0
    pretraining = training.pretraining
    try:
        for event in training:
            if isinstance(event, Step):
                if pretraining and not training.pretraining:
                    line.say(f"pretrained for {s.pretraining} steps: loss {loss:.3f} nats per masked token")
                    line.close()
                    line, pretraining = LiveLine(s.steps, 0), False
                loss = event.loss
                line.step(event.step, state(event, None, compiled=event.step > 1))
            else:
                line.say(
                    f"step {event.step}: {event.accuracy:.1%} of the texts kept back are right{', the best so far' if event.best else ''}"
                )
    finally:
        line.close()


def table(results: "dict[str, Judgement]") -> str:
    """The accuracies side by side."""
    head = f"{'held-out texts':<16}" + "".join(f"| {name:>11} " for name in results)
    return f"{head.rstrip()}\n" + (f"{'accuracy':<16}" + "".join(f"| {result.accuracy:>11.2%} " for result in results.values())).rstrip()


def load_predictor(folder: str, batch_size: int) -> "Predictor":
    """Raises LamaError for a model that is no classifier."""
    from lama.checkpoints import load_kind
    from lama.tokenizers import BytePairTokenizer
    from lama.training.classify import Predictor

    return Predictor(*load_kind("classifier", folder, BytePairTokenizer), batch_size)


def run_eval(args: argparse.Namespace) -> int:
    machine.use(args)
    from lama.checkpoints import read_json
    from lama.data.labelled import open_labelled, split_labelled
    from lama.training.classify import judged

    predictor = load_predictor(args.model, AT_ONCE)
    if args.file:
        examples = list(open_labelled(args.file).examples)
    else:
        notes = read_json(Path(args.model) / "config.json").get("training")
        source = notes.get("data") if isinstance(notes, dict) else None
        if not isinstance(source, str):
            raise LamaError(f"{args.model} must name the data it was trained on; got none. Give a FILE")
        _, examples = split_labelled(open_labelled(source).examples)
    known = predictor.model.config.labels
    if unknown := sorted({example.label for example in examples} - set(known)):
        raise LamaError(f"labels must be the model's, {', '.join(known)}; got {', '.join(unknown[:5])}")
    result = judged(predictor, examples)
    print(f"{result.table()}\n\naccuracy {result.accuracy:.2%} of {len(examples):,} texts")
    return 0


def run_predict(args: argparse.Namespace) -> int:
    machine.use(args)
    piped = args.text == ["-"]
    predictor = load_predictor(args.model, at_once(AT_ONCE) if piped else min(len(args.text), AT_ONCE))
    stripped = (line.strip() for line in (input_lines() if piped else args.text))
    labels = predictor.model.config.labels
    for texts in in_batches(filter(None, stripped), predictor.batch_size):
        for text, chances in zip(texts, predictor(texts), strict=True):
            best = int(chances.argmax())
            if args.json:
                found = {label: round(float(chance), 6) for label, chance in zip(labels, chances, strict=True)}
                print(json.dumps({"label": labels[best], "probabilities": found, "text": text}, ensure_ascii=False))
            else:
                print(f"{labels[best]}\t{chances[best]:.3f}\t{text}")
        sys.stdout.flush()
    return 0
