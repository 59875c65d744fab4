"""Tune SmolLM2 with LoRA to name the class of a line, and compare it with naive Bayes.

    python scripts/tune_classifier.py [--data names] [--lines 4000] [--out DIR] [options of lama train]

The lines are those of `lama classify`: the same random fifth is held out. Each of the others becomes a
conversation, and `lama train --chat` learns the answers. Prints the accuracy of the base model, of naive
Bayes and of the tuned model; the seconds of the training; the size of the adapter; and the perplexity of
another text under both models. A finished run of the same command is not trained again.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lama.checkpoints import load_causal
from lama.cli import make_parser
from lama.cli.training import command_line, total_steps
from lama.data import open_corpus
from lama.data.labelled import DATASETS, LabelledText, open_labelled, split_labelled
from lama.data.naive_bayes import best_naive_bayes
from lama.errors import LamaError
from lama.evaluation.likelihood import Row, score
from lama.evaluation.sliding import perplexity
from lama.models.gpt import GPT
from lama.tables import metric_table
from lama.tokenizers import Tokenizer
from lama.tokenizers.chat_template import Message, encode_chat, template_of
from lama.training.folder import RunFolder, read_training, step_of

QUESTIONS = {
    "names": "Male or female?",
    "testament": "Old or New Testament?",
    "shakespeare-milton": "Milton or Shakespeare?",
}
OPTIONS = (
    *("--lora", "4", "--learning-rate", "1e-3", "--batch-size", "2", "--context-length", "256"),
    *("--dtype", "bfloat16", "--precision", "bfloat16", "--validation", "0.02", "--evaluate-every", "0"),
    *("--sample-every", "100000"),
)
"""Options of lama train; others given here come after them."""
OTHER = 40_000  # characters of the other text


def messages_of(question: str, example: LabelledText) -> list[Message]:
    roles = ("system", question), ("user", example.text), ("assistant", example.label)
    return [{"role": role, "content": content} for role, content in roles]


def accuracy(model: GPT, tokenizer: Tokenizer, question: str, examples: Sequence[LabelledText]) -> float:
    """The share of texts whose true class is the model's likeliest answer."""
    template = template_of(tokenizer)
    assert template is not None, "a model for conversations"
    labels = sorted({example.label for example in examples})
    rows = []
    for example in examples:
        prompt = encode_chat(tokenizer, template, messages_of(question, example)[:-1])
        answers = [tokenizer.encode_inside(label) for label in labels]
        rows += [Row([*prompt, *answer], len(answer)) for answer in answers]
    found = np.zeros(len(rows))
    for each in score(model, rows):
        found[each.index] = each.log_probs.sum()
    said = found.reshape(-1, len(labels)).argmax(1)
    return float(np.mean([labels[i] == each.label for i, each in zip(said, examples, strict=True)]))


def is_trained(out: Path, words: Sequence[str]) -> bool:
    """Whether the folder has a finished run of this command."""
    folder, command = RunFolder(out), command_line(make_parser("train").parse_args(words))
    try:
        last = folder.last_checkpoint()
        return step_of(last) == total_steps(folder) and read_training(last)["command"] == command
    except (LamaError, LookupError):
        return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATASETS, default="names")
    parser.add_argument("--from", dest="model", default="smollm2")
    parser.add_argument("--lines", type=int, default=4000, help="largest number of training lines")
    parser.add_argument("--held-out", type=int, default=1000, help="largest number of held-out lines")
    parser.add_argument("--out", type=Path, help="default: out/tuned-DATA")
    args, more = parser.parse_known_args(argv)

    out = args.out or Path(f"out/tuned-{args.data}")
    question, rng = QUESTIONS[args.data], np.random.default_rng(0)
    parts = split_labelled(open_labelled(args.data).examples)
    train, held_out = (
        [part[i] for i in rng.permutation(len(part))[:most]]
        for part, most in zip(parts, (args.lines, args.held_out), strict=True)
    )
    majority = Counter(example.label for example in train).most_common(1)[0][0]
    right = {"the more common class": float(np.mean([each.label == majority for each in held_out]))}
    right["naive Bayes"] = best_naive_bayes(train).accuracy(held_out)

    data = out.parent / f"{args.data}-{len(train)}.jsonl"
    words = ["train", "--from", args.model, "--chat", str(data), "--out", str(out), *OPTIONS, *more]
    if "--restart" in more or not is_trained(out, words):
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"messages": messages_of(question, each)}) + "\n" for each in train]
        data.write_text("".join(rows))
        subprocess.run([sys.executable, "-m", "lama", *words], check=True)
    seconds = json.loads((out / "notes.json").read_text())["training"]["seconds"]

    other = open_corpus(["kjv"]).text[:OTHER]
    perplexities = []
    for name, adapter in (("base model", None), ("tuned model", out)):
        model, tokenizer = load_causal(args.model, adapter=adapter)
        right[name] = accuracy(model, tokenizer, question, held_out)
        perplexities.append(perplexity(model, tokenizer, other, context_length=512).perplexity)
    print(metric_table(f"{len(train):,} lines of {args.data}", right, ("accuracy", right.values(), ".1%")))
    size = (out / "adapter_model.safetensors").stat().st_size
    print(f"trained in {seconds:,.0f} s; the adapter has {size / 1e6:.1f} MB")
    before, after = perplexities
    change = f"{before:.2f}, tuned {after:.2f}, {after / before - 1:+.1%}"
    print(f"perplexity of the King James Bible's beginning: {change}")
    return 0 if right["tuned model"] > right["naive Bayes"] else 1


if __name__ == "__main__":
    sys.exit(main())
