"""`lama classify`: train a text classifier, judge it, and let it tell what a text is."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lama.cli import machine
from lama.cli.lines import answer_lines, at_once, in_batches
from lama.cli.live import LiveLine, heading, state, stopped_by, stopping
from lama.cli.out import own_folder
from lama.cli.settings import add_settings, given
from lama.errors import LamaError, UsageError, quoted
from lama.files import quoted_path, read_object
from lama.training.encoders import PRESETS, ClassifierSettings

if TYPE_CHECKING:
    from lama.data.labelled import Labelled
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
    train.add_argument("--out", type=Path, metavar="DIR", help="the model's folder (default out/ and the data's name, or NAME-2)")
    train.add_argument("--restart", action="store_true", help="replace the model of an earlier lama classify train in --out, which is lost")
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
        help="classify texts",
        description="Print the class of each text, its probability and the text, separated by tabs. With -, print one line for each "
        "line of standard input: an empty one where it is empty or cannot be answered, which exits with 1 at the end.",
    )
    predict.set_defaults(run=run_predict)
    predict.add_argument("model", metavar="DIR", help="a folder that lama classify train has written")
    predict.add_argument("text", nargs="+", metavar="TEXT", help="one or more texts; - for the lines of standard input")
    predict.add_argument("--json", action="store_true", help="a JSON object for each text, with the probability of every class")
    parser.verbs = actions.choices
    for each in (train, judge, predict):
        machine.add_options(each)


def run_train(args: argparse.Namespace) -> int:
    settings = ClassifierSettings(**PRESETS.get(args.data, {}) | given(args, ClassifierSettings))
    machine.use(args)
    from lama.data.labelled import open_labelled

    data = open_labelled(args.data)
    default = Path("out") / (Path(args.data).stem or "classifier")
    with own_folder(args.out, default, "classify train", replace=args.restart) as out:
        return train_classifier(args, data, settings, out)


def train_classifier(args: argparse.Namespace, data: "Labelled", settings: ClassifierSettings, out: Path) -> int:
    from lama.checkpoints import save
    from lama.data.labelled import split_labelled
    from lama.data.naive_bayes import best_naive_bayes
    from lama.training.classify import ClassifierTraining, judge, judged

    learned, kept = split_labelled(data.examples)
    missing = set(data.labels) - {example.label for example in learned}
    if missing:
        none = quoted(", ".join(sorted(missing)), plain=True)
        raise LamaError(f"each label must be among the texts to learn from; got none for {none}. Give more examples")
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
    source = os.path.abspath(args.data) if data.provenance == args.data else args.data  # a file is found from another folder, too
    about = {"data": source, "provenance": data.provenance, "licence": data.licence, "seed": settings.seed, "seconds": round(seconds, 1)}
    accuracies = {name: result.accuracy for name, result in results.items()}
    confusion = results["trained"].confusion.tolist()
    save(out, training.model, training.tokenizer, {**about, "heldout_accuracy": accuracies, "heldout_confusion": confusion})
    if received:
        return stopped_by(received, f"; the model so far is in {out}")

    heading(f"What it makes of the {len(kept):,} texts that it has not seen")
    print(f"{results['trained'].table()}\n\n{table(results)}")
    print(f"(naive Bayes: {bayes.features}, α = {bayes.alpha:g}, chosen on a tenth of the texts to learn from)")
    print(f"\n{seconds:.0f} s in all; saved in {out}. Ask it:")
    print(f"  {shlex.join(['lama', 'classify', 'predict', str(out), kept[0].text[:60]])}")
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
    from lama.data.labelled import DATASETS, open_labelled, split_labelled
    from lama.training.classify import judged

    predictor = load_predictor(args.model, AT_ONCE)
    if args.file:
        examples = list(open_labelled(args.file).examples)
    else:
        source = read_object(Path(args.model) / "config.json").get("training")
        source = source.get("data") if isinstance(source, dict) else None
        if not isinstance(source, str):
            raise LamaError(f"{quoted_path(args.model)} must name the data it was trained on; got none. Give a FILE")
        if source not in DATASETS and not os.path.isfile(source):
            raise LamaError(f"the data that {quoted_path(args.model)} was trained on is not here: {quoted_path(source)}. Give a FILE")
        _, examples = split_labelled(open_labelled(source).examples)
    known = predictor.model.config.labels
    if unknown := sorted({example.label for example in examples} - set(known)):
        names, others = (quoted(", ".join(labels), plain=True) for labels in (known, unknown[:5]))
        raise LamaError(f"labels must be the model's, {names}; got {others}")
    result = judged(predictor, examples)
    print(f"{result.table()}\n\naccuracy {result.accuracy:.2%} of {len(examples):,} texts")
    return 0


def run_predict(args: argparse.Namespace) -> int:
    piped = args.text == ["-"]
    if not piped and "-" in args.text:
        raise UsageError("- for standard input must be the only TEXT; got others beside it")
    if not all(text.strip() for text in args.text):
        raise UsageError("TEXT must not be empty; give some text, or - for standard input")
    machine.use(args)
    predictor = load_predictor(args.model, at_once(AT_ONCE) if piped else min(len(args.text), AT_ONCE))
    labels = predictor.model.config.labels

    def answers(texts: list[str]) -> Iterator[str]:
        texts = [text.strip() for text in texts]
        for text, chances in zip(texts, predictor(texts), strict=True):
            best = int(chances.argmax())
            if args.json:
                found = {label: round(float(chance), 6) for label, chance in zip(labels, chances, strict=True)}
                yield json.dumps({"label": labels[best], "probabilities": found, "text": text}, ensure_ascii=False)
            else:
                yield f"{labels[best]}\t{chances[best]:.3f}\t{text}"

    if piped:
        return answer_lines(answers, predictor.batch_size)
    for texts in in_batches(args.text, predictor.batch_size):
        print(*answers(texts), sep="\n", flush=True)
    return 0
