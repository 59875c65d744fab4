"""Train, evaluate and use a text classifier.

The classifier is a transformer encoder that predicts the class of a text.
"""

import argparse
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lama.cli import AddVerb, machine, training
from lama.cli.lines import answer_lines, at_once, in_batches
from lama.cli.live import heading
from lama.cli.settings import add_settings
from lama.errors import LamaError, UsageError, quoted
from lama.files import quoted_path, read_object
from lama.tables import metric_table
from lama.training.settings import presets

if TYPE_CHECKING:
    from lama.data.labelled import LabelledText
    from lama.training.classify import ClassifierSession, Predictor
    from lama.training.loop import Step
    from lama.training.session import Evaluation

FILE = "lines of label, tab, text; or .csv with the columns text and label"
TRAIN = """Train a classifier.

Train a classifier, as `lama train DATA --model classifier` does. Its encoder is first pretrained on masked
tokens; four fifths of the texts are for training. Its accuracy on the other fifth is compared with that of
the most frequent class and of naive Bayes.
"""
MODEL = "a folder that lama classify train has written"
AT_ONCE = 64  # lines of a pipe that are answered together


def add_parser(add_verb: AddVerb) -> None:
    classify = add_verb("classify", None, __doc__)
    add_verb = classify.add_verbs("action")
    train = add_verb("train", training.run, TRAIN)
    train.set_defaults(model="classifier")
    train.add("settings DATA", f"{', '.join(presets('classifier'))}, or a file: {FILE}", nargs="?")
    training.add_options(train, "out/ and the data's name")
    add_settings(train, "classifier")

    evaluate = add_verb("eval", run_eval, run_eval.__doc__)
    evaluate.add_model(MODEL)
    evaluate.add("file FILE", FILE, nargs="?")
    machine.add_options(evaluate)

    predict = add_verb("predict", run_predict, run_predict.__doc__)
    predict.add_model(MODEL)
    predict.add("text TEXT", "one or more texts; - for the lines of standard input", nargs="+")
    predict.add("--json", "a JSON object for each text, with the probability of every class")
    machine.add_options(predict)


def introduce(session: "ClassifierSession", args: argparse.Namespace) -> None:
    from lama.models.registry import describe

    heading(f"The data: {session.config.data}")
    examples = [*session.train, *session.test]
    for label in session.model.config.labels:
        texts = [example.text for example in examples if example.label == label]
        print(f"{len(texts):>8,} {label}, such as {texts[0][:60]!r}")
    print(f"{len(session.train):,} for training, {len(session.test):,} held out")
    print(describe(session.model))
    session.measure_start()
    if bayes := session.bayes:
        print(f"naive Bayes: {bayes.features}, α = {bayes.alpha:g}, chosen on a tenth of the training texts")


def remark(session: "ClassifierSession", step: "Step") -> str | None:
    """The end of the pretraining."""
    n = session.config.pretraining
    return f"pretrained for {n} steps: loss {step.loss:.3f} nats per masked token" if step.step == n else None


def conclude(session: "ClassifierSession", last: "Evaluation | None") -> None:
    """Print the accuracies. Raises LamaError unless training beats the untrained model and the majority."""
    from lama.training.classify import evaluate

    session.load_best()
    result, out = evaluate(session.predictor, session.test), session.folder.path
    shares = session.shares | {"trained": result.accuracy}
    session.add_notes({"heldout_accuracy": shares, "heldout_confusion": result.confusion.tolist()})
    heading(f"The {len(session.test):,} held-out texts")
    accuracies = metric_table("held-out texts", shares, ("accuracy", shares.values(), ".2%"))
    print(f"{result.table()}\n\n{accuracies}")
    text = session.test[0].text[:60]
    print(f"\n{session.seconds:.0f} s in all; saved in {out}. Use it:")
    print(f"  {shlex.join(['lama', 'classify', 'predict', '-m', str(out), text])}")
    best = max("untrained", "majority", key=shares.__getitem__)
    if shares["trained"] <= shares[best]:
        got = f"{shares['trained']:.1%}, and {shares[best]:.1%}"
        raise LamaError(f"the trained model must beat the {best} one; got {got}. Raise --steps")


def load_predictor(folder: str, batch_size: int) -> "Predictor":
    from lama.checkpoints import load_kind
    from lama.tokenizers import BytePairTokenizer
    from lama.training.classify import Predictor

    return Predictor(*load_kind("classifier", folder, BytePairTokenizer), batch_size)


def run_eval(args: argparse.Namespace) -> int:
    """Evaluate a classifier.

    Print its accuracy and confusion matrix, on the held-out fifth of its own data set or on FILE.
    """
    machine.use(args)
    from lama.data.labelled import open_labelled
    from lama.training.classify import evaluate

    predictor = load_predictor(args.model, AT_ONCE)
    examples = list(open_labelled(args.file).examples) if args.file else own_examples(Path(args.model))
    known = predictor.model.config.labels
    if unknown := sorted({example.label for example in examples} - set(known)):
        names, others = quoted(", ".join(known), plain=True), quoted(", ".join(unknown[:5]), plain=True)
        raise LamaError(f"labels must be the model's, {names}; got {others}")
    result = evaluate(predictor, examples)
    print(f"{result.table()}\n\naccuracy {result.accuracy:.2%} of {len(examples):,} texts")
    return 0


def own_examples(model: Path) -> "list[LabelledText]":
    """The held-out examples of a model's own data set. Raises LamaError."""
    from lama.data.labelled import DATASETS, open_labelled, split_labelled

    notes = read_object(model / "config.json").get("training")
    source, where = notes.get("data") if isinstance(notes, dict) else None, quoted_path(model)
    if not isinstance(source, str):
        raise LamaError(f"{where} must name the data it was trained on; got none. Give a FILE")
    if source not in DATASETS and not os.path.isfile(source):
        shown = quoted_path(source)
        raise LamaError(f"the data that {where} was trained on is missing: {shown}. Give a FILE")
    _, examples = split_labelled(open_labelled(source).examples)
    return examples


def run_predict(args: argparse.Namespace) -> int:
    """Classify texts.

    Print the class of each text, its probability and the text, separated by tabs. With -, print one line for
    each line of standard input. It is empty for an empty line, and for one that cannot be classified: then
    the exit code is 1.
    """
    piped = args.text == ["-"]
    if not piped and "-" in args.text:
        raise UsageError("- for standard input must be the only TEXT; got other texts too")
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
                found = dict(zip(labels, (round(float(chance), 6) for chance in chances), strict=True))
                answer = {"label": labels[best], "probabilities": found, "text": text}
                yield json.dumps(answer, ensure_ascii=False)
            else:
                yield f"{labels[best]}\t{chances[best]:.3f}\t{text}"

    if piped:
        return answer_lines(answers, predictor.batch_size)
    for texts in in_batches(args.text, predictor.batch_size):
        print(*answers(texts), sep="\n", flush=True)
    return 0
